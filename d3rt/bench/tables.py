"""The figures of `d3rt bench` as tables, for a terminal or as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]


def _spread(of: Figures | None, digits: int = 1, unit: str = "") -> str:
    if of is None:
        return "-"
    return f"{of['median']:.{digits}f}{unit} ({of['min']:.{digits}f}-{of['max']:.{digits}f})"


def _share(of: Figures | None) -> str:
    return "-" if of is None else f"{of['median']:.0%} ({of['min']:.0%}-{of['max']:.0%})"


def run_table(found: Figures) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every engine, width and policy."""
    new, prompt = found["settings"]["new_tokens"], found["settings"]["prompt_tokens"]
    header = ["engine", "weights", "policy", f"decode {new} tok/s", f"prefill {prompt} tok/s", "mean depth"]
    header += ["MB a token", "of bandwidth", "expected", "measured", "over transformers", "memory MB"]
    rows = []
    for run in found["runs"]:
        size, depth, peak = run["bytes_per_token"], run["mean_depth"], run["peak_bytes"]
        theirs = run["transformers"]
        over = _spread(run["over_transformers"], 2, "x")
        if theirs and theirs != run["weights"]:
            over += f" {theirs}"
        rows.append(
            [
                *(run["engine"], run["weights"], run["policy"] or "-"),
                *(_spread(run["decode"]), _spread(run["prefill"], 0)),
                *(f"{depth:.1f}" if depth else "-", f"{size / 1e6:.1f}" if size else "-"),
                _share(run["bandwidth_share"]),
                f"{run['expected_speedup']:.2f}x" if run["expected_speedup"] else "-",
                *(_spread(run["measured_speedup"], 2, "x"), over),
                f"{peak / 1e6:.0f}" if peak else "-",
            ]
        )
    return header, rows


def depth_table(found: Figures) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one recorded step by depth."""
    full = {}
    rows = []
    for step in found["depths"]:
        ms = step["milliseconds"]
        first = full.setdefault(step["weights"], (ms["median"], step["bytes"]))
        rows.append(
            [
                *(step["weights"], f"{step['depth']:g}", _spread(ms, 2), f"{step['bytes'] / 1e6:.1f}"),
                *(_share(step["bandwidth_share"]), f"{first[1] / step['bytes']:.2f}x"),
                f"{first[0] / ms['median']:.2f}x",
            ]
        )
    return ["weights", "depth", "ms a step", "MB", "of bandwidth", "expected", "measured"], rows


def part_table(found: Figures) -> tuple[list[str], list[list[str]]]:
    """Header and rows: where the time of a step goes, by depth."""
    rows = []
    for weights, depth in dict.fromkeys((part["weights"], part["depth"]) for part in found["parts"]):
        of = [part for part in found["parts"] if (part["weights"], part["depth"]) == (weights, depth)]
        whole = next(
            step["milliseconds"]["median"]
            for step in found["depths"]
            if (step["weights"], step["depth"]) == (weights, depth)
        )
        for part in of:
            ms = part["milliseconds"]
            rows.append([weights, f"{depth:g}", part["op"], _spread(ms, 2), f"{ms['median'] / whole:.0%}"])
        alone = sum(part["milliseconds"]["median"] for part in of)
        rows.append([weights, f"{depth:g}", "all, each kind alone", f"{alone:.2f}", f"{alone / whole:.0%}"])
    return ["weights", "depth", "ops of a step", "ms", "of the step"], rows


def about(found: Figures) -> list[str]:
    """What the figures were taken on, and what is missing."""
    of = found["settings"]
    there = of["machine"]
    lines = [
        f"{of['model']}, {of['num_layers']} layers; greedy, one sequence; {of['runs']}, {of['threads']} threads; "
        f"median (lowest-highest) of {of['rounds']} interleaved rounds.",
        f"{there['cpu']}, {there['cores']} cores, {there['system']}; "
        + ", ".join(f"{name} {version}" for name, version in of["versions"].items())
        + ".",
    ]
    if found["bandwidth"]:
        lines.append(
            f"Bandwidth in the same rounds ({of['bandwidth_probe']}): {_spread(found['bandwidth'], 0)} GB/s. "
            "Expected is by bytes read, measured within each round, both over full depth of the same weights."
        )
    lines.append(
        f"Memory is what a runtime holds at most, its K,V cache and prefill included; the process held "
        f"{found['process_peak_bytes'] / 1e6:.0f} MB with everyone's weights in it."
    )
    return lines + list(found["notes"])


def markdown(found: Figures) -> str:
    """All of it as markdown."""
    parts = ["\n".join(_lines(*run_table(found)))]
    if found["depths"]:
        parts.append("\n".join(_lines(*depth_table(found))))
    if found["parts"]:
        parts.append("\n".join(_lines(*part_table(found))))
    return "\n\n".join([*parts, *about(found)]) + "\n"


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---" if at < 3 else "---:" for at in range(len(header))]
    return [f"| {' | '.join(line)} |" for line in ([*header], rule, *rows)]


def plot(found: Figures, path: Any) -> Any:
    """Decode speed of every run, and the time of a step by depth beside what its bytes promise, into a PNG or SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from d3rt.evaluation.pictures import COLOURS, FULL_COLOUR, GRID

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
