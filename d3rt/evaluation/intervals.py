"""Intervals and tests. All are of 95%, paired where two runs saw the same items, and the same every time.

wilson       a share of right answers
mcnemar      two runs right or wrong on the same items: exact, from the items on which they differ
bootstrap    a mean over tokens, by resampling whole texts: the tokens of one text are not independent
sign_flip    is a paired difference of means zero? a permutation test over texts
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
_CHUNK = 500  # resamples at a time, which bounds the memory


def wilson(right: float, count: int) -> tuple[float, float]:
    """Interval of a share `right / count`."""
    if count == 0:
        return 0.0, 1.0
    z, p = 1.959963984540054, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(worse: int, better: int) -> float:
    """p of "as many items got worse as got better", two-sided, exact."""
    count = worse + better
    tail = sum(math.comb(count, each) for each in range(min(worse, better) + 1))
    return min(1.0, 2 * tail / 2**count)


def bootstrap(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Interval of sum(sums) / sum(counts), by percentiles over resampled texts: one text has one of each."""
    values, weights = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    draw = np.random.default_rng(0)
    means = []
    for _ in range(0, RESAMPLES, _CHUNK):
        picked = draw.integers(0, len(values), (_CHUNK, len(values)))
        means.append(values[picked].sum(1) / weights[picked].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def sign_flip(differences: Sequence[float]) -> float:
    """p of "the differences are as likely the other way round", two-sided; exact up to 13 texts, else 10,000 draws."""
    values = np.asarray(differences, dtype=float)
    seen = abs(values.sum()) * (1 - 1e-12)  # its own mirror image counts
    if len(values) <= 13:
        signs = 1 - 2 * (np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1)
        return float((np.abs(signs @ values) >= seen).mean())
    draw = np.random.default_rng(0)
    extreme = 0
    for _ in range(0, RESAMPLES, _CHUNK):
        signs = 1 - 2 * draw.integers(0, 2, (_CHUNK, len(values)))
        extreme += int((np.abs(signs @ values) >= seen).sum())
    return (extreme + 1) / (RESAMPLES + 1)
