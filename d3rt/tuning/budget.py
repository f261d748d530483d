"""What may be lost, and whether that can be told from so many items.

agreement     share of tokens whose choice is not full depth's, along full depth's own greedy path
nll           rise of the mean NLL of given tokens, relative to full depth's: 1% of 3.5 nats is 0.035 nats
exact_match   share of right answers lost, in points: from 40% to 39% is a drop of 1%
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from d3rt.evaluation.intervals import bootstrap

METRICS = ("agreement", "nll", "exact_match")
LEAST_ITEMS = 8  # below, resampled items do not bound anything


@dataclass(frozen=True)
class Score:
    """Of one item: loss summed over `count` tokens (or one answer), and the bytes of its decode steps."""

    loss: float
    count: int
    bytes: int
    depth: float  # summed over `steps`
    steps: int


@dataclass(frozen=True)
class Drop:
    """A drop with its interval of 95% over items, and the share of full depth's bytes that was saved."""

    drop: float
    low: float
    high: float
    saved: float
    mean_depth: float
    items: int


@dataclass(frozen=True)
class Budget:
    """The metric, and the largest drop in it, as a share (0.01 is 1%)."""

    metric: str
    max_drop: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r}: there are {', '.join(METRICS)}.")
        if not (math.isfinite(self.max_drop) and 0 <= self.max_drop < 1):
            raise ValueError(f"max_drop={self.max_drop}: it is a share in [0, 1); 0.01 is 1%.")

    @classmethod
    def of(cls, metric: str, text: str) -> Budget:
        """With a drop as it is written: "1%"."""
        try:
            value = float(text.removesuffix("%")) if text.endswith("%") else math.nan
        except ValueError:
            value = math.nan
        if not 0 <= value < 100:
            raise ValueError(f"--max-drop {text!r}: it is a percentage from 0% to below 100%, such as 1%.")
        return cls(metric, value / 100)

    def drop(self, full: Sequence[Score], arm: Sequence[Score]) -> Drop:
        """Of an arm against full depth on the same items, in the same order."""
        differences = [b.loss - a.loss for a, b in zip(full, arm, strict=True)]
        scale = [a.loss if self.metric == "nll" else a.count for a in full]
        drop = sum(differences) / sum(scale)
        low, high = bootstrap(differences, scale)
        if not any(differences):  # nothing differed, which resampling takes for certainty
            high = 1 - 0.025 ** (1 / len(full))  # exact, for a share of items of which none was seen
            low = -high if self.metric != "agreement" else 0.0
        before, after = (sum(score.bytes for score in scores) for scores in (full, arm))
        depth = sum(score.depth for score in arm) / sum(score.steps for score in arm)
        return Drop(drop, low, high, 1 - after / before if before else 0.0, depth, len(full))

    def verdict(self, found: Drop) -> str:
        """Whether the interval shows that the drop is within the budget, or beyond it, or neither."""
        if found.items < LEAST_ITEMS:
            return f"cannot tell: {found.items} items are fewer than {LEAST_ITEMS}"
        if found.high <= self.max_drop:
            return "within the budget"
        if found.low > self.max_drop:
            return "beyond the budget"
        return f"cannot tell: the interval of {found.items} items holds the budget"
