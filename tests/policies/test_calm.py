"""CALM: where a step may end, the threshold's decay, and what is said of it before it runs."""

import math

import pytest

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet, Plan
from d3rt.policies import CALM, ExitSchedule, parse


@pytest.mark.parametrize(
    ("policy", "layers", "exits"),
    [
        (CALM(0.9), 5, (1, 2, 3, 4)),
        (CALM(0.9, min_exit=4), 5, (4,)),
        (CALM(0.9, min_exit=2, exit_interval=3), 12, (2, 5, 8, 11)),
        (CALM(0.9, min_exit=2, exit_interval=3), 11, (2, 5, 8)),
        (CALM(0.9, min_exit=3, exit_interval=100), 32, (3,)),
    ],
)
def test_exits_start_at_min_exit_and_stay_below_the_top(policy, layers, exits):
    assert policy.exits(layers) == exits


def test_the_threshold_decays_as_in_the_paper():
    # .9 lambda + .1 lambda exp(-tau t / N) for lambda = .9, tau = 4, N = 200
    policy = CALM(0.9, decay=4, horizon=200)
    given = {0: 0.9, 1: 0.8982, 10: 0.8837, 50: 0.8431, 100: 0.8222, 200: 0.8116}
    assert {t: round(policy.threshold_at(t), 4) for t in given} == given
    assert policy.threshold_at(10**6) == pytest.approx(0.81)


def test_without_decay_the_threshold_stays_exactly():
    for policy in (CALM(0.7), CALM(0.7, decay=None), CALM(0.7, decay=0, horizon=9)):
        assert {policy.threshold_at(t) for t in (0, 1, 99)} == {0.7}
    assert CALM(0.7, decay=None) == CALM(0.7)


def test_a_schedule_is_a_climb_a_step_after_a_full_prompt():
    schedule = CALM(0.9, "softmax", min_exit=2, exit_interval=2).schedule(6, 4)
    assert isinstance(schedule, ExitSchedule)
    first, *climbs = schedule.plans()
    assert first == Plan.of(LayerSet.full(6))
    assert len(climbs) == 3 and len(set(map(id, climbs))) == 1
    assert (climbs[0].exits, climbs[0].measure, climbs[0].threshold) == ((2, 4), "softmax", 0.9)
    assert climbs[0].layer_set == LayerSet.full(6)
    assert schedule.every_plan() == (climbs[0],)


def test_a_decaying_schedule_has_a_climb_for_each_threshold_and_the_same_exits():
    schedule = CALM(0.9, min_exit=2, decay=4, horizon=20).schedule(6, 30)
    climbs = schedule.plans("eager")[1:]
    thresholds = [climb.threshold for climb in climbs]
    assert thresholds == sorted(thresholds, reverse=True) and len(set(climbs)) == 29
    assert thresholds == [0.9 * (0.9 + 0.1 * math.exp(-4 * t / 20)) for t in range(1, 30)]
    assert {climb.exits for climb in climbs} == {(2, 3, 4, 5)}


def test_layer_sets_and_depths_before_the_run_are_the_ceiling_and_no_schedule_is_called_nested():
    schedule = CALM(0.5).schedule(6, 10)
    assert set(schedule.sets) == {LayerSet.full(6)} and schedule.mean_depth == 6
    assert not schedule.nested


def test_the_text_says_that_the_depth_is_not_known():
    text = str(CALM(0.9, min_exit=4, exit_interval=10, decay=4, horizon=200).schedule(30, 50))
    assert "the depth is decided while a step runs, at most 30, not known before" in text
    assert "measure state, exits after 4, 14, 24 layers" in text
    assert "steps 1-2: ends at the first exit whose confidence is at least 0.8982, falling to 0.8965" in text
    assert "mean depth" not in text


def test_another_kv_fill_is_refused():
    with pytest.raises(PolicyError, match="kv_fill='never': CALM decides the depth .* 'auto' or 'eager'"):
        CALM(0.9).schedule(6, 4).plans("never")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(threshold=math.nan), "threshold must be a finite number"),
        (dict(threshold="high"), "threshold must be a number"),
        (dict(threshold=0.9, measure="entropy"), "must be one of 'state', 'softmax'"),
        (
            dict(threshold=0.9, min_exit=0),
            r"min_exit=0\): min_exit counts the layers that always run, .* >= 1",
        ),
        (dict(threshold=0.9, min_exit=2.0), "min_exit must be an integer"),
        (dict(threshold=0.9, exit_interval=0), "exit_interval=0.* must be >= 1"),
        (dict(threshold=0.9, decay=-1), "decay must be >= 0"),
        (dict(threshold=0.9, decay=4), r"decay=4, horizon=0\): .* at least 1 where decay is above 0"),
        (dict(threshold=0.9, horizon=-3), "horizon=-3"),
    ],
)
def test_bad_fields_are_refused_with_value_and_rule(fields, words):
    with pytest.raises(PolicyError, match=words):
        CALM(**fields)


def test_a_model_that_has_no_exit_below_the_top_is_refused():
    with pytest.raises(PolicyError, match=r"min_exit=6\) on 6 layers: no exit .* below 6, or use FullDepth"):
        CALM(0.9, min_exit=6).validate(6)
    CALM(0.9, min_exit=5).validate(6)


def test_any_finite_threshold_is_one():
    assert parse("calm:threshold=-1") == CALM(-1)
    assert parse("calm:threshold=1.5") == CALM(1.5)
