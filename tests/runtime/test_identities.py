"""Policies that say the same in other words, and models that are the same model."""

import copy

import pytest
import tiny_models
import torch

import d3rt

BACKENDS = ("reference", "cpu")
STEPS = 24
L = 6


def tokens(policy, backend="cpu", name="llama", **options):
    fast = tiny_models.runtime(name, policy, backend=backend)
    inputs = tiny_models.left_padded(tiny_models.ragged((7, 2)))
    out = fast.generate(
        **inputs, **({"max_new_tokens": STEPS, "eos_token_id": None} | options), return_dict_in_generate=True
    )
    return out.sequences


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "policy",
    [
        d3rt.D3(alpha=1, start=0.5),
        d3rt.UnifiedSkip(1),
        d3rt.SkipDecode(max_layers=L, min_layers=L, length=STEPS),
        d3rt.StaticLayers(layers=range(L)),
        d3rt.StaticLayers(layers=range(L), prompt="skipped"),
        d3rt.StaticLayers(attention=range(L)),
        d3rt.LayerSchedule(sets=(range(L),), cycle=True),
        "full",
    ],
    ids=str,
)
def test_a_policy_that_keeps_all_layers_is_full_depth(policy, backend):
    assert torch.equal(tokens(policy, backend), tokens(d3rt.FullDepth(), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_d3_that_decays_at_once_is_a_static_exit_from_the_first_step_on(backend):
    decayed = tokens(d3rt.D3(alpha=1e-6, start=0.5, tail=0), backend)
    assert torch.equal(decayed, tokens(d3rt.StaticLayers(layers=(0, 1, 2)), backend))
    assert not torch.equal(decayed, tokens(d3rt.FullDepth(), backend))


def test_d3_that_decays_at_once_keeps_its_tail():
    decayed = tokens(d3rt.D3(alpha=1e-6, start=0.5, tail=1))
    assert torch.equal(decayed, tokens(d3rt.StaticLayers(layers=(0, 1, 2, 5))))


def test_skipdecode_at_a_constant_budget_is_a_static_set():
    constant = d3rt.SkipDecode(max_layers=3, min_layers=3, length=STEPS)
    assert torch.equal(tokens(constant), tokens(d3rt.StaticLayers(layers=(0, 4, 5))))


def without_layers(model, dropped):
    """A copy of the Hugging Face model from which these layers were deleted."""
    pruned = copy.deepcopy(model)
    kept = [layer for index, layer in enumerate(pruned.model.layers) if index not in dropped]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    pruned.model.layers = torch.nn.ModuleList(kept)
    pruned.config.num_hidden_layers = len(kept)
    if getattr(pruned.config, "layer_types", None):
        pruned.config.layer_types = [
            kind for index, kind in enumerate(model.config.layer_types) if index not in dropped
        ]
    return pruned


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("dropped", [(1,), (0, 2), (3,)], ids=str)
def test_layers_skipped_in_prompt_and_steps_are_layers_deleted(dropped, name, backend):
    pruned = without_layers(tiny_models.make(name), dropped)
    inputs = tiny_models.left_padded(tiny_models.ragged((7, 2)))
    expected = pruned.generate(**inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    policy = d3rt.StaticLayers.without(dropped, 4, prompt="skipped")
    assert torch.equal(tokens(policy, backend, name), expected)
    # And the pruned model is itself a model to compile.
    fast = d3rt.compile(pruned, backend=backend, batch_size=2, threads=1)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None), expected)


def test_a_policy_given_as_text_is_the_policy():
    assert torch.equal(tokens("d3:alpha=0.9,start=0.5"), tokens(d3rt.D3(alpha=0.9, start=0.5)))


def test_a_longer_generation_begins_with_the_shorter_one():
    policy = d3rt.D3(alpha=0.93, start=0.4)
    long = tokens(policy)
    assert torch.equal(tokens(policy, max_new_tokens=9), long[:, : 7 + 9])
