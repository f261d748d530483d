"""What becomes of each row of a batch at each layer, when every row has a plan of its own.

Rows that stand side by side and do the same are done together, as a range. So where rows are sorted by depth and their
sets are nested, each layer runs one range, and its weights are read once; and where all rows have one plan, all is one
range. The order of the rows is up to whoever makes the plans; what is done with a range is the decoder's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from d3rt.plan import Action, Plan


@dataclass(frozen=True)
class Settle:
    """Before the hidden state of these rows changes: `fill` the K,V of layers from it, and keep it as that of `gap`."""

    rows: slice
    fill: tuple[int, ...]
    gap: int | None


@dataclass(frozen=True)
class LayerRows:
    """One layer: what is settled before it, and the ranges of rows whose attention and whose MLP it runs."""

    settle: tuple[Settle, ...]
    attention: tuple[slice, ...]
    mlp: tuple[slice, ...]


def by_layer(plans: Sequence[Plan]) -> tuple[LayerRows, ...]:
    """plans[row], for all layers; one entry more at the end, for what is settled after the last layer."""
    waiting: list[tuple[tuple[int, ...], int | None]] = [((), None)] * len(plans)
    gaps = [plan.gaps for plan in plans]
    layers = []
    for layer in range(plans[0].num_layers):
        attention = [plan.attention[layer] for plan in plans]
        mlp = [plan.mlp[layer] for plan in plans]
        for row, action in enumerate(attention):
            fill, gap = waiting[row]
            if action is Action.FILL:
                waiting[row] = (*fill, layer), gap
            elif action is Action.KEEP:
                waiting[row] = fill, gaps[row][layer]
        changes = [Action.RUN in pair for pair in zip(attention, mlp, strict=True)]
        layers.append(
            LayerRows(
                _settle(waiting, changes),
                ranges(attention, lambda action: action is Action.RUN),
                ranges(mlp, lambda action: action is Action.RUN),
            )
        )
    return (*layers, LayerRows(_settle(waiting, [True] * len(plans)), (), ()))


def ranges(values: Sequence[Any], wanted: Callable[[Any], bool]) -> tuple[slice, ...]:
    """The longest ranges of indices at which `wanted` holds."""
    found, at = [], 0
    for holds, run in groupby(values, wanted):
        length = sum(1 for _ in run)
        if holds:
            found.append(slice(at, at + length))
        at += length
    return tuple(found)


def _settle(waiting: list, changes: Sequence[bool]) -> tuple[Settle, ...]:
    """What waits of the rows that change, range by range; it waits no longer."""
    found = []
    rows = [each if change else ((), None) for each, change in zip(waiting, changes, strict=True)]
    for what in dict.fromkeys(rows):
        if what != ((), None):
            found += [Settle(part, *what) for part in ranges(rows, lambda each, what=what: each == what)]
    for row, change in enumerate(changes):
        if change:
            waiting[row] = (), None
    return tuple(sorted(found, key=lambda each: each.rows.start))
