"""Intervals and tests. All are of 95%, paired where two runs saw the same items, and the same every time.

wilson       a share of right answers
mcnemar      two runs right or wrong on the same items: exact, from the items on which they differ
bootstrap    a mean over tokens, by resampling whole texts: the tokens of one text are not independent
upper_bound  the same mean's upper end alone, at any chance of error, where texts are few and losses skewed
sign_flip    is a paired difference of means zero? a permutation test over texts
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

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


def upper_bound(sums: Sequence[float], counts: Sequence[float], chance: float) -> float:
    """What sum(sums) / sum(counts) exceeds with `chance` at most, over all texts like these.

    By the normal distribution, with Johnson's correction for skewness (JASA 73, 1978): a few texts lose much, and
    resampling a few dozen of them has too short a tail. At least 2 texts."""
    values, weights = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    ratio = values.sum() / weights.sum()
    rest = (values - ratio * weights) / weights.mean()
    deviation, root = rest.std(ddof=1), math.sqrt(len(rest))
    if deviation == 0:
        return float(ratio)
    z = NormalDist().inv_cdf(1 - chance)
    skewness = (rest**3).mean() / deviation**3
    return float(ratio + deviation / root * (z + skewness * (2 * z * z + 1) / (6 * root)))


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
