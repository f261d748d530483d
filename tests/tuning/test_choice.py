"""The choice on validation: by bounds, by means, or none; and how often a choice by bounds is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from d3rt.tuning import Budget
from d3rt.tuning.budget import Drop, Score
from d3rt.tuning.choice import choose

ONE_PERCENT = Budget("agreement", 0.01)
FULL = Drop(drop=0, low=0, high=0, bound=0, saved=0, mean_depth=6, items=40)


def drop(saved, mean, bound, items=40):
    return Drop(drop=mean, low=0, high=bound, bound=bound, saved=saved, mean_depth=5, items=items)


def test_the_most_bytes_of_those_whose_bound_is_within_the_budget():
    found = {
        "full": FULL,
        "bold": drop(0.3, 0.009, 0.02),
        "fit": drop(0.2, 0.004, 0.0098),
        "shy": drop(0.1, 0, 0.001),
    }
    choice = choose(found, "full", ONE_PERCENT)
    assert (choice.arm, choice.by) == ("fit", "bound")
    assert (
        "validation bounds the drop by 0.98%, with 95% certainty for all 3 candidates together"
        in choice.words
    )


def test_by_its_mean_where_no_bound_fits_and_the_words_say_so():
    found = {
        "full": FULL,
        "bold": drop(0.3, 0.011, 0.03),
        "fit": drop(0.2, 0.009, 0.02),
        "shy": drop(0.1, 0.002, 0.011),
    }
    choice = choose(found, "full", ONE_PERCENT)
    assert (choice.arm, choice.by) == ("fit", "mean")
    assert "Chosen by its mean: 40 items bound no candidate by the budget." in choice.words
    assert "The best mean of 3 flatters: expect a larger drop" in choice.words


def test_few_items_bound_nothing():
    found = {"full": FULL, "fit": drop(0.2, 0.0, 0.001, items=7)}
    choice = choose(found, "full", ONE_PERCENT)
    assert (choice.arm, choice.by) == ("fit", "mean") and "7 items are fewer than 8" in choice.words


@pytest.mark.parametrize("candidate", [drop(0.2, 0.011, 0.02), drop(0.0, 0.0, 0.0), drop(-0.1, 0.0, 0.0)])
def test_full_depth_where_nothing_fits_or_what_fits_saves_nothing(candidate):
    choice = choose({"full": FULL, "candidate": candidate}, "full", ONE_PERCENT)
    assert (choice.arm, choice.by, choice.words) == (
        "full", "none", "No candidate is within the budget on validation.",
    )  # fmt: skip


def simulated(mean, draw, candidates=12, items=40, tokens=96):
    """Drops on validation of candidates whose true drop is `mean`, most of it in a few items."""
    full = [Score(0, tokens, 100, 6 * tokens, tokens)] * items
    found = {0: FULL}
    for arm in range(1, candidates + 1):
        lost = draw.binomial(tokens, draw.beta(0.5, 0.5 / mean - 0.5, items))
        scores = [Score(int(each), tokens, 100 - arm, 5 * tokens, tokens) for each in lost]
        found[arm] = ONE_PERCENT.drop(full, scores, candidates)
    return found


def test_a_choice_by_bounds_seldom_takes_what_is_beyond_the_budget_and_one_by_means_mostly_does():
    draw, by_bound, by_mean = np.random.default_rng(0), 0, 0
    for _ in range(100):
        found = simulated(0.012, draw)
        by_bound += choose(found, 0, ONE_PERCENT).by == "bound"
        by_mean += any(each.drop <= 0.01 for arm, each in found.items() if arm)
    assert by_bound <= 10  # 5 are allowed; more than 10 has a chance of 1%
    assert by_mean >= 90


def test_what_is_far_within_the_budget_is_chosen_by_its_bound():
    draw = np.random.default_rng(1)
    assert sum(choose(simulated(0.003, draw), 0, ONE_PERCENT).by == "bound" for _ in range(20)) >= 19


@pytest.mark.parametrize("metric", ["agreement", "exact_match"])
def test_one_more_loss_never_lowers_the_bound(metric):
    count = 96 if metric == "agreement" else 1
    full = [Score(0, count, 100, 6, 1)] * 40
    budget, bounds = Budget(metric, 0.01), []
    for lost in range(12):
        arm = [replace(score, loss=int(at < lost)) for at, score in enumerate(full)]
        bounds.append(budget.drop(full, arm).bound)
    assert bounds == sorted(bounds) and bounds[0] > 0
    if metric == "exact_match":  # 0 of 40: exactly 1 - 0.05 ** (1 / 40) is 7.2%
        assert 0.072 < bounds[0] < 0.10


@pytest.mark.parametrize("metric", ["agreement", "nll", "exact_match"])
def test_an_interval_holds_the_mean_and_is_narrow_where_all_items_are_alike(metric):
    draw = np.random.default_rng(2)
    count = 1 if metric == "exact_match" else 96
    full = [Score(300.0 if metric == "nll" else 0, count, 100, 6, 1)] * 40
    for lost in (draw.binomial(count, 0.6, 40), draw.binomial(count, 0.02, 40)):
        arm = [replace(score, loss=score.loss + int(each)) for score, each in zip(full, lost, strict=True)]
        found = Budget(metric, 0.01).drop(full, arm)
        assert found.low <= found.drop <= found.bound <= found.high
        if metric != "exact_match":
            assert found.high - found.low < 0.06


def test_the_bound_grows_with_the_candidates_that_share_its_certainty():
    full, arm = [Score(0, 1, 10, 6, 1)] * 40, [Score(at % 4 == 0, 1, 9, 5, 1) for at in range(40)]
    budget = Budget("exact_match", 0.01)
    bounds = [budget.drop(full, arm, among).bound for among in (1, 2, 15)]
    assert 0.25 < bounds[0] < bounds[1] < bounds[2] < 1
