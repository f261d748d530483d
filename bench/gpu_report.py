"""What `make gpu-check` and `make gpu-bench` leave behind: one JSON file, and the same as one page of Markdown.

Plain dictionaries in, text out; nothing here asks a machine, so that a report is rendered the same everywhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOW_TO_SEND = "Please open an issue with both files of this report attached."


def write(report: dict[str, Any], text: str, folder: Path, name: str) -> tuple[Path, Path]:
    """Writes name.json and name.md into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    data.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    return data, page


def file_name(kind: str, slug: str, now: float | None = None) -> str:
    """ "check-nvidia-a100-sxm4-80gb-20260102T030405Z" """
    return f"{kind}-{slug}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; the first column is left, the others are right."""
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def device_lines(report: dict[str, Any]) -> list[str]:
    device = report["device"]
    lines = [
        f"{device['name']}, sm_{device['arch']}, {device['multiprocessors']} multiprocessors, "
        f"{device['memory'] / 2**30:.1f} GiB."
    ]
    for what, entries in (("nvidia-smi", device["state"]), ("versions", device["versions"])):
        lines.append(f"{what}: " + "; ".join(f"{name} {value}" for name, value in entries.items()) + ".")
    if report.get("rehearsal"):
        lines.insert(0, "**A rehearsal on a CPU: no figure below is a GPU's.**")
    return lines


def spread(figures: dict[str, Any], digits: int = 1) -> str:
    """Median (lowest-highest) of what Spread.as_dict gave."""
    return f"{figures['median']:.{digits}f} ({figures['min']:.{digits}f}-{figures['max']:.{digits}f})"


def render_check(report: dict[str, Any]) -> str:
    """The page of `make gpu-check`: the verdict first."""
    counts = report["tests"]
    parts = [
        f"# d3rt on {report['device']['name']}: {report['verdict']}",
        *device_lines(report),
        f"Tests: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped, in "
        f"{counts['seconds']:.0f} s.",
    ]
    if report["failures"]:
        rows = [
            (each["test"], each["message"].splitlines()[0][:160].replace("|", "/"))
            for each in report["failures"]
        ]
        parts.append(table(("failed", "why"), rows))
    if report["skipped"]:
        rows = [(each["test"], each["message"].replace("|", "/")) for each in report["skipped"]]
        parts.append(table(("skipped", "why"), rows))
    if report["notes"]:
        parts.append(
            "\n".join(f"- {each['test']}: {each['name']}: {each['value']}" for each in report["notes"])
        )
    parts.append(table(("compute-sanitizer", "result"), list(report["sanitizer"].items())))
    return "\n\n".join([*parts, HOW_TO_SEND]) + "\n"


def render_bench(report: dict[str, Any]) -> str:
    """The page of `make gpu-bench`: for each model its engines and its steps by depth, measured beside modelled."""
    parts = [
        f"# d3rt timed on {report['device']['name']}",
        *device_lines(report),
        f"Prompt {report['settings']['prompt']}, {report['settings']['tokens']} new tokens, greedy, batch 1; medians "
        f"of {report['settings']['rounds']} interleaved rounds, with the lowest and the highest. Bandwidth: "
        f"{report['settings']['bandwidth_probe']}, in the same rounds.",
    ]
    missing = [(name, why) for name, why in report["peers"].items() if why]
    if missing:
        parts.append("Left out: " + "; ".join(f"{name} ({why})" for name, why in missing) + ".")
    for model in report["models"]:
        parts.append(f"## {model['name']}")
        if model.get("left_out"):
            parts.append(f"Left out: {model['left_out']}.")
            continue
        bandwidth = model["bandwidth"]
        parts.append(f"{model['widths']}; bandwidth {spread(bandwidth, 0)} GB/s.")
        parts.append(
            table(("engine", "tokens/s", "d3rt at full depth is"), [_engine(row) for row in model["engines"]])
        )
        for name, why in model.get("failed", {}).items():
            parts.append(f"{name} failed: {why}")
        head = (
            "step",
            "layers",
            "us",
            "us, modelled",
            "GB/s",
            "of the bandwidth",
            "over full depth",
            "by bytes",
            "graphs",
        )
        parts.append(table(head, [_step(row) for row in model["steps"]]))
        if model["modelled_as"] is None:
            parts.append("No modelled figures: this GPU is not in d3rt/gpus.py.")
        else:
            parts.append(
                f"The column *modelled* is modelled, not measured: `d3rt plan --gpu {model['modelled_as']}`."
            )
    return "\n\n".join([*parts, HOW_TO_SEND]) + "\n"


def _engine(row: dict[str, Any]) -> tuple[str, ...]:
    ratio = row.get("d3rt_is")
    return row["name"], spread(row["tokens_per_second"]), "-" if ratio is None else f"{ratio['median']:.2f}x"


def _step(row: dict[str, Any]) -> tuple[str, ...]:
    modelled = row["modelled_us"]
    return (
        row["name"],
        f"{row['layers']:.1f}",
        spread(row["us"]),
        "-" if modelled is None else f"{modelled:.1f}",
        f"{row['gb_per_second']:.0f}",
        f"{row['share_of_bandwidth']:.0%}",
        f"{row['over_full']['median']:.2f}x",
        f"{row['expected']:.2f}x",
        f"{row['graphs']}, {row['graph_bytes'] / 1e6:.1f} MB",
    )
