"""Report: what follows from the results, as JSON, markdown and pictures.

Shares of right answers have Wilson intervals, and are compared with full depth by McNemar's exact test over the same
items; means over tokens (NLL, agreement, KL) have bootstrap intervals over texts and a sign-flip test. The interval of
a difference is a paired bootstrap in both. Depth, bytes and speed are summed over the tokens that were really made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3rt.errors import D3rtError
from d3rt.evaluation import pictures
from d3rt.evaluation.intervals import bootstrap, mcnemar, sign_flip, wilson
from d3rt.evaluation.journal import Key
from d3rt.evaluation.settings import Settings
from d3rt.evaluation.tasks import FULL, Result
from d3rt.policies import Policy

BINS = 8  # of positions
FEW = 0.05  # a share of right answers below which a task can hardly tell two runs apart
LEAST_DISCORDANT = 6  # items on which two runs differ, below which no McNemar p is under 0.05

Items = Mapping[str, Result]  # by item, of one task and arm

TITLES = {
    "strict": "strict match",
    "flexible": "flexible match",
    "exact_match": "exact match",
    "harness": "as the harness scores",
    "text": "NLL of the text",
    "own": "NLL of the model's own text",
    "nll": "NLL of full depth's choices",
    "agree": "same token",
    "kl": "KL(full depth, this)",
}
LOWER_IS_BETTER = frozenset({"text", "own", "nll", "kl"})


@dataclass(frozen=True)
class Report:
    """All figures, as JSON knows them."""

    figures: dict[str, Any]

    def write(self, folder: Path) -> None:
        """report.json, report.md and the pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        drawn = pictures.draw(self.figures, folder)
        (folder / "report.md").write_text(self.markdown(drawn), encoding="utf-8")

    def markdown(self, drawn: Sequence[Path] = ()) -> str:
        """The figures as tables, the worst news first."""
        about = self.figures["about"]
        machine, versions = about["machine"], about["versions"]
        lines = [
            "# What skipped layers cost",
            "",
            f"{about['model']}, {about['num_layers']} layers; greedy, one sequence at a time; {about['runtime']}.",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + ".",
            "Intervals are of 95%, differences paired with full depth over the same items.",
            "",
        ]
        lines += [f"- {note}" for note in self.figures["notes"]]
        for name, task in self.figures["tasks"].items():
            lines += ["", f"## {name}: {task['title']}", "", *_quality_table(task), "", *_cost_table(task)]
            if "groups" in task:
                lines += ["", *_group_table(task)]
            if "positions" in task:
                lines += ["", *_position_table(task)]
        lines += [f"\n![{path.stem}]({path.name})" for path in drawn]
        return "\n".join(lines) + "\n"


def summarise(
    about: dict[str, Any],
    tasks: Sequence[str],
    arms: Mapping[str, Policy],
    results: Mapping[Key, Result],
    settings: Settings,
) -> Report:
    """The report of finished tasks."""
    figures: dict[str, Any] = {"about": about, "arms": list(arms), "tasks": {}, "notes": []}
    for name in tasks:
        by_arm = {
            arm: {item: result for (task, item, of), result in results.items() if (task, of) == (name, arm)}
            for arm in arms
        }
        make = {"ppl": _ppl, "agreement": _agreement}.get(name, _answers)
        task = make(name, by_arm, settings)
        task["cost"] = {
            arm: _cost(by_arm[arm], policy, about["num_layers"], task["longest"])
            for arm, policy in arms.items()
        }
        for arm, cost in task["cost"].items():
            cost["over_full"] = (
                task["cost"][FULL]["bytes_per_token"] / cost["bytes_per_token"]
                if arm != FULL and cost["bytes_per_token"]
                else None
            )
        figures["tasks"][name] = task
        figures["notes"] += _notes(name, task)
    return Report(figures)


# ---- from results to figures ----


