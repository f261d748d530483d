"""Schedule: what it sums up, when it is nested, and where its plans fill K,V."""

from dataclasses import FrozenInstanceError, dataclass

import pytest

from d3rt.errors import PolicyError
from d3rt.plan import Action, LayerSet, Plan
from d3rt.policies import D3, FullDepth, LayerSchedule, Policy, SkipDecode, StaticLayers, UnifiedSkip

NESTED = [D3(0.9, 0.5), SkipDecode(7, 3, 20), UnifiedSkip(2), StaticLayers(layers=(0, 2)), FullDepth()]


def fills(schedule, kv_fill="auto"):
    return [plan.fill_layers for plan in schedule.plans(kv_fill)]


def test_depths_and_mean_depth_are_those_of_the_sets():
    schedule = LayerSchedule([(0, 1, 2, 3), (0, 1), (0,)]).schedule(4, 4)
    assert schedule.depths == (4, 2, 1, 1)
    assert schedule.mean_depth == 2.0


def test_a_lone_sublayer_counts_half():
    assert StaticLayers(attention=(0,), mlp=(0, 1)).schedule(2, 3).mean_depth == 1.5


def test_distinct_sets_come_in_order_of_first_use():
    schedule = LayerSchedule([(0, 1), (1,), (0,)], cycle=True).schedule(2, 9)
    assert [layer_set.layers for layer_set in schedule.distinct] == [(0, 1), (1,), (0,)]


def test_equal_sets_are_one_object():
    schedule = D3(0.99, 0.5).schedule(32, 500)
    assert len({id(layer_set) for layer_set in schedule.sets}) == len(schedule.distinct)


def test_a_schedule_is_a_value():
    assert D3(0.9, 0.5).schedule(8, 5) == D3(0.9, 0.5).schedule(8, 5)
    assert hash(D3(0.9, 0.5).schedule(8, 5)) == hash(D3(0.9, 0.5).schedule(8, 5))
    with pytest.raises(FrozenInstanceError):
        D3(0.9, 0.5).schedule(8, 5).num_layers = 9


@pytest.mark.parametrize("policy", NESTED, ids=str)
def test_the_published_rules_are_nested_and_never_fill(policy):
    schedule = policy.schedule(8, 60)
    assert schedule.nested
    assert set(fills(schedule)) == {()}


@pytest.mark.parametrize("policy", NESTED, ids=str)
def test_under_a_nested_schedule_a_layer_that_runs_has_run_at_every_step_before(policy):
    schedule = policy.schedule(8, 60)
    ran = set(schedule.prompt_set.attention_layers)
    for layer_set in schedule.sets[1:]:
        assert set(layer_set.attention_layers) <= ran
        ran &= set(layer_set.attention_layers)


def test_the_prefill_decides_whether_step_one_is_nested_not_the_rules_answer_for_step_zero():
    # The rule skips layer 1 at step 0, but the prefill runs it.
    assert LayerSchedule([(0,), (0, 1), (0,)]).schedule(2, 3).nested


def test_a_layer_skipped_before_it_runs_again_is_filled_until_its_last_run():
    schedule = LayerSchedule([(0, 1, 2), (0,), (0, 2), (0, 1), (0,)]).schedule(3, 6)
    assert not schedule.nested
    assert fills(schedule) == [(), (1, 2), (1,), (), (), ()]


def test_automatic_filling_leaves_no_hole_that_a_later_step_reads():
    policy = LayerSchedule([(0, 1, 2, 3), (0, 3), (1, 2), (0,), (0, 1, 3)], cycle=True)
    holes = set()
    for plan in policy.schedule(4, 40).plans("auto"):
        for layer, attention, _ in plan:
            assert not (attention is Action.RUN and layer in holes)
            if attention is Action.SKIP:
                holes.add(layer)


def test_eager_filling_fills_every_skipped_layer_at_every_decode_step():
    schedule = D3(0.9, 0.5).schedule(8, 4)
    assert fills(schedule, "eager") == [(), (4,), (4, 5), (4, 5, 6)]


def test_skipped_mlps_are_never_filled():
    schedule = StaticLayers(attention=(0, 1), mlp=(0,)).schedule(2, 3)
    assert schedule.plans("eager")[2] == Plan.of(LayerSet.of_sublayers((0, 1), (0,), 2))


def test_an_attention_sublayer_that_comes_back_is_filled_though_its_mlp_always_runs():
    class Alternating(Policy):
        def layer_set(self, step, num_layers):
            return LayerSet.of_sublayers((0,) if step % 2 else (0, 1), (0, 1), num_layers)

    assert fills(Alternating().schedule(2, 5)) == [(), (1,), (), (1,), ()]


def test_the_first_plan_is_the_prefills():
    assert StaticLayers(layers=(0,)).schedule(3, 2).plans() == (
        Plan.of(LayerSet.full(3)),
        Plan.of(LayerSet.of((0,), 3)),
    )
    assert StaticLayers(layers=(0,), prompt="skipped").schedule(3, 2).plans()[0].layer_set.layers == (0,)
    assert StaticLayers(layers=(0,)).plan(0, 3).layer_set.is_full


