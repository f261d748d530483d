"""Unified Layer Skipping's rule: the released code's sets, the balanced ones, and which one "auto" takes."""

import pytest

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet
from d3rt.policies import UnifiedSkip


def published_rule(num_layers, ratio):
    """The released code, statement for statement (codes/run_clm_llms.py in Adaxry/Unified_Layer_Skipping)."""
    kept = int(num_layers / ratio)
    layers = [0, num_layers - 1]
    interval = int(num_layers / (kept - 1))
    for i in range(1, num_layers - 1):
        if i % interval == 0 and len(layers) < kept:
            layers += [i]
    return tuple(sorted(layers))


@pytest.mark.parametrize(
    "num_layers, ratio, layers",
    [
        (30, 2, (*range(0, 27, 2), 29)),
        (30, 3, (*range(0, 25, 3), 29)),
        (30, 5, (0, 6, 12, 18, 24, 29)),
        (30, 10, (0, 15, 29)),
        (32, 2, (*range(0, 29, 2), 31)),
        (32, 4, (*range(0, 25, 4), 31)),
        (40, 3, (*range(0, 34, 3), 39)),
        (40, 10, (0, 13, 26, 39)),
        (32, 1.5, (*range(20), 31)),
    ],
)
def test_the_released_rule_gives_the_golden_sets(num_layers, ratio, layers):
    assert UnifiedSkip(ratio, variant="released").retained(1, num_layers) == layers


@pytest.mark.parametrize("num_layers", [4, 5, 24, 30, 32, 33, 80])
@pytest.mark.parametrize("ratio", [1.25, 1.5, 1.9, 2, 2.5, 3, 4, 7.3])
def test_the_released_rule_equals_the_published_code(num_layers, ratio):
    if int(num_layers / ratio) < 2:
        with pytest.raises(PolicyError, match="at least 2"):
            UnifiedSkip(ratio, variant="released").retained(1, num_layers)
    else:
        retained = UnifiedSkip(ratio, variant="released").retained(1, num_layers)
        assert retained == published_rule(num_layers, ratio)
        assert len(retained) == int(num_layers / ratio)


def test_the_balanced_rule_gives_the_golden_set():
    layers = (0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31)
    assert UnifiedSkip(2, variant="balanced").retained(1, 32) == layers


@pytest.mark.parametrize("num_layers", [8, 9, 24, 30, 32, 80])
@pytest.mark.parametrize("ratio", [1.1, 1.5, 2, 2.5, 4])
def test_balanced_gaps_differ_by_at_most_one(num_layers, ratio):
    layers = UnifiedSkip(ratio, variant="balanced").retained(1, num_layers)
    gaps = {high - low for low, high in zip(layers, layers[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1
    assert (layers[0], layers[-1]) == (0, num_layers - 1)


@pytest.mark.parametrize(
    "ratio, variant", [(1.5, "balanced"), (1.99, "balanced"), (2, "released"), (3, "released")]
)
def test_auto_is_the_released_rule_except_where_that_skips_one_block(ratio, variant):
    assert UnifiedSkip(ratio).retained(1, 32) == UnifiedSkip(ratio, variant=variant).retained(1, 32)


@pytest.mark.parametrize("num_layers", [1, 2, 32])
@pytest.mark.parametrize("variant", ["auto", "released", "balanced"])
def test_a_ratio_of_one_is_full_depth(variant, num_layers):
    assert UnifiedSkip(1, variant=variant).schedule(num_layers, 3).sets == (LayerSet.full(num_layers),) * 3


def test_the_set_is_the_same_at_every_step():
    assert len(UnifiedSkip(2).schedule(32, 100).distinct) == 1


def test_a_ratio_that_divides_exactly_loses_no_layer_to_rounding():
    assert int(33 / 1.1) == 29
    assert UnifiedSkip(1.1).layer_set(1, 33).depth == 30


@pytest.mark.parametrize("variant", ["auto", "released", "balanced"])
@pytest.mark.parametrize("ratio, kept", [(20, 1), (40, 0)])
def test_fewer_than_two_layers_are_refused(variant, ratio, kept):
    with pytest.raises(PolicyError, match=rf"= {kept}, .*at least 2; choose a ratio of at most 16\."):
        UnifiedSkip(ratio, variant=variant).schedule(32, 10)


@pytest.mark.parametrize("ratio", [0.5, 0, -2, float("inf"), "2"])
def test_a_ratio_below_one_or_no_number_is_refused(ratio):
    with pytest.raises(PolicyError, match=r"UnifiedSkip\(ratio="):
        UnifiedSkip(ratio)


def test_an_unknown_variant_is_refused():
    with pytest.raises(PolicyError, match="'even'.*'auto', 'released', 'balanced'"):
        UnifiedSkip(2, variant="even")
