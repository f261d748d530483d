"""The page's section on what `d3rt tune` chose, as words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d3rt.tuning.report import LOST, span

Figures = Mapping[str, Any]


def section(tuned: Figures) -> dict[str, Any]:
    """What the template shows: the question, the choice, and the one figure on untouched items."""
    items, test = tuned["items"], tuned["test"]
    return {
        "policy": tuned["policy_text"],
        "question": [
            ("task", tuned["task"]),
            ("drop", f"of {tuned['metric']}: {LOST[tuned['metric']]}"),
            ("budget", f"{tuned['max_drop']:.2%}"),
            (
                "items",
                f"{items['train']} searched on, {items['validation']} chosen on, {items['test']} for one figure after "
                "the choice",
            ),
        ],
        "chosen": tuned["chosen"]["words"],
        "test": f"a drop of {span(test)}, {test['saved']:.1%} of the bytes saved, "
        f"mean depth {test['mean_depth']:.1f} of {tuned['num_layers']}",
        "test_items": test["items"],
        "verdict": f"{test['verdict'].capitalize()}.",
    }


def summary(tuned: Figures) -> str:
    """One sentence, for the top of the page."""
    test, policy = tuned["test"], tuned["policy_text"]
    return (
        f"For {tuned['task']}, with a drop of at most {tuned['max_drop']:.2%} ({tuned['metric']}), tuning chose "
        f"{'full depth' if policy == 'full' else policy}: on {test['items']} untouched items a drop of {span(test)}, "
        f"{test['saved']:.1%} of the bytes saved; {test['verdict']}."
    )
