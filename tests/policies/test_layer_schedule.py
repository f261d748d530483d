"""LayerSchedule: which entry a step gets, and what is refused."""

import pytest

from d3rt.errors import PolicyError
from d3rt.policies import LayerSchedule


def layers_of(policy, num_layers, num_steps):
    return [layer_set.layers for layer_set in policy.schedule(num_layers, num_steps).sets]


def test_each_step_has_its_entry_and_the_last_one_repeats():
    policy = LayerSchedule([(0, 1, 2), (0, 2), (1,)])
    assert layers_of(policy, 3, 5) == [(0, 1, 2), (0, 2), (1,), (1,), (1,)]


def test_a_cycle_starts_over():
    policy = LayerSchedule([(0, 1, 2), (0, 2)], cycle=True)
    assert layers_of(policy, 3, 5) == [(0, 1, 2), (0, 2), (0, 1, 2), (0, 2), (0, 1, 2)]


def test_lists_and_tuples_in_any_order_make_equal_policies():
    assert LayerSchedule([[2, 0], (1,)]) == LayerSchedule(((0, 2), [1]))
    assert hash(LayerSchedule([[2, 0], (1,)])) == hash(LayerSchedule(((0, 2), [1])))


def test_a_layer_that_comes_back_is_not_nested():
    assert not LayerSchedule([(0, 1), (0,), (0, 1)]).schedule(2, 3).nested
    assert LayerSchedule([(0, 1), (0, 1), (0,)]).schedule(2, 3).nested


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sets=()), "at least one set"),
        (dict(sets=[(0,), ()]), r"sets\[1\] is empty"),
        (dict(sets=[(0,), (1, 1)]), r"sets\[1\].*layer 1 is named twice"),
        (dict(sets=[(0,), (-2,)]), r"sets\[1\].*layer -2 is negative"),
        (dict(sets=[0, 1]), r"sets\[0\]=0.*sequence of layer indices"),
        (dict(sets="0-3"), "sets='0-3'"),
        (dict(sets=[(0,)], cycle=1), "cycle=1"),
        (dict(sets=[(0,)], prompt="half"), "prompt='half'"),
    ],
)
def test_sets_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(PolicyError, match=message):
        LayerSchedule(**arguments)


def test_a_layer_that_the_model_lacks_is_refused():
    with pytest.raises(PolicyError, match=r"on 4 layers: sets\[1\] has layer 4.*0\.\.3"):
        LayerSchedule([(0,), (0, 4)]).schedule(4, 10)