def _answers(name: str, by_arm: Mapping[str, Items], settings: Settings) -> dict[str, Any]:
    full = by_arm[FULL]
    metrics = list(next(iter(full.values()))["scores"])
    found = {
        metric: {
            arm: _share(
                {item: each["scores"][metric] for item, each in items.items()},
                None if arm == FULL else {item: full[item]["scores"][metric] for item in items},
            )
            for arm, items in by_arm.items()
        }
        for metric in metrics
    }
    cut = sum(each["prompt_cut"] for each in full.values())
    title = f"{len(full)} questions, {settings.shots if name == 'gsm8k' else 3} worked examples before each"
    task = {
        "title": title,
        "items": len(full),
        "prompts_cut": cut,
        "longest": settings.max_new_tokens,
        "metrics": found,
    }
    groups = sorted({each["group"] for each in full.values()} - {""})
    if groups:  # the mean over all items is the tasks' mean, weighted by their sizes
        task["title"] += f", {len(groups)} tasks weighted by size"
        task["groups"] = {
            group: {
                arm: {
                    "count": len(of := [each for each in items.values() if each["group"] == group]),
                    **{metric: sum(each["scores"][metric] for each in of) / len(of) for metric in metrics},
                }
                for arm, items in by_arm.items()
            }
            for group in groups
        }
    return task


def _share(scores: Mapping[str, float], full: Mapping[str, float] | None) -> dict[str, Any]:
    right, count = sum(scores.values()), len(scores)
    low, high = wilson(right, count)
    figure: dict[str, Any] = {"mean": right / count, "low": low, "high": high, "count": count}
    if full is not None:
        differences = [scores[item] - full[item] for item in scores]
        worse, better = differences.count(-1.0), differences.count(1.0)
        low, high = bootstrap(differences, [1] * count)
        figure["against_full"] = {
            "difference": sum(differences) / count,
            **{"low": low, "high": high, "p": mcnemar(worse, better), "test": "McNemar, exact"},
            **{"worse": worse, "better": better},
        }
    return figure


def _ppl(name: str, by_arm: Mapping[str, Items], settings: Settings) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    positions: dict[str, Any] = {}
    for kind in ("text", "own"):
        of = {
            arm: {item: each["nll"] for item, each in items.items() if item.startswith(f"{kind}/")}
            for arm, items in by_arm.items()
        }
        kinds[kind] = _token_means(of)
        positions[kind] = _by_position(of, settings.continued_tokens)
    return {
        "title": f"{len(of[FULL])} passages, {settings.prompt_tokens} tokens at full depth, then "
        f"{settings.continued_tokens}",
        "items": len(of[FULL]),
        "longest": settings.continued_tokens,
        "metrics": kinds,
        "positions": positions,
    }


def _agreement(name: str, by_arm: Mapping[str, Items], settings: Settings) -> dict[str, Any]:
    of = {
        metric: {arm: {item: each[metric] for item, each in items.items()} for arm, items in by_arm.items()}
        for metric in ("agree", "kl", "nll")
    }
    return {
        "title": f"along full depth's own text, {len(by_arm[FULL])} of up to {settings.continued_tokens} tokens",
        "items": len(by_arm[FULL]),
        "longest": settings.continued_tokens,
        "metrics": {metric: _token_means(each) for metric, each in of.items()},
        "positions": {
            metric: _by_position(of[metric], settings.continued_tokens) for metric in ("agree", "kl")
        },
    }


