"""D3's rule: vectors and averages of the paper's formula, where the window stands, and what is refused."""

import math
from fractions import Fraction

import pytest

from d3rt.errors import PolicyError
from d3rt.plan import parse_ranges
from d3rt.policies import D3, FullDepth
from d3rt.policies.d3 import exponential_depth

# L = 32, start = .5, alpha = .99: step, floor(L * alpha**i), and what each reading retains.
READINGS_AT_99 = [
    (0, 32, "0-31", "0-31", "0-31"),
    (1, 31, "0-15,17-31", "0-15,17-31", "0-15,17-31"),
    (10, 28, "0-15,20-31", "0-15,20-31", "0-15,20-31"),
    (50, 19, "0-15,29-31", "0-15,29-31", "0-15,29-31"),
    (68, 16, "0-15", "0-15,31", "0-14,31"),
    (100, 11, "0-15", "0-15,31", "0-9,31"),
    (200, 4, "0-15", "0-15,31", "0-2,31"),
    (345, 0, "0-15", "0-15,31", "0,31"),
    (5000, 0, "0-15", "0-15,31", "0,31"),
]


@pytest.mark.parametrize("step, floor, no_tail, tail_of_1, slide", READINGS_AT_99)
def test_each_reading_retains_the_layers_of_the_golden_vectors(step, floor, no_tail, tail_of_1, slide):
    assert exponential_depth(32, 0.99, step) == floor
    assert str(D3(0.99, 0.5, tail=0).layer_set(step, 32)) == no_tail
    assert str(D3(0.99, 0.5, tail=1).layer_set(step, 32)) == tail_of_1
    assert str(D3(0.99, 0.5, variant="slide").layer_set(step, 32)) == slide


@pytest.mark.parametrize(
    "alpha, step, depth, layers",
    [
        (0.999, 1, 31, "0-15,17-31"),
        (0.999, 10, 31, "0-15,17-31"),
        (0.999, 50, 30, "0-15,18-31"),
        (0.999, 100, 28, "0-15,20-31"),
        (0.999, 200, 26, "0-15,22-31"),
        (0.999, 500, 19, "0-15,29-31"),
        (0.9999, 1, 31, "0-15,17-31"),
        (0.9999, 10, 31, "0-15,17-31"),
        (0.9999, 50, 31, "0-15,17-31"),
        (0.9999, 100, 31, "0-15,17-31"),
        (0.9999, 200, 31, "0-15,17-31"),
        (0.9999, 500, 30, "0-15,18-31"),
        (0.9999, 1000, 28, "0-15,20-31"),
    ],
)
def test_slow_decay_retains_the_layers_of_the_golden_vectors(alpha, step, depth, layers):
    layer_set = D3(alpha, 0.5).layer_set(step, 32)
    assert (layer_set.depth, str(layer_set)) == (depth, layers)


def test_without_a_tail_the_depth_stops_at_start():
    assert exponential_depth(32, 0.999, 1000) == 11
    assert D3(0.999, 0.5, tail=0).layer_set(1000, 32).depth == 16


def test_slow_decay_drops_its_second_layer_only_at_step_318():
    depths = D3(0.9999, 0.5).schedule(32, 320).depths
    assert depths[0] == 32
    assert set(depths[1:318]) == {31}
    assert depths[318] == 30


@pytest.mark.parametrize(
    "task, num_layers, max_length, mean_depth",
    [
        ("gsm8k", 32, 1024, 29.904),
        ("gsm8k", 40, 1024, 37.512),
        ("gsm8k", 80, 1024, 75.534),
        ("bbh", 32, 200, 19.165),
        ("bbh", 40, 200, 20.335),
        ("bbh", 80, 200, 48.430),
    ],
)
def test_the_papers_settings_give_the_average_depths_it_prints(task, num_layers, max_length, mean_depth):
    schedule = D3.paper(task, num_layers).schedule(num_layers, max_length)
    assert round(schedule.mean_depth, 3) == mean_depth


def test_counting_steps_from_one_would_not_give_the_printed_averages():
    depths = D3.paper("bbh", 32).schedule(32, 201).depths
    assert round(sum(depths[1:]) / 200, 2) == 19.10


@pytest.mark.parametrize(
    "task, num_layers, policy",
    [
        ("gsm8k", 32, D3(0.9999, 0.8, tail=0)),
        ("gsm8k", 40, D3(0.9999, 0.7, tail=0)),
        ("gsm8k", 80, D3(0.9999, 0.8, tail=0)),
        ("bbh", 32, D3(0.9, 0.6, tail=0)),
        ("bbh", 40, D3(0.9, 0.5, tail=0)),
        ("bbh", 80, D3(0.9, 0.6, tail=0)),
        ("bbh", 30, D3(0.9, 0.6, tail=0)),
        ("gsm8k", 28, D3(0.9999, 0.8, tail=0)),
    ],
)
def test_the_papers_settings_by_task_and_model_size(task, num_layers, policy):
    assert D3.paper(task, num_layers) == policy


