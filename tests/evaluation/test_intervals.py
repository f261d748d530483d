"""Intervals and tests against tables, exact enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from d3rt.evaluation.intervals import bootstrap, mcnemar, sign_flip, upper_bound, wilson


def test_wilson_has_published_values():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(right, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert wilson(1, 29) == (pytest.approx(0.0061, abs=1e-4), pytest.approx(0.1718, abs=1e-4))


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (5, 5), (0, 6), (9, 2), (40, 21)])
def test_mcnemar_is_the_two_sided_binomial_test(worse, better):
    count = worse + better
    chances = [math.comb(count, each) / 2**count for each in range(count + 1)]
    expected = sum(p for p in chances if p <= chances[worse] * (1 + 1e-9))
    assert mcnemar(worse, better) == pytest.approx(expected)
    assert mcnemar(worse, better) == mcnemar(better, worse)


def test_six_items_that_differ_are_the_fewest_that_can_matter():
    assert mcnemar(5, 0) > 0.05 > mcnemar(6, 0)
    assert sign_flip([1.0] * 5) > 0.05 > sign_flip([1.0] * 6)


def test_sign_flip_is_exact_for_few():
    values = [0.3, -0.1, 0.25, 0.0, 0.7]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=5)
    ]
    expected = sum(each >= abs(sum(values)) - 1e-12 for each in sums) / 32
    assert sign_flip(values) == pytest.approx(expected)
    many = np.random.default_rng(1).normal(0.5, 1, 40)
    t = many.mean() / (many.std(ddof=1) / 40**0.5)
    assert sign_flip(many) == pytest.approx(math.erfc(t / 2**0.5), abs=0.005)  # the normal limit
    assert sign_flip([0.0] * 9) == 1


def test_bootstrap_covers_the_mean_of_unequal_texts():
    draw = np.random.default_rng(3)
    covered = 0
    for _ in range(60):
        counts = draw.integers(5, 50, 40)
        sums = [draw.normal(2.0 + draw.normal(0, 0.3), 1, count).sum() for count in counts]
        low, high = bootstrap(sums, counts)
        covered += low <= 2.0 <= high
    assert covered >= 50  # 57 expected; fewer than 50 has a chance below 1e-3
    assert bootstrap([3.0, 6.0], [1, 2]) == (3.0, 3.0)
    assert bootstrap([1, 0, 1, 1], [1] * 4) == bootstrap([1, 0, 1, 1], [1] * 4)


def test_an_upper_bound_of_symmetric_values_is_the_normal_one():
    values = [-1.0, 1.0] * 20
    deviation = (40 / 39) ** 0.5
    assert upper_bound(values, [1] * 40, 0.05) == pytest.approx(1.6449 * deviation / 40**0.5, rel=1e-4)
    assert upper_bound([2.0, 4.0, 6.0], [1, 2, 3], 0.05) == 2, "equal ratios leave no doubt"


def test_an_upper_bound_of_skewed_values_is_passed_about_as_seldom_as_it_says():
    draw = np.random.default_rng(5)
    missed = {}
    for items in (40, 200):
        samples = draw.exponential(1.0, (2000, items))
        bounds = [upper_bound(sample, [1] * items, 0.05) for sample in samples]
        normal = [sample.mean() + 1.645 * sample.std(ddof=1) / items**0.5 for sample in samples]
        missed[items] = [np.mean([bound < 1 for bound in each]) for each in (bounds, normal)]
    assert abs(missed[200][0] - 0.05) < 0.01  # two standard errors of 2000 samples
    assert missed[40][0] < 0.08 < 0.1 < missed[40][1], "without the correction, twice as often as it says"
