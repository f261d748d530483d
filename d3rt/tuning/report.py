"""What tuning found, as markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOST = {
    "agreement": "tokens whose choice differs from full depth's",
    "nll": "rise of NLL, relative to full depth's",
    "exact_match": "right answers lost, points",
}


def markdown(figures: Mapping[str, Any]) -> str:
    """The report."""
    items, test = figures["items"], figures["test"]
    lines = [
        f"# Policy: `{figures['policy_text']}`",
        "",
        f"{figures['model']}, {figures['task']}; {figures['metric']} ({LOST[figures['metric']]}), at most "
        f"{figures['max_drop']:.2%}. {figures['chosen']['words']}",
        "",
        f"**Test** ({test['items']} items, read once, after the choice): drop {span(test)}, "
        f"{test['saved']:.1%} of the bytes saved, mean depth {test['mean_depth']:.1f} of {figures['num_layers']}. "
        f"{test['verdict'].capitalize()}.",
        "",
        f"Searched on {items['train']} items, chosen on {items['validation']}. These are the figures of those, which "
        "flatter what was chosen; *at most* holds for all of them together, with 95%:",
        "",
        "| policy | drop (95%) | at most | bytes saved | speed-up over full depth | front |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, drop in figures["validation"].items():
        time = figures["speedup"].get(name)
        speed = f"{time['median']:.2f}x ({time['min']:.2f}-{time['max']:.2f})" if time else "-"
        fronts = [word for word, key in (("bytes", "front"), ("time", "time_front")) if name in figures[key]]
        cells = (
            f"`{name}`",
            span(drop),
            f"{drop['bound']:.2%}",
            f"{drop['saved']:.1%}",
            speed,
            ", ".join(fronts),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def span(drop: Mapping[str, Any]) -> str:
    """A drop with its interval."""
    return f"{drop['drop']:.2%} ({drop['low']:.2%} to {drop['high']:.2%})"
