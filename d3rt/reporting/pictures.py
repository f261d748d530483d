"""The page's pictures, as SVG texts that stand in the HTML."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from d3rt.errors import D3rtError
from d3rt.evaluation.pictures import COLOURS, FULL_COLOUR, GRID
from d3rt.policies import parse
from d3rt.tuning import pictures as tuning

Figures = Mapping[str, Any]
FULL = "full"


def _figure(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    """The picture, without the XML head and without anything that is fetched."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "d3rt"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def _colours(policies: Sequence[str]) -> dict[str, str]:
    others = [policy for policy in policies if policy != FULL]
    return {FULL: FULL_COLOUR} | {each: COLOURS[at % len(COLOURS)] for at, each in enumerate(others)}


def _errors(of: Sequence[Mapping[str, float]], mean: str, low: str, high: str) -> list[list[float]]:
    return [
        [max(0.0, each[mean] - each[low]) for each in of],
        [max(0.0, each[high] - each[mean]) for each in of],
    ]


def trade_off(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Quality over measured speed-up, a panel a task; bars are intervals and ranges."""
    tasks = list(dict.fromkeys(each["task"] for row in rows for each in row["quality"]))
    if not tasks:
        return None
    figure, axes = _figure(len(tasks), (1.0 + 3.1 * len(tasks), 3.4))
    colours = _colours([row["policy"] for row in rows])
    for axis, task in zip(axes, tasks, strict=True):
        for row in rows:
            quality = next((each for each in row["quality"] if each["task"] == task), None)
            speed = next((each for each in row["speeds"]), None)
            if quality is None or speed is None:
                continue
            gain = speed["speedup"] or {"median": 1.0, "min": 1.0, "max": 1.0}
            axis.errorbar(
                [gain["median"]],
                [quality["mean"]],
                yerr=_errors([quality], "mean", "low", "high"),
                xerr=_errors([gain], "median", "min", "max"),
                fmt="o",
                color=colours[row["policy"]],
                capsize=3,
                label="full depth" if row["policy"] == FULL else row["policy"],
            )
            axis.set_title(quality["title"], size=9, loc="left")
        axis.set_xlabel("times as fast as full depth", size=9)
        axis.margins(x=0.2)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return _svg(figure)


def front(tuned: Figures) -> str:
    """The candidates of `d3rt tune` on validation."""
    return _svg(tuning.front(tuned))


def depth(policies: Sequence[str], num_layers: int, tokens: int) -> str | None:
    """Retained layers by position; policies that decide while they run are left out."""
    figure, (axis,) = _figure(1, (7.5, 2.8))
    drawn = 0
    for policy, colour in _colours(policies).items():
        try:
            depths = parse(policy, num_layers=num_layers).schedule(num_layers, tokens).depths
        except D3rtError:
            continue
        axis.step(range(tokens), depths, where="post", color=colour, linewidth=1.6, label=policy)
        drawn += 1
    if not drawn:
        return None
    axis.set_ylim(0, num_layers * 1.05)
    axis.set_xlabel("index of the generated token", size=9)
    axis.set_ylabel("retained layers", size=9)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    return _svg(figure)


def positions(evaluated: Figures | None) -> str | None:
    """KL from full depth by position, along full depth's own text."""
    task = evaluated["tasks"].get("agreement") if evaluated else None
    if task is None:
        return None
    found = task["positions"]["kl"]
    middles = [(a + b - 1) / 2 for a, b in zip(found["edges"], found["edges"][1:], strict=False)]
    figure, (axis,) = _figure(1, (7.5, 2.8))
    for arm, colour in _colours(list(found["arms"])).items():
        if arm == FULL:
            continue
        there = [(at, each) for at, each in zip(middles, found["arms"][arm], strict=True) if each]
        means = [each["mean"] for _, each in there]
        low = [each["mean"] - each["difference"] + each["low"] for _, each in there]
        high = [each["mean"] - each["difference"] + each["high"] for _, each in there]
        places = [at for at, _ in there]
        axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(places, means, "o-", color=colour, markersize=3, label=arm)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("index of the generated token", size=9)
    axis.set_ylabel("KL from full depth", size=9)
    axis.legend(fontsize=8, frameon=False)
    return _svg(figure)


def steps(timed: Figures) -> str:
    """Time of a recorded step by depth, and what its bytes promise."""
    from matplotlib.ticker import MaxNLocator

    figure, (axis,) = _figure(1, (7.5, 2.8))
    for width, colour in zip(
        dict.fromkeys(each["weights"] for each in timed["depths"]), COLOURS, strict=False
    ):
        of = [each for each in timed["depths"] if each["weights"] == width]
        ms, depths = [each["milliseconds"] for each in of], [each["depth"] for each in of]
        median = [each["median"] for each in ms]
        axis.errorbar(
            depths,
            median,
            _errors(ms, "median", "min", "max"),
            fmt="o-",
            color=colour,
            capsize=2,
            label=width,
        )
        promised = [median[0] * each["bytes"] / of[0]["bytes"] for each in of]
        axis.plot(depths, promised, "--", color=colour, linewidth=1, label=f"{width}, by bytes")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("retained layers", size=9)
    axis.set_ylabel("ms a step", size=9)
    axis.legend(fontsize=8, frameon=False, loc="lower right", ncols=2)
    return _svg(figure)


def parts(timed: Figures) -> str:
    """The ops of a step, each kind replayed alone, as stacked bars; the whole step as a line beside them."""
    pairs = list(dict.fromkeys((part["weights"], part["depth"]) for part in timed["parts"]))
    ops = list(dict.fromkeys(part["op"] for part in timed["parts"]))
    figure, (axis,) = _figure(1, (7.5, 0.9 + 0.75 * len(pairs)))
    names = [f"{weights}, {depth:g} layers" for weights, depth in pairs]
    left = [0.0] * len(pairs)
    for op, colour in zip(ops, (*COLOURS, "#c9a227", "#7fb7be"), strict=False):
        widths = [
            next(
                (
                    part["milliseconds"]["median"]
                    for part in timed["parts"]
                    if (part["weights"], part["depth"], part["op"]) == (*pair, op)
                ),
                0.0,
            )
            for pair in pairs
        ]
        axis.barh(names, widths, left=left, height=0.5, color=colour, label=op)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for at, pair in enumerate(pairs):
        whole = next(
            (
                step["milliseconds"]["median"]
                for step in timed["depths"]
                if (step["weights"], step["depth"]) == pair
            ),
            None,
        )
        if whole is not None:
            label = "the whole step" if at == 0 else None
            axis.plot([whole, whole], [at - 0.36, at + 0.36], color="#222", linewidth=2, label=label)
    axis.invert_yaxis()
    axis.set_xlabel("ms", size=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return _svg(figure)
