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
