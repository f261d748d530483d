"""What may be lost, and whether that can be told from so many items.

agreement     share of tokens whose choice is not full depth's, along full depth's own greedy path
nll           rise of the mean NLL of given tokens, relative to full depth's: 1% of 3.5 nats is 0.035 nats
exact_match   share of right answers lost, in points: from 40% to 39% is a drop of 1%

Both ends of an interval are taken over one more item than there is, like the most extreme one at that end, and by a
token or an answer at least: what no item has shown yet is not impossible. Without it, 40 items with no answer lost
would bound the drop by 0%; a policy that loses 5% of the answers shows that one time in eight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from d3rt.evaluation.intervals import upper_bound

METRICS = ("agreement", "nll", "exact_match")
LEAST_ITEMS = 8  # fewer do not bound anything
_CHANCE = 0.05
# what one more item gains and loses at least: a whole token or answer, which nats are not made of; along full depth's
# own tokens there is none to gain
_EXTREMES = {"agreement": (-math.inf, 1.0), "nll": (-math.inf, -math.inf), "exact_match": (1.0, 1.0)}


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
    bound: (
        float  # the drop is at most this, one-sided, with 95% for all arms together among which one is chosen
    )
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

    def lost(self, full: Sequence[Score], arm: Sequence[Score]) -> float:
        """The drop of an arm against full depth on the same items, in the same order."""
        differences, scale = self._pairs(full, arm)
        return sum(differences) / sum(scale)

    def drop(self, full: Sequence[Score], arm: Sequence[Score], among: int = 1) -> Drop:
        """`lost` with its interval, and what was saved. among: so many arms have bounds that shall hold together."""
        differences, scale = self._pairs(full, arm)
        depth = sum(score.depth for score in arm) / sum(score.steps for score in arm)
        gain, loss = _EXTREMES[self.metric]
        low = -_bound([-each for each in differences], scale, gain, _CHANCE / 2)
        return Drop(
            drop=sum(differences) / sum(scale),
            low=max(0.0, low) if self.metric == "agreement" else low,
            high=_bound(differences, scale, loss, _CHANCE / 2),
            bound=_bound(differences, scale, loss, _CHANCE / among),
            saved=saved(full, arm),
            mean_depth=depth,
            items=len(full),
        )

    def _pairs(self, full: Sequence[Score], arm: Sequence[Score]) -> tuple[list[float], list[float]]:
        """By item, what was lost, and what it is a share of."""
        differences = [b.loss - a.loss for a, b in zip(full, arm, strict=True)]
        return differences, [a.loss if self.metric == "nll" else a.count for a in full]

    def verdict(self, found: Drop) -> str:
        """Whether the interval shows that the drop is within the budget, or beyond it, or neither."""
        if found.items < LEAST_ITEMS:
            return f"cannot tell: {found.items} items are fewer than {LEAST_ITEMS}"
        if found.high <= self.max_drop:
            return "within the budget"
        if found.low > self.max_drop:
            return "beyond the budget"
        return f"cannot tell: the interval of {found.items} items holds the budget"


def saved(full: Sequence[Score], arm: Sequence[Score]) -> float:
    """The share of full depth's bytes that the arm did not read."""
    before, after = (sum(score.bytes for score in scores) for scores in (full, arm))
    return 1 - after / before if before else 0.0


def _bound(losses: Sequence[float], scale: Sequence[float], least: float, chance: float) -> float:
    """The upper bound over these items and one more: the worst once again, which loses `least` at least."""
    worst, of = max(zip(losses, scale, strict=True))
    return upper_bound([*losses, max(worst, least)], [*scale, of], chance)
