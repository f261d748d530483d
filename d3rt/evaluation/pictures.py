"""Pictures of a report: quality against bytes, and quality by position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = ("#2f6db3", "#d9722e", "#3f8f5b", "#8a5bb0", "#b03a55", "#5b6570")
FULL_COLOUR, GRID = "#8a939c", "#dfe3e8"
# metric -> axis; by task the one that a picture shows
SHOWN = {
    "gsm8k": ("flexible", "GSM8K, flexible match"),
    "bbh": ("exact_match", "BBH, exact match"),
    "ppl": ("text", "NLL of the text"),
    "agreement": ("agree", "same token as full depth"),
}
BY_POSITION = {
    ("ppl", "text"): ("difference", "NLL to full depth,\ntext"),
    ("ppl", "own"): ("difference", "NLL to full depth,\nown text"),
    ("agreement", "agree"): ("mean", "same token"),
    ("agreement", "kl"): ("mean", "KL from full depth"),
}


def draw(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes quality.png and positions.png; returns those that there is something to draw of."""
    colours = {arm: COLOURS[at % len(COLOURS)] for at, arm in enumerate(figures["arms"][1:])}
    colours[figures["arms"][0]] = FULL_COLOUR
    return [
        path
        for path in (_quality(figures, colours, folder), _positions(figures, colours, folder))
        if path is not None
    ]


def _axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.grid(color=GRID, linewidth=0.6)
    return figure, axes


def _legend(figure: Any, axis: Any, count: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(count, 2), fontsize=8, frameon=False)


def _quality(figures: Mapping[str, Any], colours: Mapping[str, str], folder: Path) -> Path | None:
    """One panel a task: the measure, with its interval, over the bytes that a token read."""
    tasks = {name: task for name, task in figures["tasks"].items() if name in SHOWN}
    figure, axes = _axes(1, len(tasks), (1.2 + 2.6 * len(tasks), 3.4))
    for axis, (name, task) in zip(axes.flat, tasks.items(), strict=True):
        metric, title = SHOWN[name]
        for arm, figure_of in task["metrics"][metric].items():
            moved = task["cost"][arm]["bytes_per_token"]
            if moved is None:
                continue
            mean, low, high = (figure_of[each] for each in ("mean", "low", "high"))
            error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
            axis.errorbar(
                *([moved / 1e6], [mean], error),
                fmt="o",
                color=colours[arm],
                capsize=3,
                label="full depth" if arm == "full" else arm,
            )
        axis.set_title(f"{title}\n{task['items']} items", size=9, loc="left")
        axis.set_xlabel("MB read per token", size=9)
        axis.margins(x=0.25)
    _legend(figure, axes.flat[0], len(colours))
    path = folder / "quality.png"
    figure.savefig(path)
    return path


def _positions(figures: Mapping[str, Any], colours: Mapping[str, str], folder: Path) -> Path | None:
    """One panel a measure: bins of positions, with the interval over texts of the difference to full depth."""
    panels = [
        (figures["tasks"][task]["positions"][metric], shown, title)
        for (task, metric), (shown, title) in BY_POSITION.items()
        if task in figures["tasks"]
    ]
    if not panels:
        return None
    figure, axes = _axes(len(panels), 1, (8, 0.6 + 1.75 * len(panels)))
    for axis, (found, shown, title) in zip(axes.flat, panels, strict=True):
        edges = found["edges"]
        middles = [(first + end - 1) / 2 for first, end in zip(edges, edges[1:], strict=False)]
        for arm, bins in found["arms"].items():
            if arm == "full":
                continue
            there = [(at, each) for at, each in zip(middles, bins, strict=True) if each]
            places = [at for at, _ in there]
            values = [each[shown] for _, each in there]
            shift = [each[shown] - each["difference"] for _, each in there]
            low = [each["low"] + by for (_, each), by in zip(there, shift, strict=True)]
            high = [each["high"] + by for (_, each), by in zip(there, shift, strict=True)]
            axis.fill_between(places, low, high, color=colours[arm], alpha=0.15, linewidth=0)
            axis.plot(places, values, "o-", color=colours[arm], markersize=3, linewidth=1.4, label=arm)
        if shown == "difference":
            axis.axhline(0, color=FULL_COLOUR, linewidth=1)
        axis.set_ylabel(title, size=9)
    axes.flat[-1].set_xlabel("index of the generated token", size=9)
    _legend(figure, axes.flat[0], len(colours))
    path = folder / "positions.png"
    figure.savefig(path)
    return path
