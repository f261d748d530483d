"""Interleaved runs, and the spread of what they gave."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MIN_ROUNDS = 3


@dataclass(frozen=True)
class Spread:
    """The figures that the rounds gave, in their order."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def over(self, other: Spread) -> Spread:
        """The ratio to `other` within each round: drift of the machine that takes longer than a round cancels."""
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"median": self.median, "min": self.low, "max": self.high, "values": list(self.values)}


def interleave(
    measures: Mapping[str, Callable[[], float]],
    rounds: int,
    budget_seconds: float | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Spread]:
    """Calls every measure in turn, `rounds` times over, after one round that does not count.

    measures: name -> a function that runs once and returns its figure.
    budget_seconds: no further round starts after that time, once there are three; nor after twice that time, once
        there is one.
    progress: called with the name before each run.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least 1 round is needed.")
    values: dict[str, list[float]] = {name: [] for name in measures}
    begin = time.perf_counter()
    for done in range(-1, rounds):
        spent = time.perf_counter() - begin
        late = budget_seconds is not None and spent > budget_seconds * (1 if done >= MIN_ROUNDS else 2)
        if late and done >= 1:
            break
        for name, measure in measures.items():
            progress(name)
            value = measure()
            if done >= 0:
                values[name].append(value)
    return {name: Spread(tuple(each)) for name, each in values.items()}
