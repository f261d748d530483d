"""What tuning found as a picture: for its folder, and for a report's page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d3rt.evaluation.pictures import COLOURS, FULL_COLOUR, GRID


def front(figures: Mapping[str, Any]) -> Any:
    """A matplotlib figure: the drop on validation, with its interval, over the bytes saved, and over the speed-up where
    it was measured."""
    from matplotlib.figure import Figure

    speeds = {name: each["median"] for name, each in figures["speedup"].items()}
    saved = {name: 100 * each["saved"] for name, each in figures["validation"].items()}
    panels = [(saved, "front", "bytes saved, %")]
    if speeds:
        panels.append((speeds, "time_front", "times as fast as full depth, measured"))
    figure = Figure(figsize=(4.4 * len(panels), 3.8), dpi=120, layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        _panel(axis, figures, *panel)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """`front` as a PNG, SVG or PDF, by the path's ending."""
    front(figures).savefig(path)


def _panel(axis: Any, figures: Mapping[str, Any], values: Mapping[str, float], best: str, title: str) -> None:
    """values: x by policy; best: which of the figures' fronts."""
    ends = ("drop", "low", "high")
    drops = {name: {end: 100 * figures["validation"][name][end] for end in ends} for name in values}
    error = [
        [max(0.0, each["drop"] - each["low"]) for each in drops.values()],
        [max(0.0, each["high"] - each["drop"]) for each in drops.values()],
    ]
    means = {name: each["drop"] for name, each in drops.items()}
    axis.errorbar(
        *(list(values.values()), list(means.values()), error),
        fmt="o",
        color=FULL_COLOUR,
        elinewidth=0.8,
        capsize=2,
        markersize=4,
        label="candidates",
    )
    line = sorted(figures[best], key=values.__getitem__)
    axis.plot(
        [values[name] for name in line],
        [means[name] for name in line],
        "o-",
        color=COLOURS[0],
        markersize=4,
        label="front",
    )
    chosen = figures["policy_text"]
    axis.plot(
        [values[chosen]],
        [means[chosen]],
        "s",
        color=COLOURS[1],
        markersize=10,
        fillstyle="none",
        markeredgewidth=1.6,
        label="chosen",
    )
    axis.axhline(100 * figures["max_drop"], color=COLOURS[4], linewidth=1, linestyle="--", label="budget")
    axis.set_xlabel(title, size=9)
    axis.set_ylabel(f"drop of {figures['metric']} on validation, %", size=9)
    axis.tick_params(labelsize=8)
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
