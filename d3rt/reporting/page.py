"""The page: what was measured, checked against each other, as one HTML file with its pictures inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from d3rt.errors import D3rtError
from d3rt.reporting import pictures
from d3rt.reporting.tuned import section, summary

Figures = Mapping[str, Any]
FULL = "full"
# task -> the measure that stands for it, its title, and whether less is better
QUALITY = {
    "agreement": ("kl", "KL from full depth, nats a token", True),
    "ppl": ("text", "NLL of a text, nats a token", True),
    "gsm8k": ("flexible", "GSM8K, flexible match", False),
    "bbh": ("exact_match", "BBH, exact match", False),
}
FEW_ITEMS = 30
TUNED = (  # what of a tune.json the page reads
    *("model", "num_layers", "runtime", "machine", "versions", "task", "metric", "max_drop", "seed"),
    *("prompt_tokens", "new_tokens", "items", "candidates", "policy_text", "chosen", "validation"),
    *("front", "time_front", "speedup", "test"),
)


class ReportInputError(D3rtError, ValueError):
    """A file that is not what a report is made of."""


def read_eval(folder: Path) -> dict[str, Any]:
    """report.json of `d3rt eval`."""
    return _read(
        folder / "report.json" if folder.is_dir() else folder, ("about", "arms", "tasks"), "d3rt eval"
    )


def read_bench(path: Path) -> dict[str, Any]:
    """What `d3rt bench --json` wrote."""
    return _read(path, ("settings", "runs", "depths"), "d3rt bench --json FILE")


def read_tune(folder: Path) -> dict[str, Any]:
    """tune.json of `d3rt tune`."""
    return _read(folder / "tune.json" if folder.is_dir() else folder, TUNED, "d3rt tune")


def _read(path: Path, wanted: tuple[str, ...], made_by: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportInputError(
            f"{str(path)!r} cannot be read ({error.strerror}); {made_by} writes it."
        ) from error
    except ValueError as error:
        raise ReportInputError(f"{str(path)!r} is not JSON: {error}; {made_by} writes it.") from error
    missing = [name for name in wanted if not isinstance(found, dict) or name not in found]
    if missing:
        raise ReportInputError(f"{str(path)!r} has no {', '.join(missing)}; {made_by} writes such a file.")
    return found


def page(evaluated: Figures | None, timed: Figures | None, tuned: Figures | None = None) -> str:
    """The HTML. ReportInputError when there is nothing, or when the files are of different models."""
    if evaluated is None and timed is None and tuned is None:
        raise ReportInputError(
            "nothing to report: give --eval, --bench, --tune, or --quick, which makes the first two."
        )
    from jinja2 import Environment, StrictUndefined

    layers = {
        "d3rt eval": evaluated["about"]["num_layers"] if evaluated else None,
        "d3rt bench": timed["settings"]["num_layers"] if timed else None,
        "d3rt tune": tuned["num_layers"] if tuned else None,
    }
    models = {
        "d3rt eval": evaluated["about"]["model"] if evaluated else None,
        "d3rt bench": timed["settings"]["model"] if timed else None,
        "d3rt tune": tuned["model"] if tuned else None,
    }
    for what, of in (("models", models), ("numbers of layers", layers)):
        there = {name: each for name, each in of.items() if each is not None}
        if len(set(there.values())) > 1:
            told = ", ".join(f"{name}: {each!r}" for name, each in there.items())
            raise ReportInputError(f"the files are of different {what} ({told}); run all on one.")
    num_layers = next(each for each in layers.values() if each is not None)
    policies = _policies(evaluated, timed)
    rows = [_row(policy, evaluated, timed) for policy in policies]
    drawn = list(dict.fromkeys([*policies, *([tuned["policy_text"]] if tuned else [])]))
    template = resources.files("d3rt.reporting").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        model=next(each for each in models.values() if each is not None),
        num_layers=num_layers,
        rows=rows,
        quality_titles=_titles(evaluated),
        summary=_summary(rows, evaluated) + ([summary(tuned)] if tuned else []),
        cautions=_cautions(evaluated, timed, tuned),
        trade_off=pictures.trade_off(rows) if evaluated and timed else None,
        depth=pictures.depth(drawn, num_layers, _tokens(evaluated, timed, tuned)),
        positions=pictures.positions(evaluated),
        steps=pictures.steps(timed) if timed and timed["depths"] else None,
        parts=pictures.parts(timed) if timed and timed.get("parts") else None,
        engines=_engines(timed),
        tuned=section(tuned) if tuned else None,
        front=pictures.front(tuned) if tuned else None,
        settings=_settings(evaluated, timed, tuned),
        has_eval=evaluated is not None,
        has_bench=timed is not None,
    )


def _policies(evaluated: Figures | None, timed: Figures | None) -> list[str]:
    """Full depth first, then every policy that one of the files knows."""
    named = list(evaluated["arms"]) if evaluated else []
    named += [run["policy"] for run in timed["runs"] if run["policy"]] if timed else []
    return list(dict.fromkeys([FULL, *named]))


def _titles(evaluated: Figures | None) -> list[str]:
    return [QUALITY[task][1] for task in QUALITY if evaluated and task in evaluated["tasks"]]


def _row(policy: str, evaluated: Figures | None, timed: Figures | None) -> dict[str, Any]:
    """What is known of one policy."""
    row: dict[str, Any] = {"policy": policy, "speeds": [], "quality": [], "expected": None}
    if timed:
        row["speeds"] = [
            {
                "weights": run["weights"],
                "decode": run["decode"],
                "speedup": run["measured_speedup"],
                "expected": run["expected_speedup"],
                "mean_depth": run["mean_depth"],
                "over_transformers": run["over_transformers"],
                "transformers": run.get("transformers"),
            }
            for run in timed["runs"]
            if run["policy"] == policy
        ]
    for task, (metric, title, less) in QUALITY.items():
        if not evaluated or task not in evaluated["tasks"]:
            continue
        figure = evaluated["tasks"][task]["metrics"][metric].get(policy)
        if figure is not None:
            row["quality"].append(
                {
                    "task": task,
                    "title": title,
                    "less": less,
                    **{name: figure[name] for name in ("mean", "low", "high", "count")},
                    "against": figure.get("against_full"),
                }
            )
    costs = [
        task["cost"][policy]
        for task in (evaluated or {"tasks": {}})["tasks"].values()
        if policy in task["cost"]
    ]
    if costs:
        row["expected"] = costs[0]["over_full"]
    return row


def _summary(rows: list[dict[str, Any]], evaluated: Figures | None) -> list[str]:
    """A sentence for each policy: what it gains, and what it costs."""
    lines = []
    for row in rows[1:]:
        parts = []
        if row["speeds"]:
            gains = [
                f"{each['speedup']['median']:.2f}x at {each['weights']} (expected {each['expected']:.2f}x)"
                for each in row["speeds"]
                if each["speedup"]
            ]
            parts.append("decodes " + ", ".join(gains) + " as fast as full depth")
        agreement = (evaluated or {"tasks": {}})["tasks"].get("agreement")
        if agreement and row["policy"] in agreement["metrics"]["agree"]:
            agree = agreement["metrics"]["agree"][row["policy"]]
            parts.append(
                f"chooses another token than full depth at {1 - agree['mean']:.1%} of the steps "
                f"({1 - agree['high']:.1%} to {1 - agree['low']:.1%})"
            )
        for each in row["quality"]:
            against = each["against"]
            if against is None or each["task"] == "agreement":
                continue
            sure = against["p"] < 0.05
            worse = (against["difference"] > 0) == each["less"]
            word = ("is worse" if worse else "is better") if sure else "cannot be told from full depth"
            parts.append(
                f"{word} in {each['title'].split(',')[0]} (p {against['p']:.2f}, {each['count']} items)"
            )
        if parts:
            lines.append(f"{row['policy']} " + "; ".join(parts) + ".")
    return lines


def _cautions(evaluated: Figures | None, timed: Figures | None, tuned: Figures | None) -> list[str]:
    """What a reader must not overlook."""
    found = []
    if tuned and tuned["policy_text"] != FULL and tuned["test"]["items"] < FEW_ITEMS:
        found.append(
            f"The tuned policy's figure is of {tuned['test']['items']} items, fewer than {FEW_ITEMS}: see its interval."
        )
    if evaluated:
        few = [name for name, task in evaluated["tasks"].items() if task["items"] < FEW_ITEMS]
        if few:
            found.append(
                f"{', '.join(few)}: fewer than {FEW_ITEMS} items. Such runs show that things work; they tell policies "
                "apart only where the difference is large."
            )
        found += [note.replace("`", "") for note in evaluated["notes"]]
    if evaluated and timed:
        runs = evaluated["about"]["runtime"]
        widths = dict.fromkeys(run["weights"] for run in timed["runs"] if run["engine"] == "d3rt")
        found.append(
            f"Quality was measured with {runs}; speed with weights in {', '.join(widths)}. Where these differ, the "
            "quality of the faster width is not in these figures."
        )
        if (there := evaluated["about"]["machine"]) != timed["settings"]["machine"]:
            found.append(
                f"Quality and speed come from two machines ({there['cpu']}, {timed['settings']['machine']['cpu']})."
            )
    if timed:
        found += timed["notes"]
        spread = max((run["decode"]["max"] / run["decode"]["min"] for run in timed["runs"]), default=1)
        if spread > 1.5:
            found.append(
                f"The machine was busy: one run's speeds differ by {spread:.1f}x between rounds. Trust ratios within "
                "rounds (the speed-ups), not single speeds."
            )
    return found


def _tokens(evaluated: Figures | None, timed: Figures | None, tuned: Figures | None) -> int:
    """Over how many tokens depth is drawn."""
    longest = [task["longest"] for task in evaluated["tasks"].values()] if evaluated else []
    longest += [timed["settings"]["new_tokens"]] if timed else []
    longest += [tuned["new_tokens"]] if tuned else []
    return max([*longest, 2])


def _engines(timed: Figures | None) -> list[dict[str, Any]]:
    return [run for run in timed["runs"] if run["policy"] in (None, FULL)] if timed else []


def _settings(
    evaluated: Figures | None, timed: Figures | None, tuned: Figures | None
) -> list[tuple[str, str]]:
    """Name and value of everything that the figures were taken with."""
    found = []
    if timed:
        of = timed["settings"]
        there = of["machine"]
        found += [
            (
                "speed",
                f"{of['prompt_tokens']} prompt tokens, {of['new_tokens']} new tokens, {of['rounds']} interleaved "
                f"rounds, one sequence, greedy; median and range",
            ),
            (
                "speed, machine",
                f"{there['cpu']}, {there['cores']} cores, {there['system']}; {of['threads']} threads",
            ),
            ("speed, engine", f"{of['runs']} ({of['backend']})"),
            ("speed, versions", ", ".join(f"{name} {version}" for name, version in of["versions"].items())),
        ]
        if timed["bandwidth"]:
            read = timed["bandwidth"]
            found.append(
                (
                    "bandwidth",
                    f"{read['median']:.0f} GB/s ({read['min']:.0f}-{read['max']:.0f}), {of['bandwidth_probe']}, "
                    "in the same rounds",
                )
            )
    if evaluated:
        about = evaluated["about"]
        found += _measured(
            "quality", about, "; greedy; 95% intervals, differences paired over the same items"
        )
        found += [(f"task {name}", task["title"]) for name, task in evaluated["tasks"].items()]
    if tuned:
        sizes = f"{tuned['prompt_tokens']} prompt tokens of a text, {tuned['new_tokens']} new tokens"
        found += _measured("tuning", tuned, f"; {sizes}; seed {tuned['seed']}")
        tried = ", ".join(f"{count} {name}" for name, count in tuned["candidates"].items())
        found.append(("tuning, candidates", tried))
    return found


def _measured(what: str, about: Figures, how: str) -> list[tuple[str, str]]:
    """What something was measured with, and where."""
    there = about["machine"]
    return [
        (what, f"{about['runtime']}{how}"),
        (f"{what}, machine", f"{there['cpu']}, {there['cores']} cores, {there['system']}"),
        (f"{what}, versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
    ]