def test_a_policy_makes_the_plan_of_one_step():
    assert D3(0.9, 0.5).plan(2, 8, fill=(4,)) == Plan.of(LayerSet.of((0, 1, 2, 3, 6, 7), 8), fill=(4,))


def test_equal_steps_share_one_plan():
    plans = D3(0.99, 0.5).schedule(32, 500).plans("eager")
    assert len({id(plan) for plan in plans}) == len(set(plans))


def test_deferred_keeps_for_every_layer_that_is_skipped_and_not_read_again():
    kept = [plan.keep_layers for plan in D3(0.9, 0.5).schedule(8, 4).plans("deferred")]
    assert kept == [(), (4,), (4, 5), (4, 5, 6)]
    comes_back = LayerSchedule([(0, 1, 2), (0,), (0, 1), (0,)])
    plans = comes_back.schedule(3, 4).plans("deferred")
    assert [plan.fill_layers for plan in plans] == [(), (1,), (), ()]
    assert [plan.keep_layers for plan in plans] == [(), (2,), (2,), (1, 2)]


def test_recompute_does_in_a_step_what_auto_does():
    schedule = LayerSchedule([(0, 1, 2), (0,), (0, 1), (0,)]).schedule(3, 4)
    assert schedule.plans("recompute") == schedule.plans("auto")
    assert schedule.every_plan("recompute") == schedule.every_plan("auto")


def test_nothing_is_kept_for_layers_that_the_prompt_skipped():
    plans = StaticLayers(layers=(0, 2), prompt="skipped").schedule(4, 3).plans("deferred")
    assert [plan.keep_layers for plan in plans] == [(), (), ()]


@pytest.mark.parametrize("kv_fill", ["auto", "eager", "deferred", "recompute"])
@pytest.mark.parametrize("length", range(1, 7))
def test_every_plan_has_the_plans_of_every_shorter_schedule(kv_fill, length):
    policy = LayerSchedule([(0, 1, 2), (0,), (0, 1), (0,), (1, 2), (2,)])
    every = policy.schedule(3, 6).every_plan(kv_fill)
    assert set(policy.schedule(3, length).plans(kv_fill)[1:]) <= set(every)


def test_a_schedule_may_go_on_where_another_ended():
    whole, rest = D3(0.9, 0.5).schedule(8, 7), D3(0.9, 0.5).schedule(8, 4, first=3)
    assert rest.sets[1:] == whole.sets[4:] and rest.prompt_set.is_full
    with pytest.raises(PolicyError, match="first=-1.*at least 0"):
        D3(0.9, 0.5).schedule(8, 4, first=-1)


@pytest.mark.parametrize("kv_fill", ["later", "never", None])
def test_an_unknown_kv_fill_is_refused(kv_fill):
    with pytest.raises(PolicyError, match=f"kv_fill={kv_fill!r}.*'auto' or 'eager' or 'deferred'"):
        FullDepth().schedule(4, 3).plans(kv_fill)


def test_layers_that_the_prompt_skipped_must_not_run_later():
    policy = LayerSchedule([(0, 1), (0,), (0, 2)], prompt="skipped")
    with pytest.raises(PolicyError, match="step 2 runs the attention of layers 2.*prompt='full'"):
        policy.schedule(4, 3)
    assert policy.schedule(4, 2).nested


def test_layers_that_the_prompt_skipped_are_not_filled():
    schedule = LayerSchedule([(0, 1), (0,)], prompt="skipped").schedule(4, 3)
    assert fills(schedule, "eager") == [(), (1,), (1,)]


@pytest.mark.parametrize(
    "num_steps, message", [(0, "at least 1"), (-3, "at least 1"), (2.0, "must be an integer")]
)
def test_a_schedule_has_at_least_the_prefills_step(num_steps, message):
    with pytest.raises(PolicyError, match=message):
        FullDepth().schedule(4, num_steps)


def test_the_table_has_a_row_for_each_run_of_equal_steps():
    assert D3(0.99, 0.5).schedule(32, 6).table() == (
        "step 0 (prefill): 32 layers 0-31\nsteps 1-3: 31 layers 0-15,17-31\nsteps 4-5: 30 layers 0-15,18-31"
    )


def test_the_table_names_single_steps_and_sublayers():
    assert StaticLayers(attention=(0,), mlp=(0, 1)).schedule(2, 2).table() == (
        "step 0 (prefill): 2 layers 0-1\nstep 1: 1.5 layers attention 0; mlp 0-1"
    )


def test_printing_a_schedule_heads_the_table_with_its_summary():
    heading, *rows = str(D3(0.99, 0.5).schedule(32, 6)).splitlines()
    assert (
        heading == "d3:alpha=0.99,start=0.5 on 32 layers, 6 steps: mean depth 30.833, 3 distinct sets, nested"
    )
    assert "\n".join(rows) == D3(0.99, 0.5).schedule(32, 6).table()


def test_a_policy_of_ones_own_needs_only_its_rule():
    @dataclass(frozen=True)
    class FirstLayers(Policy):
        count: int

        def layer_set(self, step, num_layers):
            return LayerSet.of(range(self.count), num_layers)

    assert FirstLayers(2).schedule(4, 3).mean_depth == 2
    assert FirstLayers(2).retained(1, 4) == (0, 1)
