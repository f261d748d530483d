"""LayerSet and Plan: how they are made, compared and printed, and what is refused."""

import copy
import pickle
from dataclasses import FrozenInstanceError

import pytest

from d3rt.errors import D3rtError, PolicyError
from d3rt.plan import Action, LayerSet, Plan, format_ranges, parse_ranges

RUN, FILL, SKIP = Action.RUN, Action.FILL, Action.SKIP


def test_a_full_set_runs_every_sublayer():
    assert LayerSet.full(3) == LayerSet(3, 0b111, 0b111)
    assert LayerSet.full(3).is_full
    assert not LayerSet.of((0, 1), 3).is_full


def test_whole_layers_set_both_bits():
    assert LayerSet.of([2, 0], 3) == LayerSet(3, attention=0b101, mlp=0b101)


def test_sublayers_set_their_own_bits():
    assert LayerSet.of_sublayers((0,), (0, 2), 3) == LayerSet(3, attention=0b001, mlp=0b101)


@pytest.mark.parametrize(
    "start, stop, layers", [(1, 3, (0, 3)), (0, 3, (3,)), (2, 2, (0, 1, 2, 3)), (3, 1, (0, 1, 2, 3))]
)
def test_a_window_is_left_out(start, stop, layers):
    assert LayerSet.except_window(start, stop, 4) == LayerSet.of(layers, 4)


def test_a_set_lists_its_layers_in_order():
    layer_set = LayerSet.of_sublayers((5, 0), (3, 0), 8)
    assert layer_set.layers == (0, 3, 5)
    assert layer_set.attention_layers == (0, 5)
    assert layer_set.mlp_layers == (0, 3)


def test_depth_is_whole_for_whole_layers_and_counts_halves_otherwise():
    assert LayerSet.of((0, 1, 5), 8).depth == 3
    assert isinstance(LayerSet.of((0, 1, 5), 8).depth, int)
    assert LayerSet.of_sublayers((0,), (0, 1), 8).depth == 1.5


def test_a_subset_is_one_in_both_kinds_of_sublayer():
    assert LayerSet.of((0, 2), 4) <= LayerSet.of((0, 1, 2), 4)
    assert not LayerSet.of((0, 3), 4) <= LayerSet.of((0, 1, 2), 4)
    assert not LayerSet.of_sublayers((0,), (0, 1), 4) <= LayerSet.of((0,), 4)
    assert LayerSet.full(4) >= LayerSet.of((0,), 4)


def test_sets_of_different_models_do_not_compare():
    with pytest.raises(PolicyError, match="of 4 and of 5 layers"):
        _ = LayerSet.full(4) <= LayerSet.full(5)


@pytest.mark.parametrize(
    "layer_set, text",
    [
        (LayerSet.of((*range(16), 29, 30, 31), 32), "0-15,29-31"),
        (LayerSet.of((0, 2, 4, 5), 8), "0,2,4-5"),
        (LayerSet.of_sublayers((0, 1, 2, 3, 7), range(8), 8), "attention 0-3,7; mlp 0-7"),
        (LayerSet.of_sublayers((), (1,), 8), "attention none; mlp 1"),
    ],
)
def test_a_set_prints_as_compact_ranges(layer_set, text):
    assert str(layer_set) == text


@pytest.mark.parametrize(
    "layer_set", [LayerSet.full(4), LayerSet.of((0, 2), 4), LayerSet.of_sublayers((0,), (1, 2), 4)]
)
def test_the_repr_of_a_set_builds_it_again(layer_set):
    assert eval(repr(layer_set)) == layer_set


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LayerSet.of((0, 32), 32), r"layer 32: this model has 32 layers, so .* 0\.\.31"),
        (lambda: LayerSet.of((-1,), 32), "layer -1"),
        (lambda: LayerSet.of((1, 1), 32), "layer 1 is named twice"),
        (lambda: LayerSet.of((), 32), "at least one sublayer must run"),
        (lambda: LayerSet.of((0.5,), 32), "layer 0.5: .* must be an integer"),
        (lambda: LayerSet.of("01", 32), "layer '01'"),
        (lambda: LayerSet.of(3, 32), "layer 3: give layer indices as a sequence"),
        (lambda: LayerSet.of((0,), 0), "num_layers=0"),
        (lambda: LayerSet.full(-2), "num_layers=-2"),
        (lambda: LayerSet.full("2"), "num_layers='2'.*integer"),
        (lambda: LayerSet.of_sublayers((), (), 4), "at least one sublayer must run"),
        (lambda: LayerSet.of_sublayers((9,), (0,), 4), "attention layer 9"),
        (lambda: LayerSet.of_sublayers((0,), (9,), 4), "mlp layer 9"),
        (lambda: LayerSet(4, 0b10000, 0), "attention=0b10000.*4 layers"),
        (lambda: LayerSet(4, 1, -1), "mlp=-0b1"),
        (lambda: LayerSet(0, 0, 0), "num_layers=0"),
    ],
)
def test_a_set_that_cannot_be_is_refused(make, message):
    with pytest.raises(PolicyError, match=message):
        make()


