"""The prompt is read in chunks, its rows packed end to end: neither shows in the answer."""

import oracle
import pytest
import schedules
import tiny_models
import torch

import d3rt
from d3rt import engine
from d3rt.plan import LayerSet

STEPS = 8
LENGTHS = (23, 1, 7, 40)


def generate(fast, prompts):
    inputs = tiny_models.left_padded(prompts)
    out = fast.generate(
        **inputs,
        max_new_tokens=STEPS,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return schedules.new_tokens(out.sequences, inputs), torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 24])
@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen2-window", "qwen3-window"])
def test_a_prompt_read_in_chunks_equals_the_oracle(name, chunk, monkeypatch):
    prompts = tiny_models.ragged(LENGTHS)
    monkeypatch.setattr(engine, "PREFILL_CHUNK_TOKENS", chunk)
    fast = tiny_models.runtime(name, d3rt.D3(alpha=0.9, start=0.5))
    tokens, logits = generate(fast, prompts)
    plans = schedules.plans_of(fast, STEPS)
    runs = [schedules.truth(name, torch.float32, plans, tuple(prompt)) for prompt in prompts]
    assert tokens == [same.tokens for same, _ in runs]
    same, exact = (torch.stack([run[i].logits for run in runs]) for i in (0, 1))
    assert oracle.excess(logits, same, exact, torch.float32) <= 1


def test_chunks_in_bfloat16_stay_within_bfloat16s_error(monkeypatch):
    prompts = tiny_models.ragged(LENGTHS)
    monkeypatch.setattr(engine, "PREFILL_CHUNK_TOKENS", 7)
    fast = tiny_models.runtime("llama", dtype=torch.bfloat16)
    plans = schedules.plans_of(fast, 1)
    runs = [schedules.truth("llama", torch.bfloat16, plans, tuple(prompt)) for prompt in prompts]
    _, logits = generate(fast, prompts)
    same, exact = (torch.stack([run[i].logits for run in runs]) for i in (0, 1))
    assert oracle.excess(logits[:, :1].double(), same.double(), exact, torch.bfloat16) <= 1


@pytest.mark.parametrize("chunk", [1, 5, 512])
@pytest.mark.parametrize("name", ["llama-biases", "qwen2-window"])
def test_the_prefill_writes_the_prompts_kv_and_nothing_else(name, chunk, monkeypatch):
    prompts = tiny_models.ragged(LENGTHS)
    fast = tiny_models.runtime(name)
    cache, rows = fast.engine.cache, fast.engine.for_rows(4)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    layers = LayerSet.of((0, 1, 3), 4)
    fast.engine.decoder.prefill(
        [torch.tensor(prompt) for prompt in prompts], layers, cache, rows.buffers, chunk
    )
    for tensor in (cache.k, cache.v):
        written = tensor.isfinite()
        expected = torch.zeros_like(written)
        for row, prompt in enumerate(prompts):
            expected[[0, 1, 3], row, :, : len(prompt)] = True
        assert torch.equal(written, expected)
    lengths = torch.tensor(LENGTHS)
    assert torch.equal(cache.filled[[0, 1, 3]], lengths.int().expand(3, 4))
    assert (cache.filled[2] == 0).all()
    assert torch.equal(rows.buffers.pos, (lengths - 1).int())


def test_a_prompt_of_sublayers_equals_the_oracle():
    policy = d3rt.StaticLayers(attention=(0, 2), mlp=(1, 2, 3), prompt="skipped")
    fast = tiny_models.runtime("llama-mqa", policy)
    prompts = tiny_models.ragged(LENGTHS)
    plans = schedules.plans_of(fast, STEPS)
    expected = [oracle.generate(tiny_models.make("llama-mqa"), prompt, plans).tokens for prompt in prompts]
    assert generate(fast, prompts)[0] == expected
