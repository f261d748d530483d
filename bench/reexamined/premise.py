"""(c) The premise: "tokens predicted later have lower perplexity and thus require less computation".

First half: NLL by position at full depth, of an author's text and of the model's own. Second half: what leaving out the
same layers costs, by position. Were later tokens in less need of layers, a constant skip would cost less later on. A
token that comes after many skipped ones also reads what those left in the cache, so each skip is also begun late: what
it costs there at once, with nothing skipped before, is the need of the position alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import d3rt
from d3rt.evaluation import data
from d3rt.evaluation.intervals import bootstrap
from d3rt.policies import FullDepth, LayerSchedule, Policy
from reexamined.forcing import FULL, Item, Teacher, compare_all

SKIPPED = (2, 4, 8)  # layers from the middle on
BINS = 8
TASKS = {"text": "WikiText-2", "own": "its own answers"}


def constant(num_layers: int, skipped: int, first_step: int = 1) -> Policy:
    """Full depth before first_step, then without `skipped` layers from the middle on."""
    middle = num_layers // 2
    some = tuple(layer for layer in range(num_layers) if not middle <= layer < middle + skipped)
    return LayerSchedule((tuple(range(num_layers)),) * first_step + (some,))


def arms(num_layers: int, new: int) -> dict[str, Policy]:
    """Full depth, and each skip from step 1 and from the middle of the continuation on."""
    found: dict[str, Policy] = {FULL: FullDepth()}
    for skipped in SKIPPED:
        found[f"{skipped}"] = constant(num_layers, skipped)
        found[f"{skipped} late"] = constant(num_layers, skipped, new // 2)
    return found


def items(fast: d3rt.Runtime, options: argparse.Namespace) -> dict[str, list[Item]]:
    """Passages of the text, and full depth's own answers to chat prompts; those that end early are short."""
    ids = fast.tokenizer(data.text(options.text), add_special_tokens=False).input_ids
    length = options.prompt + options.new
    found = []
    for at in range(min(options.texts, len(ids) // length)):
        start = at * (len(ids) // length) // options.texts * length
        passage = tuple(ids[start : start + length])
        found.append(Item(str(at), passage[: options.prompt], passage[options.prompt :]))
    teacher, own = Teacher(fast), []
    for at, prompt in enumerate(data.prompts(options.prompts)[: options.texts]):
        rendered = fast.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        tokens, _ = teacher.greedy(rendered, options.new)
        own.append(Item(str(at), tuple(rendered), tokens))
    return {"text": found, "own": own}


def measure(fast: d3rt.Runtime, options: argparse.Namespace) -> dict[str, Any]:
    """Means of bins of positions: nll at full depth; kl and nll to full depth of each arm."""
    layers, new = fast.config.num_hidden_layers, options.new
    of, cells = items(fast, options), arms(layers, options.new)
    results = compare_all(fast, cells, of, options.out / "premise.jsonl", {"part": "premise"})
    edges = [new * at // BINS for at in range(BINS + 1)]
    found: dict[str, Any] = {"edges": edges, "tasks": {}}
    for task, items_of in of.items():
        rows: dict[str, Any] = {}
        for arm in cells:
            mine = [results[task, item.name, arm] for item in items_of]
            full = [results[task, item.name, FULL] for item in items_of]
            rows[arm] = {
                "nll": _bins([each["nll"] for each in mine], edges),
                "kl": _bins([each["kl"] for each in mine], edges),
                "more": _bins(
                    [
                        [a - b for a, b in zip(x["nll"], y["nll"], strict=True)]
                        for x, y in zip(mine, full, strict=True)
                    ],
                    edges,
                ),
            }
        found["tasks"][task] = {"items": len(items_of), "arms": rows}
        for skipped in SKIPPED:  # the late half: begun at step 1, and begun only there
            rows[f"{skipped}"]["late_half"] = _half(results, task, items_of, f"{skipped}", new)
            rows[f"{skipped} late"]["late_half"] = _half(results, task, items_of, f"{skipped} late", new)
            rows[f"{skipped}"]["trend"] = _trend(results, task, items_of, f"{skipped}", new)
    return found


def _bins(values: list[list[float]], edges: list[int]) -> list[dict[str, float] | None]:
    found = []
    for first, end in zip(edges, edges[1:], strict=False):
        parts = [each[first:end] for each in values if len(each) > first]
        if not parts:
            found.append(None)
            continue
        sums, counts = [sum(part) for part in parts], [len(part) for part in parts]
        low, high = bootstrap(sums, counts)
        found.append({"mean": sum(sums) / sum(counts), "low": low, "high": high, "tokens": sum(counts)})
    return found


def _half(results: Mapping, task: str, of: list[Item], arm: str, new: int) -> dict[str, float] | None:
    """KL over the first eighth of steps after the middle."""
    first, end = new // 2, new // 2 + new // 8
    (found,) = _bins([results[task, item.name, arm]["kl"] for item in of], [first, end])
    return found


def _trend(results: Mapping, task: str, of: list[Item], arm: str, new: int) -> dict[str, float] | None:
    """KL of the last quarter less that of the second eighth, over the items that reach that far: paired."""
    early, late = slice(new // 8, new // 4), slice(3 * new // 4, new)
    values = [results[task, item.name, arm]["kl"] for item in of]
    values = [each for each in values if len(each) == new]
    if len(values) < 2:
        return None
    mean = lambda part: sum(part) / len(part)  # noqa: E731
    differences = [mean(each[late]) - mean(each[early]) for each in values]
    low, high = bootstrap(differences, [1] * len(differences))
    return {"difference": mean(differences), "low": low, "high": high, "items": len(values)}


def markdown(found: Mapping[str, Any]) -> str:
    """Tables by position."""
    edges, lines = found["edges"], []
    for task, of in found["tasks"].items():
        header = [f"{first}-{end - 1}" for first, end in zip(edges, edges[1:], strict=False)]
        lines += ["", f"{TASKS[task]}, {of['items']} items", "", "| | " + " | ".join(header) + " |"]
        lines += ["|---|" + "---:|" * len(header)]
        shown = lambda bins: " | ".join(f"{each['mean']:.3f}" if each else "-" for each in bins)  # noqa: E731
        lines.append(f"| NLL, full depth | {shown(of['arms'][FULL]['nll'])} |")
        for skipped in SKIPPED:
            lines.append(f"| KL, without {skipped} layers | {shown(of['arms'][str(skipped)]['kl'])} |")
            lines.append(
                f"| KL, the same, begun in the middle | {shown(of['arms'][f'{skipped} late']['kl'])} |"
            )
        for skipped in SKIPPED:
            arm, late = of["arms"][str(skipped)], of["arms"][f"{skipped} late"]
            if arm["trend"]:
                lines.append(
                    f"\n{skipped} layers: KL of the last quarter less that of the second eighth "
                    f"{arm['trend']['difference']:+.3f} ({arm['trend']['low']:+.3f} to {arm['trend']['high']:+.3f}); "
                    f"just after the middle {arm['late_half']['mean']:.3f} with all skipped before, "
                    f"{late['late_half']['mean']:.3f} with nothing skipped before."
                )
    return "\n".join(lines)


def draw(found: Mapping[str, Any], path: Path) -> Path:
    """NLL at full depth above, KL of constant skips below, by position."""
    from matplotlib.figure import Figure

    from d3rt.evaluation.pictures import COLOURS, FULL_COLOUR, GRID

    edges = found["edges"]
    middles = [(first + end - 1) / 2 for first, end in zip(edges, edges[1:], strict=False)]
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(found["tasks"]), squeeze=False, sharex=True)
    for column, (task, of) in enumerate(found["tasks"].items()):
        lines = [(0, FULL, "nll", FULL_COLOUR, "-", "full depth")]
        for skipped, colour in zip(SKIPPED, COLOURS, strict=False):
            lines.append((1, str(skipped), "kl", colour, "-", f"without {skipped} layers"))
            lines.append((1, f"{skipped} late", "kl", colour, "--", f"the same, begun at {edges[-1] // 2}"))
        for row, arm, metric, colour, style, label in lines:
            there = [(at, each) for at, each in zip(middles, of["arms"][arm][metric], strict=True) if each]
            places, means = [at for at, _ in there], [each["mean"] for _, each in there]
            axis = axes[row][column]
            axis.plot(places, means, "o" + style, color=colour, markersize=3, linewidth=1.3, label=label)
            if style == "-":
                axis.fill_between(
                    places,
                    [each["low"] for _, each in there],
                    [each["high"] for _, each in there],
                    color=colour,
                    alpha=0.15,
                    linewidth=0,
                )
        axes[0][column].set_title(f"{TASKS[task]}, {of['items']} items", size=9, loc="left")
        axes[1][column].set_xlabel("index of the token", size=9)
    axes[0][0].set_ylabel("NLL at full depth", size=9)
    axes[1][0].set_ylabel("KL from full depth", size=9)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_ylim(bottom=0)
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path)
    return path