def test_policy_errors_are_value_errors_and_d3rt_errors():
    assert issubclass(PolicyError, ValueError) and issubclass(PolicyError, D3rtError)


@pytest.mark.parametrize(
    "layers, text", [((), "none"), ((7,), "7"), ((0, 1), "0-1"), ((0, 2, 3, 4, 9), "0,2-4,9")]
)
def test_ranges_read_back_what_they_print(layers, text):
    assert format_ranges(layers) == text
    assert parse_ranges(text) == layers
    assert parse_ranges(format_ranges(layers, "+")) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1--2", "3-1", "0+", "1.5", "٣", "0-99999999999"])
def test_ranges_that_cannot_be_read_are_refused(text):
    with pytest.raises(PolicyError, match="layer ranges"):
        parse_ranges(text)


def test_a_plan_runs_the_set_fills_what_is_asked_and_skips_the_rest():
    plan = Plan.of(LayerSet.of((0, 3), 4), fill=(2,))
    assert plan.attention == (RUN, SKIP, FILL, RUN)
    assert plan.mlp == (RUN, SKIP, SKIP, RUN)


def test_iterating_a_plan_yields_each_layers_actions():
    assert list(Plan.of(LayerSet.of_sublayers((0,), (0, 1), 2))) == [(0, RUN, RUN), (1, SKIP, RUN)]


def test_a_plan_gives_back_what_it_was_made_of():
    layer_set = LayerSet.of_sublayers((0, 3), (1, 3), 5)
    plan = Plan.of(layer_set, fill=[4, 1])
    assert (plan.layer_set, plan.fill_layers, plan.num_layers) == (layer_set, (1, 4), 5)


def test_equal_plans_are_one_key():
    one, other = Plan.of(LayerSet.of((0, 2), 3), (1,)), Plan.of(LayerSet.of((2, 0), 3), [1])
    assert one == other
    assert {one: "recorded"}[other] == "recorded"
    assert {one: "recorded"}.get(Plan.of(LayerSet.of((0, 2), 3))) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copied_plan_is_the_same_key(copied):
    plan = Plan.of(LayerSet.of((0, 2), 3), (1,))
    assert copied(plan) == plan
    assert hash(copied(plan)) == hash(plan)


def test_plans_and_sets_do_not_change():
    with pytest.raises(FrozenInstanceError):
        LayerSet.full(2).mlp = 0
    with pytest.raises(FrozenInstanceError):
        Plan.of(LayerSet.full(2)).mlp = ()


def test_a_plan_prints_what_runs_and_what_is_filled():
    assert str(Plan.of(LayerSet.of((0, 1, 5), 6))) == "run 0-1,5"
    assert str(Plan.of(LayerSet.of((0, 1, 5), 6), (2, 3, 4))) == "run 0-1,5; fill 2-4"


def test_the_repr_of_a_plan_builds_it_again():
    plan = Plan.of(LayerSet.of((0, 1, 5), 6), (2,))
    assert eval(repr(plan)) == plan


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: Plan.of(LayerSet.of((0,), 4), fill=(0, 2)),
            "layers 0 are to be filled, but their attention runs",
        ),
        (lambda: Plan.of(LayerSet.of((0,), 4), fill=(4,)), "fill layer 4"),
        (lambda: Plan((RUN,), (FILL,)), "mlp of layer 0 is FILL.*no K,V"),
        (lambda: Plan((RUN, RUN), (RUN,)), "2 attention actions and 1 mlp"),
        (lambda: Plan((FILL, SKIP), (SKIP, SKIP)), "no sublayer runs"),
        (lambda: Plan((), ()), "no sublayer runs"),
        (lambda: Plan(("run",), (RUN,)), "attention of layer 0 is 'run'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(make, message):
    with pytest.raises(PolicyError, match=message):
        make()
