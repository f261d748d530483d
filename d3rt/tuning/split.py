"""Train, validation and test, by item and by seed; the test part is opened once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
LEAST = 4  # items of validation and of test; train has twice as many


class Sealed(Generic[Item]):
    """Items that can be read once."""

    def __init__(self, items: Sequence[Item]):
        self._items: tuple[Item, ...] | None = tuple(items)
        self.count = len(items)

    def open(self) -> tuple[Item, ...]:
        """The items; RuntimeError the second time."""
        if self._items is None:
            raise RuntimeError(
                "the test items were read already: a second figure would not be one of untouched data."
            )
        items, self._items = self._items, None
        return items


@dataclass(frozen=True)
class Split(Generic[Item]):
    """Half, a quarter and a quarter of the items."""

    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: Sealed[Item]

    @classmethod
    def of(cls, items: Sequence[Item], seed: int) -> Split[Item]:
        """Equal items count once, so that none is in two parts. ValueError for too few."""
        different = list(dict.fromkeys(items))
        if len(different) < 4 * LEAST:
            raise ValueError(
                f"{len(different)} different items: train, validation and test need at least {4 * LEAST} together."
            )
        random.Random(seed).shuffle(different)
        part = len(different) // 4
        return cls(tuple(different[2 * part :]), tuple(different[:part]), Sealed(different[part : 2 * part]))