def _token_means(by_arm: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Of values by position, by item: the mean over all tokens."""
    figures = {}
    full = by_arm[FULL]
    for arm, items in by_arm.items():
        sums, counts = [sum(each) for each in items.values()], [len(each) for each in items.values()]
        low, high = bootstrap(sums, counts)
        figures[arm] = {
            "mean": sum(sums) / sum(counts),
            "low": low,
            "high": high,
            "count": len(items),
            "tokens": sum(counts),
        }
        if arm != FULL:
            differences = [sum(values) - sum(full[item]) for item, values in items.items()]
            low, high = bootstrap(differences, counts)
            figures[arm]["against_full"] = {
                "difference": sum(differences) / sum(counts),
                **{"low": low, "high": high, "p": sign_flip(differences), "test": "sign flip over texts"},
            }
    return figures


def _by_position(by_arm: Mapping[str, Mapping[str, Sequence[float]]], length: int) -> dict[str, Any]:
    """Means of bins of positions, by arm; and of the difference to full depth, with its interval."""
    bins = min(BINS, length)
    edges = [length * at // bins for at in range(bins + 1)]
    found: dict[str, Any] = {"edges": edges, "arms": {}}
    for arm, items in by_arm.items():
        rows = []
        for first, end in zip(edges, edges[1:], strict=False):
            parts = {item: values[first:end] for item, values in items.items() if len(values) > first}
            if not parts:
                rows.append(None)
                continue
            sums, counts = [sum(part) for part in parts.values()], [len(part) for part in parts.values()]
            differences = [sum(part) - sum(by_arm[FULL][item][first:end]) for item, part in parts.items()]
            low, high = bootstrap(differences, counts)
            rows.append(
                {
                    "mean": sum(sums) / sum(counts),
                    "difference": sum(differences) / sum(counts),
                    **{"low": low, "high": high, "tokens": sum(counts)},
                }
            )
        found["arms"][arm] = rows
    return found


def _cost(items: Items, policy: Policy, num_layers: int, longest: int) -> dict[str, Any]:
    """Over all tokens of all items. Bytes and time are those of decode steps."""
    costs = [each["cost"] for each in items.values()]
    total = {
        name: sum(cost[name] for cost in costs)
        for name in ("steps", "depth", "weight_bytes", "kv_bytes", "full_weight_bytes")
    }
    decoded = total["steps"] - len(costs)
    timed = [cost for cost in costs if cost["seconds"]]
    seconds = sum(cost["seconds"] for cost in timed)
    return {
        "tokens": total["steps"],
        "mean_length": total["steps"] / len(costs),
        "mean_depth": total["depth"] / total["steps"],
        "mean_depth_at_longest": _depth_by_formula(policy, num_layers, longest),
        "bytes_per_token": (total["weight_bytes"] + total["kv_bytes"]) / decoded if decoded else None,
        "weight_share": total["weight_bytes"] / total["full_weight_bytes"] if decoded else 1.0,
        "tokens_per_second": sum(cost["steps"] - 1 for cost in timed) / seconds if seconds else None,
    }


def _depth_by_formula(policy: Policy, num_layers: int, steps: int) -> float | None:
    """The mean depth that papers quote: over the longest answer. None for a policy that decides while it runs."""
    try:
        return policy.schedule(num_layers, steps).mean_depth
    except D3rtError:
        return None


def _notes(name: str, task: Mapping[str, Any]) -> list[str]:
    """What a reader must not overlook."""
    notes = []
    for metric, arms in task["metrics"].items():
        share = metric in ("strict", "flexible", "exact_match")
        if share and arms[FULL]["mean"] < FEW:
            notes.append(
                f"{name}, {TITLES[metric]}: full depth itself has {arms[FULL]['mean']:.1%} right. On this model the "
                "measure can hardly tell policies apart, whatever they do; ppl and agreement can."
            )
        for arm, figure in arms.items():
            against = figure.get("against_full")
            if not against or metric in ("harness", "nll", "agree", "kl"):
                continue
            if share and 0 < (differing := against["worse"] + against["better"]) < LEAST_DISCORDANT:
                notes.append(
                    f"{name}, {TITLES[metric]}, `{arm}`: differs from full depth on {differing} item"
                    f"{'' if differing == 1 else 's'}: too few for any p below 0.05."
                )
            elif not share and figure["count"] < LEAST_DISCORDANT:
                notes.append(
                    f"{name}, {TITLES[metric]}, `{arm}`: {figure['count']} texts are too few for any p below 0.05."
                )
            elif against["p"] < 0.05:
                worse = (against["difference"] > 0) == (metric in LOWER_IS_BETTER)
                notes.append(
                    f"{name}, {TITLES[metric]}, `{arm}`: {'worse' if worse else 'better'} than full depth by "
                    f"{_value(metric, abs(against['difference']))} (p {_p(against['p'])})."
                )
    if task.get("prompts_cut"):
        notes.append(f"{name}: {task['prompts_cut']} prompts were too long and lost their beginning.")
    for arm, cost in task["cost"].items():
        claimed = cost["mean_depth_at_longest"]
        if claimed is not None and cost["mean_depth"] > claimed + 0.5:
            notes.append(
                f"{name}, `{arm}`: mean depth is {cost['mean_depth']:.2f} at the lengths that the answers really had "
                f"({cost['mean_length']:.0f} tokens); the formula over {task['longest']} tokens would claim "
                f"{claimed:.2f}."
            )
    return notes


# ---- from figures to markdown ----


def _value(metric: str, value: float, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{value:{plus}.4f}" if metric in LOWER_IS_BETTER else f"{value:{plus}.1%}"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _named(arm: str) -> str:
    return "full depth" if arm == FULL else f"`{arm}`"


def _quality_table(task: Mapping[str, Any]) -> list[str]:
    rows = []
    for metric, arms in task["metrics"].items():
        for arm, figure in arms.items():
            if metric in ("agree", "kl") and arm == FULL:
                continue  # 100% and 0
            row = [
                _named(arm),
                TITLES[metric],
                _value(metric, figure["mean"]),
                f"{_value(metric, figure['low'])} to {_value(metric, figure['high'])}",
            ]
            if (against := figure.get("against_full")) and metric not in ("agree", "kl"):
                low, high = (_value(metric, against[end], sign=True) for end in ("low", "high"))
                row += [
                    _value(metric, against["difference"], sign=True),
                    f"{low} to {high}",
                    _p(against["p"]),
                ]
                row += [f"{against['worse']} / {against['better']}" if "worse" in against else "-"]
                row += [f"{math.exp(against['difference']):.3f}" if metric in ("text", "own", "nll") else "-"]
            else:
                row += ["-"] * 5
            rows.append(row)
    header = ["", "measure", "mean", "95%", "to full depth", "95%", "p", "worse / better", "perplexity ratio"]
    return _table(header, rows)


def _cost_table(task: Mapping[str, Any]) -> list[str]:
    rows = []
    for arm, cost in task["cost"].items():
        speed, moved, gain = cost["tokens_per_second"], cost["bytes_per_token"], cost["over_full"]
        rows.append(
            [
                _named(arm),
                f"{cost['tokens']}",
                f"{cost['mean_length']:.1f}",
                f"{cost['mean_depth']:.2f}",
                f"{claimed:.2f}" if (claimed := cost["mean_depth_at_longest"]) is not None else "-",
                f"{moved / 1e6:.1f}" if moved else "-",
                f"{cost['weight_share']:.1%}",
                f"{gain:.2f}x" if gain else "-",
                f"{speed:.1f}" if speed else "-",
            ]
        )
    header = ["", "tokens", "mean length", "mean depth", f"by formula to {task['longest']}", "MB a token"]
    return _table([*header, "share of weight bytes", "expected speed-up", "tokens/s"], rows)


def _group_table(task: Mapping[str, Any]) -> list[str]:
    arms = list(task["cost"])
    rows = [
        [group, str(of[FULL]["count"]), *(f"{of[arm]['exact_match']:.0%}" for arm in arms)]
        for group, of in task["groups"].items()
    ]
    return _table(["exact match by task", "items", *map(_named, arms)], rows)


def _position_table(task: Mapping[str, Any]) -> list[str]:
    rows = []
    for metric, found in task["positions"].items():
        for arm, bins in found["arms"].items():
            if arm == FULL and metric in ("agree", "kl"):
                continue
            shown = "mean" if arm == FULL or metric in ("agree", "kl") else "difference"
            cells = [
                _value(metric, each[shown], sign=shown == "difference") if each else "-" for each in bins
            ]
            rows.append(
                [
                    f"{TITLES[metric]}, {_named(arm)}{' to full depth' if shown == 'difference' else ''}",
                    *cells,
                ]
            )
    edges = next(iter(task["positions"].values()))["edges"]
    header = ["by position", *(f"{first}-{end - 1}" for first, end in zip(edges, edges[1:], strict=False))]
    return _table(header, rows)
