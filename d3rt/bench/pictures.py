"""The figures of `d3rt bench` as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d3rt.evaluation.pictures import COLOURS, FULL_COLOUR, GRID

Figures = Mapping[str, Any]


def draw(found: Figures, path: Path) -> Path:
    """Decode speed of every run, and the time of a step by depth beside what its bytes promise, into a PNG or SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, steps = found["runs"], found["depths"]
    figure = Figure(
        figsize=(11 if steps else 6.5, 1.6 + 0.42 * max(6, len(rows))), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if steps else 1, squeeze=False)[0]
    engines = {"d3rt": COLOURS[0], "transformers": FULL_COLOUR, "llama.cpp": COLOURS[3]}
    names = [
        f"{run['engine']}, {run['weights']}" + (f"\n{run['policy']}" if run["policy"] else "") for run in rows
    ]
    places = list(range(len(rows)))[::-1]
    medians = [run["decode"]["median"] for run in rows]
    spread = [
        [run["decode"]["median"] - run["decode"]["min"] for run in rows],
        [run["decode"]["max"] - run["decode"]["median"] for run in rows],
    ]
    colours = [COLOURS[1] if run["policy"] not in (None, "full") else engines[run["engine"]] for run in rows]
    axes[0].barh(places, medians, xerr=spread, color=colours, height=0.65, capsize=2, ecolor="#333")
    axes[0].set_yticks(places, names)
    for place, run in zip(places, rows, strict=True):
        axes[0].annotate(
            f"{run['decode']['median']:.0f}",
            *((run["decode"]["max"], place), (4, 0)),
            textcoords="offset points",
            va="center",
            size=8,
        )
    axes[0].margins(x=0.12)
    axes[0].set_xlabel("decode tokens/s", size=9)
    for width, colour in zip(dict.fromkeys(each["weights"] for each in steps), COLOURS, strict=False):
        of = [each for each in steps if each["weights"] == width]
        depths = [each["depth"] for each in of]
        ms = [each["milliseconds"] for each in of]
        error = [[each["median"] - each["min"] for each in ms], [each["max"] - each["median"] for each in ms]]
        median = [each["median"] for each in ms]
        axes[1].errorbar(depths, median, error, fmt="o-", color=colour, capsize=2, markersize=4, label=width)
        promised = [ms[0]["median"] * each["bytes"] / of[0]["bytes"] for each in of]
        axes[1].plot(depths, promised, "--", color=colour, linewidth=1, label=f"{width}, by bytes")
    if steps:
        axes[1].set_xlabel("retained layers", size=9)
        axes[1].set_ylabel("ms a step", size=9)
        axes[1].set_ylim(bottom=0)
        axes[1].set_ylim(top=1.25 * axes[1].get_ylim()[1])  # room for the legend
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1].legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x" if axis is axes[0] else "both", color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    of = found["settings"]
    title = f"{of['model']}, {of['machine']['cpu']}, {of['threads']} threads, {of['prompt_tokens']} + "
    figure.suptitle(f"{title}{of['new_tokens']} tokens, {of['rounds']} rounds", size=9, x=0.01, ha="left")
    figure.savefig(path)
    return path
