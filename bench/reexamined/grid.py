"""(b) Table 9's grid, start x alpha, on SmolLM2-135M, at the lengths that answers really have.

Exact match on GSM8K is near zero at this size whatever the policy, so each cell is held against full depth along full
depth's own answers (KL, same token) and on the right ones (NLL), which tell cells apart with a few dozen items. BBH's
exact match is beside them, with what a few dozen items can say about it. alpha = .9 is BBH's setting in the paper."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import d3rt
from d3rt.evaluation import data
from d3rt.evaluation.intervals import mcnemar
from d3rt.evaluation.scoring import BBH_STOPS, GSM8K_STOPS, score_bbh
from d3rt.evaluation.until import prompt_ids
from d3rt.policies import D3, FullDepth, Policy
from reexamined.forcing import FULL, Item, Result, Teacher, compare_all, figures

STARTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ALPHAS = (0.9, 0.999, 0.9999)
TASKS = {
    "gsm8k": "GSM8K, its own answers",
    "gsm8k gold": "GSM8K, the right solutions",
    "bbh": "BBH, its own answers",
    "bbh gold": "BBH, the right answers",
    "text": "WikiText-2",
}


def arms() -> dict[str, Policy]:
    """Full depth and every cell."""
    return {FULL: FullDepth()} | {
        f"{alpha:g}/{start:g}": D3(alpha, start) for alpha in ALPHAS for start in STARTS
    }


def items(fast: d3rt.Runtime, options: argparse.Namespace) -> tuple[dict[str, list[Item]], dict[str, str]]:
    """What is forced, by task; and the right answer of each BBH item."""
    teacher, found = Teacher(fast), {task: [] for task in TASKS}
    encode = lambda text: tuple(fast.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    questions = {
        "gsm8k": (data.gsm8k(options.gsm8k, options.shots, options.gsm8k_items), GSM8K_STOPS, options.new),
        "bbh": (data.bbh(options.bbh, options.bbh_items, options.bbh_tasks), BBH_STOPS, options.bbh_new),
    }
    targets = {}
    for task, (of, stops, new) in questions.items():
        for question in of:
            ids, _ = prompt_ids(fast, question.prompt, options.new)
            prompt = tuple(ids[0].tolist())
            tokens, _ = teacher.greedy(prompt, new, stops)
            found[task].append(Item(question.item, prompt, tokens))
            gold = encode(" " + question.target + "\n")[: options.new]
            found[f"{task} gold"].append(Item(question.item, prompt, gold))
            targets[question.item] = question.target
    ids = encode(data.text(options.text))
    length = options.prompt + options.new
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens; a passage takes {length}.")
    step = max(length, (len(ids) - length) // max(1, options.texts - 1))
    for at in range(0, min(options.texts, 1 + (len(ids) - length) // step)):
        passage = ids[at * step : at * step + length]
        found["text"].append(Item(str(at), passage[: options.prompt], passage[options.prompt :]))
    return found, targets


def measure(fast: d3rt.Runtime, options: argparse.Namespace) -> dict[str, Any]:
    """Every cell on every task."""
    of, targets = items(fast, options)

    def more(teacher: Teacher, task: str, item: Item, policy: Policy) -> Result:
        if task != "bbh":
            return {}
        _, text = teacher.greedy(item.prompt, options.bbh_new, BBH_STOPS, policy)
        return {"right": score_bbh(text, targets[item.name])["exact_match"]}

    cells = arms()
    results = compare_all(fast, cells, of, options.out / "grid.jsonl", {"part": "grid"}, more)
    layers = fast.config.num_hidden_layers
    found = {task: {arm: figures(results, task, arm, layers) for arm in cells} for task in of}
    names = [item.name for item in of["bbh"]]
    full = [results["bbh", name, FULL]["right"] for name in names]
    for arm, figure in found["bbh"].items():
        right = [results["bbh", name, arm]["right"] for name in names]
        worse = sum(a < b for a, b in zip(right, full, strict=True))
        better = sum(a > b for a, b in zip(right, full, strict=True))
        figure["right"] = {
            "mean": sum(right) / len(right),
            "worse": worse,
            "better": better,
            "p": mcnemar(worse, better),
        }
    return {"tasks": found, "starts": STARTS, "alphas": ALPHAS}


def markdown(found: Mapping[str, Any]) -> str:
    """A table a task: alpha down, start across."""
    lines = []
    for task, of in found["tasks"].items():
        gold = task.endswith("gold") or task == "text"
        metric = "nll" if gold else "kl"
        full = of[FULL]
        lines += [
            "",
            f"{TASKS[task]}: {full['items']} items, {full['tokens'] / full['items']:.0f} tokens each; "
            + (
                "NLL to full depth, nats a token"
                if gold
                else "KL(full depth, this), nats a token, and same token"
            ),
            "",
            "| alpha | mean depth | bytes | "
            + " | ".join(f"start {start:g}" for start in found["starts"])
            + " |",
            "|---|---:|---:|" + "---:|" * len(found["starts"]),
        ]
        for alpha in found["alphas"]:
            row = [of[f"{alpha:g}/{start:g}"] for start in found["starts"]]
            middle = row[found["starts"].index(0.5)]
            cells = [_cell(each[metric], each["agree"] if metric == "kl" else None) for each in row]
            lines.append(
                f"| {alpha:g} | {middle['mean_depth']:.1f} | {middle['bytes']:.0%} | "
                + " | ".join(cells)
                + " |"
            )
    bbh = found["tasks"]["bbh"]
    lines += [
        "",
        f"BBH, exact match (full depth {bbh[FULL]['right']['mean']:.1%}); worse / better than it; p",
        "",
    ]
    lines += ["| alpha | " + " | ".join(f"start {start:g}" for start in found["starts"]) + " |"]
    lines += ["|---|" + "---:|" * len(found["starts"])]
    for alpha in found["alphas"]:
        row = [bbh[f"{alpha:g}/{start:g}"]["right"] for start in found["starts"]]
        cells = [f"{each['mean']:.1%}; {each['worse']} / {each['better']}; {each['p']:.2f}" for each in row]
        lines.append(f"| {alpha:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: Mapping[str, float], agree: Mapping[str, float] | None) -> str:
    if agree is None:
        return f"{figure['mean']:+.3f} ({figure['low']:+.2f} to {figure['high']:+.2f})"
    return f"{figure['mean']:.3f} ({figure['low']:.2f}-{figure['high']:.2f}) {agree['mean']:.0%}"


def draw(found: Mapping[str, Any], path: Path) -> Path:
    """A line for each alpha over start, a panel a task."""
    from matplotlib.figure import Figure

    from d3rt.evaluation.pictures import COLOURS, GRID

    shown = [task for task in TASKS if task in found["tasks"]]
    figure = Figure(figsize=(3.1 * len(shown), 3.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, task in zip(axes, shown, strict=True):
        metric = "nll" if task.endswith("gold") or task == "text" else "kl"
        for alpha, colour in zip(found["alphas"], COLOURS, strict=False):
            row = [found["tasks"][task][f"{alpha:g}/{start:g}"][metric] for start in found["starts"]]
            mean = [each["mean"] for each in row]
            spread = [
                [each["mean"] - each["low"] for each in row],
                [each["high"] - each["mean"] for each in row],
            ]
            axis.errorbar(
                found["starts"],
                mean,
                spread,
                fmt="o-",
                color=colour,
                capsize=2,
                markersize=3,
                label=f"alpha {alpha:g}",
            )
        axis.set_title(TASKS[task], size=9, loc="left")
        axis.set_xlabel("start", size=9)
        axis.set_ylabel("NLL to full depth" if metric == "nll" else "KL from full depth", size=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_yscale(
            "symlog", linthresh=0.1, linscale=0.4
        )  # alpha .9 lies a hundred times above the others
        axis.set_yticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path)
    return path
