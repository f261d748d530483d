"""What tuning found, as markdown and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOST = {
    "agreement": "tokens whose choice differs from full depth's",
    "nll": "rise of NLL, relative to full depth's",
    "exact_match": "right answers lost, points",
}


def markdown(figures: Mapping[str, Any]) -> str:
    """The report."""
    items, test = figures["items"], figures["test"]
    none = "" if figures["policy_text"] != "full" else " No candidate is within the budget on validation."
    lines = [
        f"# Policy: `{figures['policy_text']}`",
        "",
        f"{figures['model']}, {figures['task']}; {figures['metric']} ({LOST[figures['metric']]}), at most "
        f"{figures['max_drop']:.2%}.{none}",
        "",
        f"**Test** ({test['items']} items, read once, after the choice): drop {_span(test)}, "
        f"{test['saved']:.1%} of the bytes saved, mean depth {test['mean_depth']:.1f} of {figures['num_layers']}. "
        f"{test['verdict'].capitalize()}.",
        "",
        f"Searched on {items['train']} items, chosen on {items['validation']} (these figures flatter what was chosen):",
        "",
        "| policy | drop (95%) | bytes saved | speed-up over full depth | front |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, drop in figures["validation"].items():
        time = figures["speedup"].get(name)
        speed = f"{time['median']:.2f}x ({time['min']:.2f}-{time['max']:.2f})" if time else "-"
        fronts = [word for word, key in (("bytes", "front"), ("time", "time_front")) if name in figures[key]]
        lines.append(f"| `{name}` | {_span(drop)} | {drop['saved']:.1%} | {speed} | {', '.join(fronts)} |")
    return "\n".join(lines) + "\n"


def _span(drop: Mapping[str, Any]) -> str:
    return f"{drop['drop']:.2%} ({drop['low']:.2%} to {drop['high']:.2%})"


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """The drop on validation over the bytes saved, and over the speed-up where it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    speeds = {name: each["median"] for name, each in figures["speedup"].items()}
    saved = {name: 100 * each["saved"] for name, each in figures["validation"].items()}
    panels = [(saved, "front", "bytes saved, %")] + (
        [(speeds, "time_front", "speed-up, measured")] if speeds else []
    )
    figure = Figure(figsize=(4.4 * len(panels), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (values, front, title) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True
    ):
        drops = {name: 100 * figures["validation"][name]["drop"] for name in values}
        axis.plot(
            [values[n] for n in values], [drops[n] for n in values], "o", color="#8a939c", label="finalists"
        )
        best = sorted(figures[front], key=values.__getitem__)
        axis.plot([values[n] for n in best], [drops[n] for n in best], "o-", color="#2f6db3", label="front")
        name = figures["policy_text"]
        axis.plot(
            [values[name]],
            [drops[name]],
            "s",
            color="#d9722e",
            markersize=9,
            fillstyle="none",
            label="chosen",
        )
        axis.axhline(100 * figures["max_drop"], color="#b03a55", linewidth=1, linestyle="--", label="budget")
        axis.set_xlabel(title)
        axis.set_ylabel(f"drop of {figures['metric']}, %")
        axis.grid(color="#dfe3e8", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path)
