"""Pictures: which layers ran at each token, and what that did to the time. PNG, SVG or PDF, by the path's ending.

matplotlib is loaded when a picture is drawn, with the Agg canvas, so that neither a display nor pyplot's global
state is needed. The numbers come from a Schedule or from GenerationStats; nothing is computed here but medians.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3rt.plan import parse_ranges
from d3rt.policies import ExitSchedule, Schedule

if TYPE_CHECKING:
    from d3rt.result import GenerationStats

RUN, SKIP, EDGE = "#2f6db3", "#e9edf2", "#5b6570"
ATTENTION_ONLY, MLP_ONLY = "#7fb2dd", "#b9a5d6"
BASELINE, ACCENT = "#8a939c", "#d9722e"
# Steps on either side that the time curve is smoothed over (a median): one descheduled step is a spike of 10x.
SMOOTHING = 3


def plot_schedule(schedule: Schedule, path: str | os.PathLike[str]) -> Path:
    """Draws which layers each step of a schedule retains, and how many; returns the path written.

    Step 0 is drawn as the prefill runs it. No torch is loaded.
    """
    sets = (schedule.prompt_set, *schedule.sets[1:])
    figure, (layers, depth) = _figure(2, heights=(2.4, 1.1))
    _draw_layers(layers, [(one.attention, one.mlp) for one in sets], schedule.num_layers)
    _draw_depth(depth, [one.depth for one in sets], schedule.num_layers)
    count = len(schedule.distinct)
    kind = f"{count} distinct layer set{'' if count == 1 else 's'}, {'' if schedule.nested else 'not '}nested"
    if isinstance(schedule, ExitSchedule):
        kind = "at most; where a step ends is decided while it runs"
    figure.suptitle(
        f"{schedule.policy}: {kind}",
        x=0.02,
        ha="left",
        size=11,
    )
    return _save(figure, path)


def plot_run(
    stats: GenerationStats,
    path: str | os.PathLike[str],
    baseline: GenerationStats | None = None,
    title: str = "",
) -> Path:
    """Draws which layers each token of a generation ran, how many, and the time it took; returns the path written.

    baseline: a run of as many steps, at full depth; its times are drawn beside, and what the bytes alone promise.
    """
    figure, (layers, depth, seconds) = _figure(3, heights=(2.4, 1.1, 1.7))
    _draw_layers(layers, [_masks(text) for text in stats.layers], stats.num_layers)
    _draw_depth(depth, stats.depths, stats.num_layers)
    _draw_times(seconds, stats, baseline)
    figure.suptitle(title or str(stats), x=0.02, ha="left", size=11)
    return _save(figure, path)


def plot_times(step_seconds: Mapping[str, Sequence[float]], path: str | os.PathLike[str], title: str) -> Path:
    """Draws the time of each decode step, one line a name; returns the path written. Step 1 is the first."""
    figure, (axis,) = _figure(1, heights=(3.0,))
    for (name, seconds), colour in zip(step_seconds.items(), (BASELINE, ACCENT, RUN), strict=True):
        axis.plot(
            range(1, len(seconds) + 1),
            [1e3 * each for each in seconds],
            color=colour,
            linewidth=1.6,
            label=name,
        )
    axis.set_ylabel("ms per token", size=9)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color="#dfe3e8", linewidth=0.6)
    axis.legend(fontsize=8, frameon=False)
    figure.suptitle(title, x=0.02, ha="left", size=9)
    return _save(figure, path)


def _figure(count: int, heights: Sequence[float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.35 * sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=EDGE)
    for axis in axes[1:]:
        axis.grid(axis="y", color="#dfe3e8", linewidth=0.6)
    axes[-1].set_xlabel("index of the generated token (0 comes from the prefill)", size=9)
    return figure, axes


def _draw_layers(axis: Any, masks: Sequence[tuple[int, int]], num_layers: int) -> None:
    """masks: the attention and the MLP mask of each step."""
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    grid = np.array(
        [[(a >> layer & 1) + 2 * (m >> layer & 1) for a, m in masks] for layer in range(num_layers)],
        dtype=np.uint8,
    )
    colours = [SKIP, ATTENTION_ONLY, MLP_ONLY, RUN]
    axis.imshow(
        grid,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=3,
        extent=(-0.5, len(masks) - 0.5, -0.5, num_layers - 0.5),
    )
    axis.set_ylabel("layer", size=9)
    axis.set_title("layers that run (0 is the bottom one)", size=9, loc="left", color=EDGE)
    names = ("skipped", "attention only", "MLP only", "runs")
    shown = [Patch(color=colours[value], label=names[value]) for value in sorted(set(grid.flat))]
    axis.legend(
        handles=shown,
        ncols=len(shown),
        fontsize=8,
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1, 1.01),
        borderpad=0,
    )


def _draw_depth(axis: Any, depths: Sequence[float], num_layers: int) -> None:
    axis.step(range(len(depths)), depths, where="mid", color=RUN, linewidth=1.6)
    mean = sum(depths) / len(depths)
    axis.axhline(mean, color=ACCENT, linewidth=1, linestyle="--")
    axis.set_title(f"depth, mean {mean:.2f} of {num_layers} layers", size=9, loc="left", color=EDGE)
    axis.set_ylabel("layers", size=9)
    axis.set_ylim(0, num_layers * 1.08)


def _draw_times(axis: Any, stats: GenerationStats, baseline: GenerationStats | None) -> None:
    """Milliseconds of each decode step; step 0 is sampling only and left out."""
    steps = range(1, stats.steps)
    axis.set_ylabel("ms per token", size=9)
    axis.set_title(
        f"time of a step (median of {2 * SMOOTHING + 1} neighbours)", size=9, loc="left", color=EDGE
    )
    ran = _smooth([1e3 * each for each in stats.step_seconds[1:]])
    top = max(ran, default=1.0)
    if baseline is not None:
        full = _smooth([1e3 * each for each in baseline.step_seconds[1 : stats.steps]])
        top = max(top, max(full, default=0.0))
        axis.plot(range(1, 1 + len(full)), full, color=BASELINE, linewidth=1.4, label="full depth")
        moved = zip(stats.weight_bytes[1:], stats.kv_bytes[1:], strict=True)
        before = zip(baseline.weight_bytes[1:], baseline.kv_bytes[1:], strict=True)
        shares = [(w + k) / (fw + fk) for (w, k), (fw, fk) in zip(moved, before, strict=False)]
        promised = [time * share for time, share in zip(full, shares, strict=False)]
        axis.plot(
            range(1, 1 + len(promised)),
            promised,
            color=ACCENT,
            linewidth=1,
            linestyle="--",
            label="full depth x bytes",
        )
    axis.plot(steps, ran, color=RUN, linewidth=1.6, label="this run")
    axis.set_ylim(0, top * 1.15)
    if baseline is not None:
        axis.legend(fontsize=8, ncols=3, frameon=False, loc="lower left")


def _smooth(values: Sequence[float]) -> list[float]:
    return [
        statistics.median(values[max(0, at - SMOOTHING) : at + SMOOTHING + 1]) for at in range(len(values))
    ]


def _masks(text: str) -> tuple[int, int]:
    """Attention and MLP mask of a layer set as GenerationStats writes it: "0-15,29" or "attention 0-3; mlp 0-5"."""
    attention, separator, mlp = text.removeprefix("attention ").partition("; mlp ")
    low = _mask(attention)
    return low, _mask(mlp) if separator else low


def _mask(ranges: str) -> int:
    return sum(1 << layer for layer in parse_ranges(ranges))


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
