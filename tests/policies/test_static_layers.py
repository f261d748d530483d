"""StaticLayers and FullDepth: the given set at every step, how one is named, and what is refused."""

import pytest

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet
from d3rt.policies import FullDepth, StaticLayers

# The published draft of Self-Speculative Decoding (arXiv 2309.08168) for Llama-2-13B: what it skips.
SELF_SD_ATTENTION = (3, 5, 6, 8, 10, 11, 14, 15, 18, *range(22, 32), *range(33, 38))
SELF_SD_MLP = (6, 9, 10, 11, 15, 24, 25, 27, 28, 35)


def test_the_given_layers_run_at_every_step():
    schedule = StaticLayers(layers=[3, 0, 1]).schedule(5, 10)
    assert schedule.distinct == (LayerSet.of((0, 1, 3), 5),)


def test_sublayers_are_skipped_apart():
    attention = tuple(n for n in range(40) if n not in SELF_SD_ATTENTION)
    mlp = tuple(n for n in range(40) if n not in SELF_SD_MLP)
    layer_set = StaticLayers(attention=attention, mlp=mlp).layer_set(1, 40)
    assert (layer_set.attention_layers, layer_set.mlp_layers) == (attention, mlp)
    assert layer_set.depth == 40 - (24 + 10) / 2


@pytest.mark.parametrize("given, left_out", [("attention", "mlp"), ("mlp", "attention")])
def test_the_kind_of_sublayer_that_is_left_out_runs_everywhere(given, left_out):
    layer_set = StaticLayers(**{given: (0, 1)}).layer_set(1, 4)
    assert getattr(layer_set, f"{given}_layers") == (0, 1)
    assert getattr(layer_set, f"{left_out}_layers") == (0, 1, 2, 3)


def test_the_prompt_runs_all_layers_unless_it_is_skipped_too():
    assert StaticLayers(layers=(0, 1)).prompt_set(4).is_full
    assert StaticLayers(layers=(0, 1), prompt="skipped").prompt_set(4).layers == (0, 1)


def test_without_names_what_is_dropped():
    assert StaticLayers.without((1, 3), 5) == StaticLayers(layers=(0, 2, 4))
    assert StaticLayers.without((4,), 5, prompt="skipped") == StaticLayers((0, 1, 2, 3), prompt="skipped")


@pytest.mark.parametrize(
    "p, layers",
    [
        (0.5, (0, 2, 4, 6, 8, 10)),
        (0.4, (0, 2, 4, 6, 8, 10)),
        (1 / 3, (0, 1, 3, 4, 6, 7, 9, 10)),
        (0.25, (0, 1, 2, 4, 5, 6, 8, 9, 10)),
        (0.2, (0, 1, 2, 3, 5, 6, 7, 8, 10, 11)),
    ],
)
def test_every_other_drops_one_layer_in_floor_of_one_over_p(p, layers):
    assert StaticLayers.every_other(12, p).layers == layers


@pytest.mark.parametrize("p", [0, 0.6, 1, -0.1])
def test_every_other_refuses_a_share_that_it_cannot_drop(p):
    with pytest.raises(PolicyError, match=r"every_other\(p=.*in \(0, 0.5\]"):
        StaticLayers.every_other(12, p)


@pytest.mark.parametrize(
    "model, num_layers, pruned", [("llama-2-7b", 32, range(21, 30)), ("llama-2-13b", 40, range(26, 36))]
)
def test_shortgpt_presets_prune_the_published_layers(model, num_layers, pruned):
    retained = StaticLayers.shortgpt(model).retained(1, num_layers)
    assert sorted(set(range(num_layers)) - set(retained)) == list(pruned)


def test_an_unknown_shortgpt_model_is_refused():
    with pytest.raises(PolicyError, match="'llama-3-8b'.*'llama-2-7b', 'llama-2-13b'"):
        StaticLayers.shortgpt("llama-3-8b")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "give either layers"),
        (dict(layers=(0,), mlp=(0,)), "give either layers"),
        (dict(layers=()), "the set is empty"),
        (dict(attention=(), mlp=()), "the set is empty"),
        (dict(layers=(0, 0)), "layer 0 is named twice"),
        (dict(layers=(-1,)), "layer -1 is negative"),
        (dict(layers="0-3"), "must be a sequence of layer indices"),
        (dict(layers=3), "must be a sequence of layer indices"),
        (dict(mlp=(0.5,)), r"mlp=0.5\): mlp must be an integer"),
        (dict(layers=(0,), prompt="none"), "prompt='none'.*'full', 'skipped'"),
    ],
)
def test_a_set_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(PolicyError, match=message):
        StaticLayers(**arguments)


@pytest.mark.parametrize("name", ["layers", "attention", "mlp"])
def test_a_layer_that_the_model_lacks_is_refused(name):
    with pytest.raises(PolicyError, match=rf"{name}=.*on 8 layers: there is no layer 8.*0\.\.7"):
        StaticLayers(**{name: (0, 8)}).validate(8)


def test_without_refuses_a_layer_that_the_model_lacks():
    with pytest.raises(PolicyError, match="layer 8 of a model of 8 layers"):
        StaticLayers.without((8,), 8)


def test_full_depth_runs_every_layer_at_every_step():
    schedule = FullDepth().schedule(32, 50)
    assert schedule.distinct == (LayerSet.full(32),)
    assert schedule.mean_depth == 32
