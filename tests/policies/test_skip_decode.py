"""SkipDecode's rule: the budget of each step, which layers it buys, and what is refused."""

import pytest

from d3rt.errors import PolicyError
from d3rt.policies import FullDepth, SkipDecode

VECTORS = [
    (32, 22, 11, {0: "0,11-31", 1: "0,11-31", 10: "0,12-31", 50: "0,14-31", 100: "0,17-31", 199: "0,22-31"}),
    (24, 16, 8, {0: "0,9-23", 1: "0,9-23", 10: "0,9-23", 50: "0,11-23", 100: "0,13-23", 199: "0,17-23"}),
    (32, 8, 5, {0: "0,25-31", 50: "0,26-31", 100: "0,27-31", 199: "0,28-31"}),
]


@pytest.mark.parametrize("num_layers, most, least, layers_by_step", VECTORS)
def test_each_step_retains_the_layers_of_the_golden_vectors(num_layers, most, least, layers_by_step):
    policy = SkipDecode(most, least, 200)
    for step, layers in layers_by_step.items():
        assert str(policy.layer_set(step, num_layers)) == layers, step


@pytest.mark.parametrize(
    "most, least, budgets",
    [
        (22, 11, {0: 22, 1: 22, 10: 21, 50: 19, 100: 16, 199: 11, 200: 11, 10_000: 11}),
        (16, 8, {0: 16, 1: 16, 10: 16, 50: 14, 100: 12, 199: 8}),
        (8, 5, {0: 8, 50: 7, 100: 6, 199: 5}),
    ],
)
def test_the_budget_falls_linearly_and_stays_at_the_minimum(most, least, budgets):
    policy = SkipDecode(most, least, 200)
    assert {step: policy.budget(step) for step in budgets} == budgets


@pytest.mark.parametrize("num_layers, most, least, mean_depth", [(32, 22, 11, 16.5), (24, 16, 8, 12.0)])
def test_the_mean_depth_is_halfway_between_the_two_ends(num_layers, most, least, mean_depth):
    schedule = SkipDecode(most, least, 200).schedule(num_layers, 200)
    assert round(schedule.mean_depth, 2) == mean_depth


def test_a_half_is_rounded_up():
    # Three steps from 4 to 3: 4, 3.5, 3.
    assert [SkipDecode(4, 3, 3).budget(step) for step in range(3)] == [4, 4, 3]


def test_the_budget_counts_the_warm_up_layers():
    layer_set = SkipDecode(10, 6, 50, warmup=2).layer_set(0, 32)
    assert layer_set.depth == 10
    assert str(layer_set) == "0-1,24-31"


def test_no_warm_up_keeps_top_layers_only():
    assert str(SkipDecode(10, 6, 50, warmup=0).layer_set(49, 32)) == "26-31"


def test_a_budget_of_every_layer_is_full_depth():
    assert SkipDecode(32, 32, 200).schedule(32, 300).sets == FullDepth().schedule(32, 300).sets


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_schedule_is_nested(warmup):
    assert SkipDecode(30, 6, 77, warmup=warmup).schedule(32, 200).nested


def test_the_prompt_runs_all_layers_although_the_rule_starts_at_its_maximum():
    schedule = SkipDecode(22, 11, 200).schedule(32, 200)
    assert schedule.depths[0] == 22
    assert schedule.prompt_set.is_full
    assert schedule.plans()[0].layer_set.is_full


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((11, 22, 200), r"max_layers=11, min_layers=22"),
        ((22, 1, 200), r"min_layers=1, warmup=1.*at least 2"),
        ((22, 0, 200, 0), r"min_layers=0, warmup=0.*at least 1"),
        ((22, 11, 1), r"length=1.*must be >= 2"),
        ((22, 11, 200, -1), r"warmup=-1"),
        ((22.5, 11, 200), r"max_layers=22.5.*must be an integer"),
    ],
)
def test_a_parameter_outside_its_range_is_refused(arguments, message):
    with pytest.raises(PolicyError, match=message):
        SkipDecode(*arguments)


def test_a_budget_above_the_models_layers_is_refused():
    with pytest.raises(PolicyError, match=r"max_layers=22\) on 16 layers.*at most 16"):
        SkipDecode(22, 11, 200).schedule(16, 10)
