"""Successive halving, and the front of what cannot be bettered in both respects."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Arm = TypeVar("Arm")


def halve(
    arms: Sequence[Arm], ranks: Sequence[Callable[[Arm, int], Any]], items: int, keep: int, first: int = 4
) -> list[Arm]:
    """The `keep` best arms: all are tried on `first` items, the better half on twice as many, and so on.

    ranks: each (arm, number of items) -> what sorts, the lowest first; the first items are those of the rung before.
    The best arms are the first by each rank, then the second by each, and so on. Equal ranks keep order."""
    arms, count = list(arms), min(first, items)
    while True:
        orders = [sorted(arms, key=lambda arm, rank=rank: rank(arm, count)) for rank in ranks]
        arms = list(dict.fromkeys(arm for place in zip(*orders, strict=True) for arm in place))
        if count >= items or len(arms) <= keep:
            return arms[:keep]
        arms, count = arms[: max(keep, math.ceil(len(arms) / 2))], min(2 * count, items)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) that no other has at most the cost and at least the gain of, one of them
    strictly; by cost. Of equal points all stay."""
    order = sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1]))
    kept: list[int] = []
    for at in order:
        if not kept or points[at][1] > points[kept[-1]][1] or points[at] == points[kept[-1]]:
            kept.append(at)
    return kept
