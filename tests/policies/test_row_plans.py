"""by_layer: rows that do the same are one range, and nothing that waits is forgotten or done twice."""

import random

import pytest

from d3rt.plan import Action, LayerSet, Plan
from d3rt.row_plans import LayerRows, Settle, by_layer, ranges

FULL = LayerSet.full(4)


def whole(rows):
    return (slice(0, rows),)


def test_rows_with_one_plan_are_one_range():
    plan = Plan.of(LayerSet.of((0, 3), 4), fill=(1, 2))
    layers = by_layer([plan] * 3)
    assert [each.attention for each in layers] == [whole(3), (), (), whole(3), ()]
    assert [each.settle for each in layers] == [(), (), (), (Settle(slice(0, 3), (1, 2), None),), ()]


def test_nested_sets_sorted_by_depth_are_a_prefix_at_every_layer():
    plans = [Plan.of(LayerSet.of(layers, 4)) for layers in ((0, 1, 2, 3), (0, 1, 3), (0, 3))]
    assert [each.mlp for each in by_layer(plans)] == [whole(3), whole(2), whole(1), whole(3), ()]


def test_sets_that_are_not_nested_make_several_ranges():
    plans = [Plan.of(LayerSet.of(layers, 2)) for layers in ((0, 1), (1,), (0, 1))]
    assert by_layer(plans)[0].attention == (slice(0, 1), slice(2, 3))


def test_what_is_skipped_at_the_end_is_settled_after_the_last_layer():
    layers = by_layer([Plan.of(LayerSet.of((0,), 3), keep=(1, 2))])
    assert layers[-1] == LayerRows((Settle(slice(0, 1), (), 0),), (), ())


def test_an_mlp_that_runs_ends_a_gap():
    plan = Plan.of(LayerSet.of_sublayers((0,), (0, 1), 3), keep=(1, 2))
    assert plan.gaps == (None, 0, 1) and plan.num_gaps == 2
    assert [each.settle for each in by_layer([plan])] == [
        (),
        (Settle(slice(0, 1), (), 0),),
        (),
        (Settle(slice(0, 1), (), 1),),
    ]


def test_layers_between_which_nothing_runs_share_a_gap():
    plan = Plan.of(LayerSet.of((0, 4), 5), fill=(2,), keep=(1, 3))
    assert plan.gaps == (None, 0, None, 0, None)
    assert by_layer([plan])[4].settle == (Settle(slice(0, 1), (2,), 0),)


def test_ranges_are_the_longest():
    assert ranges([1, 1, 2, 1], lambda value: value == 1) == (slice(0, 2), slice(3, 4))
    assert ranges([2], lambda value: value == 1) == ()


@pytest.mark.parametrize("seed", range(200))
def test_each_row_gets_exactly_what_its_own_plan_says(seed):
    draw = random.Random(seed)
    layers, rows = draw.randint(1, 6), draw.randint(1, 5)
    known = [random_plan(draw, layers) for _ in range(3)]
    plans = [draw.choice(known) for _ in range(rows)]
    for row, plan in enumerate(plans):
        hidden = 0  # how often x has changed so far
        wanted, did = [], []
        for layer, attention, mlp in plan:
            if attention in (Action.FILL, Action.KEEP):
                wanted.append((layer, hidden, attention))
            hidden += (attention is Action.RUN) + (mlp is Action.RUN)
        hidden, gaps = 0, {}
        for layer, todo in enumerate(by_layer(plans)):
            for settle in todo.settle:
                if settle.rows.start <= row < settle.rows.stop:
                    did += [(filled, hidden, Action.FILL) for filled in settle.fill]
                    if settle.gap is not None:
                        assert settle.gap not in gaps
                        gaps[settle.gap] = hidden
            runs = [
                any(part.start <= row < part.stop for part in parts) for parts in (todo.attention, todo.mlp)
            ]
            if layer < layers:
                assert runs == [plan.attention[layer] is Action.RUN, plan.mlp[layer] is Action.RUN]
            hidden += sum(runs)
        did += [(layer, gaps[gap], Action.KEEP) for layer, gap in enumerate(plan.gaps) if gap is not None]
        assert sorted(did, key=str) == sorted(wanted, key=str)


def random_plan(draw, layers):
    actions = [Action.RUN, Action.SKIP, Action.FILL, Action.KEEP]
    attention = [draw.choice(actions) for _ in range(layers)]
    mlp = [draw.choice(actions[:2]) for _ in range(layers)]
    mlp[draw.randrange(layers)] = Action.RUN
    return Plan(attention, mlp)
