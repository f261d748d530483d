"""d3rt.search against slow, obvious ways: layers really deleted, states caught by hooks, sets tried one by one."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from byte_models import byte_tokenizer
from torch.nn import functional as F

import d3rt
from d3rt.search import block_influence, greedy, greedy_path, layerdrop, shortgpt

TEXTS = [tiny_models.prompt(length, seed) for seed, length in enumerate((17, 5, 30))]
QUIET = dict(progress=False)


def without(model, dropped):
    """A copy of the model from which the layers are deleted."""
    pruned = copy.deepcopy(model)
    kept = [layer for layer in range(len(model.model.layers)) if layer not in dropped]
    pruned.model.layers = torch.nn.ModuleList(pruned.model.layers[layer] for layer in kept)
    pruned.config.num_hidden_layers = len(kept)
    if getattr(pruned.config, "layer_types", None):
        pruned.config.layer_types = [pruned.config.layer_types[layer] for layer in kept]
    return pruned


def loss(model, texts=TEXTS):
    """Nats a predicted token."""
    total = 0.0
    with torch.no_grad():
        for text in texts:
            logits = model(torch.tensor([text]), use_cache=False).logits[0, :-1].double()
            total += float(F.cross_entropy(logits, torch.tensor(text[1:]), reduction="sum"))
    return total / sum(len(text) - 1 for text in texts)


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "qwen3-window", "mistral-window"])
def test_greedy_has_the_losses_of_models_with_the_layers_deleted(name):
    model = tiny_models.make(name)
    path = greedy_path(model, TEXTS, keep=2, **QUIET)
    for gone, nll in enumerate(path.nll):
        assert nll == pytest.approx(loss(without(model, path.removed[:gone])), abs=1e-5)
    assert len(path.removed) == len(model.model.layers) - 2


def test_greedy_removes_what_hurts_least_each_time():
    model = tiny_models.make("llama")
    removed: list[int] = []
    while len(removed) < 4:
        left = [layer for layer in range(6) if layer not in removed]
        removed.append(min(left, key=lambda layer: loss(without(model, [*removed, layer]))))
    path = greedy_path(model, TEXTS, keep=2, **QUIET)
    assert path.removed == tuple(removed)
    assert greedy(model, TEXTS, keep=2, **QUIET) == d3rt.StaticLayers.without(removed, 6)


def test_greedys_sets_are_nested():
    model = tiny_models.make("llama")
    path = greedy_path(model, TEXTS, keep=1, **QUIET)
    sets = [set(path.policy(keep).layers) for keep in range(1, 7)]
    assert all(small < large for small, large in zip(sets, sets[1:], strict=False))
    assert greedy(model, TEXTS, keep=3, **QUIET) == path.policy(3), "the path does not depend on its end"
    with pytest.raises(ValueError, match="sets of 3 to 6"):
        greedy_path(model, TEXTS, keep=3, **QUIET).policy(2)


def influence_by_hooks(model, texts):
    """From Hugging Face's hidden states, the last layer's caught where it leaves the layer."""
    last = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    turned = []
    with torch.no_grad():
        for text in texts:
            states = model(torch.tensor([text]), output_hidden_states=True).hidden_states
            states = [*states[:-1], last[-1]]
            pairs = zip(states, states[1:], strict=False)
            turned.append(torch.stack([1 - F.cosine_similarity(a[0], b[0], dim=-1) for a, b in pairs]))
    hook.remove()
    return torch.cat(turned, dim=1).double().mean(dim=1)


@pytest.mark.parametrize("name", ["llama", "qwen3-window"])
def test_block_influence_is_that_of_the_states_before_the_final_norm(name):
    model = tiny_models.make(name)
    found = torch.tensor(block_influence(model, TEXTS, **QUIET), dtype=torch.float64)
    assert (found - influence_by_hooks(model, TEXTS)).abs().max() < 1e-6  # float32 cosines


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_do_not_count(side):
    model = tiny_models.make("llama")
    batch = tiny_models.left_padded(TEXTS)
    if side == "right":
        batch = {name: rows.flip(1) for name, rows in batch.items()}
        texts = [text[::-1] for text in TEXTS]
    else:
        texts = TEXTS
    assert block_influence(model, batch, **QUIET) == block_influence(model, texts, **QUIET)
    assert greedy_path(model, batch, keep=4, **QUIET) == greedy_path(model, texts, keep=4, **QUIET)


def test_shortgpt_keeps_the_layers_of_highest_influence():
    model = tiny_models.make("llama")
    order = influence_by_hooks(model, TEXTS).argsort(descending=True).tolist()
    for keep in (1, 3, 6):
        assert shortgpt(model, TEXTS, keep=keep, **QUIET).layers == tuple(sorted(order[:keep]))
    assert shortgpt(model, TEXTS, keep=3, prompt="skipped", **QUIET).prompt == "skipped"


def test_what_is_found_runs_like_the_pruned_model():
    model = tiny_models.make("llama")
    policy = greedy(model, TEXTS, keep=4, prompt="skipped", **QUIET)
    pruned = without(model, set(range(6)) - set(policy.layers))
    prompt = torch.tensor([TEXTS[0]])
    fast = d3rt.compile(model, policy, threads=1)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    again = d3rt.compile(pruned, threads=1)
    assert torch.equal(fast.generate(prompt, **options), again.generate(prompt, **options))


def test_the_search_leaves_the_model_as_it_was_and_repeats_itself():
    model = tiny_models.fresh("llama").train()
    before = loss(copy.deepcopy(model).eval())
    first = greedy_path(model, TEXTS, keep=3, **QUIET)
    assert greedy_path(model, TEXTS, keep=3, **QUIET) == first
    assert model.training and not any(layer._forward_pre_hooks for layer in model.model.layers)
    assert loss(model.eval()) == before


def test_layerdrop_counts_depth_from_one():
    assert layerdrop(8, 0.5).layers == (0, 2, 4, 6)
    assert layerdrop(8, 0.25).layers == (0, 1, 2, 4, 5, 6)
    assert layerdrop(7, 0.3, prompt="skipped") == d3rt.StaticLayers((0, 1, 3, 4, 6), prompt="skipped")


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {}, "texts is empty"),
        ([[5]], {}, r"texts\[0\] has 1 tokens"),
        ("a text", {}, "one string"),
        (["a text"], {}, "no tokenizer"),
        (TEXTS, {"keep": 0}, "1..6"),
        (TEXTS, {"keep": 7}, "1..6"),
        (TEXTS, {"keep": 2.0}, "integer"),
    ],
)
@pytest.mark.parametrize("search", [shortgpt, greedy])
def test_refusals(search, texts, options, words):
    with pytest.raises(ValueError, match=words):
        search(tiny_models.make("llama"), texts, **({"keep": 3} | QUIET | options))


def test_a_folder_and_texts_are_taken_too(tmp_path):
    tokenizer = byte_tokenizer(tiny_models.VOCAB_SIZE)
    tokenizer.save_pretrained(tmp_path)
    model = tiny_models.make("llama")
    model.save_pretrained(tmp_path)
    texts = ["the quick brown fox", "jumps over"]
    ids = [tokenizer(text).input_ids for text in texts]
    assert greedy(str(tmp_path), texts, keep=3, **QUIET) == greedy(model, ids, keep=3, **QUIET)
    cut = block_influence(model, texts, tokenizer=tokenizer, max_tokens=4, **QUIET)
    assert cut == block_influence(model, [each[:4] for each in ids], **QUIET)


def test_a_bar_is_shown_on_stderr(capfd):
    shortgpt(tiny_models.make("llama"), TEXTS, keep=3)
    shown = capfd.readouterr()
    assert "block influence" in shown.err and not shown.out
