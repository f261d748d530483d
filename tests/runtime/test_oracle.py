"""The oracle itself: at full depth it is the Hugging Face model, and it cannot read what was never written."""

import copy

import oracle
import pytest
import tiny_models
import torch

from d3rt.plan import LayerSet, Plan


def full(model, steps):
    return [Plan.of(LayerSet.full(model.config.num_hidden_layers))] * steps


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_at_full_depth_it_gives_hugging_faces_tokens_and_logits(name):
    model, prompt = tiny_models.make(name), tiny_models.prompt(13)
    ids = torch.tensor([prompt])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    run = oracle.generate(model, prompt, full(model, 20))
    assert run.tokens == expected.sequences[0, len(prompt) :].tolist()
    exact = oracle.generate(
        tiny_models.upcast(model, torch.float64), prompt, full(model, 20), forced=run.tokens
    )
    theirs = torch.cat(expected.logits)
    assert oracle.excess(run.logits, theirs, exact.logits, torch.float32) <= 1


def test_the_models_outputs_are_neither_constant_nor_alike():
    texts = [
        tuple(oracle.generate(tiny_models.make(name), tiny_models.prompt(13), full(m, 20)).tokens)
        for name in tiny_models.NAMES
        for m in [tiny_models.make(name)]
    ]
    assert len(set(texts)) == len(texts)
    assert min(len(set(tokens)) for tokens in texts) > 5


def test_skipping_layers_in_prompt_and_steps_equals_deleting_them():
    model = tiny_models.make("qwen3")
    pruned = copy.deepcopy(model)
    pruned.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in (0, 3))
    pruned.config.num_hidden_layers = 2
    prompt = tiny_models.prompt(7)
    skipping = oracle.generate(model, prompt, [Plan.of(LayerSet.of((0, 3), 4))] * 12)
    # Deleting renumbers layers; the copies keep their old numbers, so they are set right here.
    pruned = copy.deepcopy(pruned)
    for index, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = index
    deleted = oracle.generate(pruned, prompt, full(pruned, 12))
    assert skipping.tokens == deleted.tokens
    assert torch.equal(skipping.logits, deleted.logits)


def test_reading_a_hole_raises():
    model = tiny_models.make("llama-mha")
    whole = LayerSet.full(4)
    plans = [Plan.of(whole), Plan.of(LayerSet.of((0, 3), 4)), Plan.of(whole)]
    with pytest.raises(oracle.ReadHole, match=r"layer 1 at position 6 reads positions \[5\]"):
        oracle.generate(model, tiny_models.prompt(5), plans)


def test_a_filled_layer_leaves_no_hole_and_does_not_change_the_step_that_fills_it():
    model, prompt = tiny_models.make("llama-mha"), tiny_models.prompt(5)
    whole, some = LayerSet.full(4), LayerSet.of((0, 3), 4)
    filled = oracle.generate(model, prompt, [Plan.of(whole), Plan.of(some, fill=(1, 2)), Plan.of(whole)])
    skipped = oracle.generate(model, prompt, [Plan.of(whole), Plan.of(some)])
    assert torch.equal(filled.logits[:2], skipped.logits)