def test_an_unknown_task_of_the_paper_is_refused():
    with pytest.raises(PolicyError, match="'mmlu'.*'gsm8k', 'bbh'"):
        D3.paper("mmlu", 32)


@pytest.mark.parametrize("num_layers, distinct", [(32, 17), (40, 21), (80, 41)])
@pytest.mark.parametrize("alpha", [0.99, 0.995, 0.999])
def test_1024_steps_down_to_half_the_layers_have_few_distinct_sets(alpha, num_layers, distinct):
    assert len(D3(alpha, 0.5, tail=0).schedule(num_layers, 1024).distinct) == distinct


@pytest.mark.parametrize("num_layers, distinct", [(32, 5), (40, 5), (80, 9)])
def test_1024_steps_of_slow_decay_have_very_few_distinct_sets(num_layers, distinct):
    assert len(D3(0.9999, 0.5, tail=0).schedule(num_layers, 1024).distinct) == distinct


LENGTHS = (32, 64, 128, 256, 512, 1024)
# num_layers, alpha, then by length: ceiling of the formula with a minimum depth of 1, of the policy with L/2.
CEILINGS = [
    (32, 0.99, (1.185, 1.379, 1.820, 2.901, 5.285, 9.072), (1.185, 1.379, 1.633, 1.798, 1.893, 1.945)),
    (32, 0.999, (1.031, 1.049, 1.083, 1.154, 1.303, 1.639), (1.031, 1.049, 1.083, 1.154, 1.303, 1.564)),
    (32, 0.9999, (1.031, 1.032, 1.032, 1.032, 1.045, 1.070), (1.031, 1.032, 1.032, 1.032, 1.045, 1.070)),
    (40, 0.995, (1.093, 1.182, 1.374, 1.810, 2.871, 5.294), (1.093, 1.182, 1.374, 1.629, 1.795, 1.892)),
    (80, 0.99, (1.172, 1.361, 1.788, 2.820, 5.274, 9.895), (1.172, 1.361, 1.619, 1.789, 1.889, 1.943)),
    (80, 0.9999, (1.012, 1.012, 1.013, 1.019, 1.032, 1.059), (1.012, 1.012, 1.013, 1.019, 1.032, 1.059)),
]


@pytest.mark.parametrize("num_layers, alpha, of_formula, of_policy", CEILINGS)
def test_the_ceiling_of_the_speed_up_is_that_of_the_table(num_layers, alpha, of_formula, of_policy):
    for length, formula, policy in zip(LENGTHS, of_formula, of_policy, strict=True):
        layers_run = sum(max(1, exponential_depth(num_layers, alpha, step)) for step in range(length))
        mean_depth = D3(alpha, 0.5, tail=0).schedule(num_layers, length).mean_depth
        assert round(num_layers * length / layers_run, 3) == formula
        assert round(num_layers / mean_depth, 3) == policy


# In float32 these come out as 22 and 60: the products are 21.999996 and 61.0004.
@pytest.mark.parametrize("num_layers, alpha, step, depth", [(30, 0.999, 310, 21), (64, 0.9999, 480, 61)])
def test_the_depth_is_right_where_float32_is_off_by_one(num_layers, alpha, step, depth):
    assert exponential_depth(num_layers, alpha, step) == depth
    assert math.floor(num_layers * Fraction(str(alpha)) ** step) == depth


@pytest.mark.parametrize("num_layers", [1, 5, 24, 30, 32, 64, 80])
@pytest.mark.parametrize("alpha", ["0.8", "0.9", "0.99", "0.995", "0.999", "0.9999", "1"])
def test_the_depth_equals_exact_arithmetic(num_layers, alpha):
    exact, share = Fraction(num_layers), Fraction(alpha)
    for step in range(400):
        assert exponential_depth(num_layers, float(alpha), step) == math.floor(exact), step
        exact *= share


@pytest.mark.parametrize(
    "start, num_layers, first", [(0.7, 90, 63), (0.58, 50, 29), (0.6, 80, 48), (0.1, 30, 3), (0.5, 5, 2)]
)
def test_the_window_starts_at_the_layer_that_the_share_means(start, num_layers, first):
    assert D3(0.9, start).layer_set(1, num_layers).layers[:first] == tuple(range(first))
    assert first not in D3(0.9, start).layer_set(1, num_layers).layers


def test_alpha_of_one_is_full_depth():
    assert D3(1, 0.5).schedule(32, 100).sets == FullDepth().schedule(32, 100).sets


def test_any_alpha_below_one_skips_a_layer_from_step_one_on():
    assert D3(0.999999, 0.5).layer_set(1, 32).depth == 31


def test_tiny_alpha_without_a_tail_is_an_exit_at_start():
    schedule = D3(1e-9, 0.5, tail=0).schedule(32, 5)
    assert [str(layer_set) for layer_set in schedule.sets] == ["0-31", "0-15", "0-15", "0-15", "0-15"]


def test_the_tail_always_runs():
    for layer_set in D3(0.9, 0.5, tail=3).schedule(32, 200).sets:
        assert layer_set.layers[-3:] == (29, 30, 31)


def test_sliding_keeps_head_and_tail_and_reaches_every_depth_above_them():
    policy = D3(0.99, 0.5, tail=2, variant="slide", head=3)
    for step, layer_set in enumerate(policy.schedule(32, 600).sets):
        assert layer_set.depth == max(5, exponential_depth(32, 0.99, step))
        assert layer_set.layers[:3] == (0, 1, 2)
        assert layer_set.layers[-2:] == (30, 31)


@pytest.mark.parametrize("start", [0.04, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("options", [{"tail": 0}, {"tail": 1}, {"tail": 2}, {"variant": "slide", "head": 2}])
def test_every_reading_is_nested_and_skips_one_window(start, options):
    schedule = D3(0.95, start, **options).schedule(32, 300)
    assert schedule.nested
    for layer_set in schedule.sets:
        skipped = sorted(set(range(32)) - set(layer_set.layers))
        assert not skipped or skipped == list(range(skipped[0], skipped[-1] + 1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(alpha=1.2, start=0.5),
            r"D3\(alpha=1.2\): alpha is the share of layers .* must be in \(0, 1\]\.",
        ),
        (dict(alpha=0, start=0.5), r"D3\(alpha=0\)"),
        (dict(alpha=float("nan"), start=0.5), r"D3\(alpha=nan\): alpha must be a finite number"),
        (dict(alpha="0.9", start=0.5), r"D3\(alpha='0.9'\): alpha must be a number"),
        (dict(alpha=True, start=0.5), r"D3\(alpha=True\): alpha must be a number"),
        (dict(alpha=0.9, start=1), r"D3\(start=1\): .* must be in \[0, 1\)"),
        (dict(alpha=0.9, start=-0.1), r"D3\(start=-0.1\)"),
        (dict(alpha=0.9, start=0.5, tail=-1), r"D3\(tail=-1\): .* must be >= 0"),
        (dict(alpha=0.9, start=0.5, tail=1.0), r"D3\(tail=1.0\): tail must be an integer"),
        (dict(alpha=0.9, start=0.5, variant="slice"), r"D3\(variant='slice'\): .* 'window', 'slide'"),
        (dict(alpha=0.9, start=0.5, head=2), r"D3\(head=2, variant='window'\): .* variant='slide'"),
    ],
)
def test_a_parameter_outside_its_range_is_refused_with_the_rule(arguments, message):
    with pytest.raises(PolicyError, match=message):
        D3(**arguments)


@pytest.mark.parametrize(
    "policy, num_layers, message",
    [
        (D3(0.9, 0, tail=0), 32, "no layer that always runs.*tail of at least 1"),
        (D3(0.9, 0.2, tail=0), 4, "no layer that always runs"),
        (D3(0.9, 0.9, tail=4), 32, "no layer that can be skipped.*FullDepth"),
        (D3(0.9, 0.5, variant="slide", head=31), 32, "no layer that can be skipped"),
        (D3(0.9, 0.5, variant="slide", head=0, tail=0), 32, "no layer that always runs"),
        (D3(0.9, 0.5), 0, "at least 1 layer"),
    ],
)
def test_a_model_that_the_policy_cannot_serve_is_refused(policy, num_layers, message):
    with pytest.raises(PolicyError, match=message):
        policy.validate(num_layers)
    with pytest.raises(PolicyError, match=message):
        policy.schedule(num_layers, 10)


def test_a_window_that_would_slide_into_the_head_starts_above_it():
    assert str(D3(0.9, 0, variant="slide", head=3).layer_set(2, 32)) == "0-2,10-31"


def test_the_papers_setting_is_refused_on_a_model_too_small_for_it():
    with pytest.raises(PolicyError, match="on 1 layers: .* no layer that always runs"):
        D3.paper("bbh", 1)


def test_a_step_before_the_first_is_refused():
    with pytest.raises(PolicyError, match="step -1"):
        D3(0.9, 0.5).retained(-1, 32)


def test_retained_lists_the_layers():
    assert D3(0.99, 0.5).retained(50, 32) == parse_ranges("0-15,29-31")
