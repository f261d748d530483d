"""The prompt is read in chunks, its rows packed end to end, by matrix products or, a short one, by the ops of decode
steps: none of it shows in the answer."""

import oracle
import pytest
import schedules
import tiny_models
import torch

import d3rt
from d3rt import prefill
from d3rt.backends import cpu
from d3rt.backends.cpu import CpuBackend
from d3rt.kernels import kv_line
from d3rt.models.decoder import Decoder
from d3rt.plan import LayerSet
from d3rt.prefill import Prefill

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
    monkeypatch.setattr(prefill, "PREFILL_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(CpuBackend, "short_prompt", lambda backend, w: 0)
    fast = tiny_models.runtime(name, d3rt.D3(alpha=0.9, start=0.5))
    tokens, logits = generate(fast, prompts)
    plans = schedules.plans_of(fast, STEPS)
    runs = [schedules.truth(name, torch.float32, plans, tuple(prompt)) for prompt in prompts]
    assert tokens == [same.tokens for same, _ in runs]
    same, exact = (torch.stack([run[i].logits for run in runs]) for i in (0, 1))
    assert oracle.excess(logits, same, exact, torch.float32) <= 1


def test_chunks_in_bfloat16_stay_within_bfloat16s_error(monkeypatch):
    prompts = tiny_models.ragged(LENGTHS)
    monkeypatch.setattr(prefill, "PREFILL_CHUNK_TOKENS", 7)
    monkeypatch.setattr(CpuBackend, "short_prompt", lambda backend, w: 0)
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


# -- short prompts ---------------------------------------------------------------------------------------------------

# Largest difference, as a part of the largest value. What is rounded on the way is rounded at other places.
CACHES = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.005, "int8": 0.1}
WEIGHTS = {"fp32": 1e-5, "bf16": 0.1, "fp16": 1e-5, "int8": 0.1, "int4": 0.1}


@pytest.fixture
def ways(monkeypatch):
    """Which way each chunk was read, in order, by whatever runtime."""
    seen = []

    def told(cls, method, way):
        run = getattr(cls, method)
        monkeypatch.setattr(cls, method, lambda *given: seen.append(way) or run(*given))

    told(Decoder, "run_chunk", "products")
    told(Prefill, "_run_slots", "slots")
    return seen


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_a_short_prompt_equals_the_oracle(name, ways):
    """Of four rows with 71 tokens, in five chunks of which most hold tokens of several rows."""
    prompts = tiny_models.ragged(LENGTHS)
    fast = tiny_models.runtime(name, d3rt.D3(alpha=0.9, start=0.5))
    tokens, logits = generate(fast, prompts)
    assert ways == ["slots"] * 5
    plans = schedules.plans_of(fast, STEPS)
    runs = [schedules.truth(name, torch.float32, plans, tuple(prompt)) for prompt in prompts]
    assert tokens == [same.tokens for same, _ in runs]
    same, exact = (torch.stack([run[i].logits for run in runs]) for i in (0, 1))
    assert oracle.excess(logits, same, exact, torch.float32) <= 1


@pytest.mark.parametrize(("tokens", "expected"), [(128, ["slots"] * 8), (129, ["products"])])
def test_a_prompt_is_short_up_to_128_tokens(tokens, expected, ways):
    fast = tiny_models.runtime("llama")
    fast.generate(torch.tensor(tiny_models.ragged([tokens])), max_new_tokens=1)
    assert ways == expected


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_prompt_is_short_up_to_32_tokens_where_weights_are_packed(weights, ways):
    model = tiny_models.fresh("llama", **tiny_models.PACKABLE)
    fast = d3rt.compile(model, weights=weights, max_seq_len=70, threads=2, backend="cpu")
    for tokens in (32, 33):
        fast.generate(torch.tensor(tiny_models.ragged([tokens])), max_new_tokens=1)
    assert ways == ["slots", "slots", "products"]


@pytest.mark.parametrize(
    ("dtype", "rows", "tokens"),
    [
        (torch.float32, 64, 128),
        (torch.bfloat16, 1024, 768),
        (torch.bfloat16, 1025, 128),
        (torch.float16, 4096, 768),
    ],
)
def test_longer_prompts_are_short_where_products_are_slow(dtype, rows, tokens, monkeypatch):
    """Where they would widen the weights, and for small matrices of bfloat16."""
    monkeypatch.setattr(cpu, "gemm_dtypes", lambda: {torch.float32, torch.bfloat16})
    assert CpuBackend(1).short_prompt(torch.empty(rows, 1024, dtype=dtype, device="meta")) == tokens


def test_no_prompt_is_short_where_kernels_are_scalar(monkeypatch, ways):
    monkeypatch.setenv("D3RT_CPU_ISA", "scalar")
    tiny_models.runtime("llama").generate(torch.tensor(tiny_models.ragged([3])), max_new_tokens=1)
    assert ways == ["products"]


@pytest.mark.parametrize("kept", CACHES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_both_ways_leave_the_same(weights, kept):
    """Prompts that go on where others ended, in lines that are not their rows': within the rounding of the cache and
    of bfloat16 or quantised activations, the same K,V, hidden states and lengths; and nothing else is touched."""
    model = tiny_models.fresh("llama", **tiny_models.PACKABLE)
    fast = d3rt.compile(
        model, weights=weights, kv_cache_dtype=kept, max_seq_len=70, batch_size=3, threads=2, backend="cpu"
    )
    cache, rows, layers = fast.engine.cache, fast.engine.for_rows(2), LayerSet.of((0, 1, 3), 6)
    prompts = [torch.tensor(prompt) for prompt in tiny_models.ragged((9, 14))]
    starts, lines = (4, 0), (2, 0)
    left = []
    for short in (0, 32):
        prefiller = fast.engine.prefiller
        cache.reset()
        cache.k.fill_(77), cache.v.fill_(77)
        prefiller.short = 0
        prefiller.read([prompts[0][:4]], layers, fast.engine.for_rows(1).buffers, lines=lines[:1])
        prefiller.short = short
        prefiller.read(prompts, layers, rows.buffers, starts, lines)
        rows.first_logits.replay()
        left.append([each.clone() for each in (cache.filled, rows.buffers.pos, rows.buffers.logits)])
        for each in (cache.k, cache.v):
            for line, length in zip(lines, (9, 14), strict=True):
                kept_lines = each[[0, 1, 3], line, :, :length].clone()
                left[-1].append(kv_line.decode(kept_lines) if kept == "int8" else kept_lines.float())
                each[[0, 1, 3], line, :, :length] = 77
            assert (each == 77).all()
    bound = max(CACHES[kept], WEIGHTS[weights])
    for products, slots in zip(*left, strict=True):
        assert products.shape == slots.shape
        if products.dtype == torch.int32:
            assert torch.equal(products, slots)
        else:
            assert (products - slots).abs().max() <= bound * products.abs().max()


def test_a_warmup_records_what_short_prompts_need(monkeypatch):
    fast = tiny_models.runtime("llama", d3rt.StaticLayers(layers=(0, 3), prompt="skipped"))
    fast.warmup(rows=1)
    monkeypatch.setattr(fast.backend, "record", None)
    for tokens in (1, 7, 16, 45):
        fast.generate(torch.tensor(tiny_models.ragged([tokens])), max_new_tokens=2)


def test_the_slots_of_short_prompts_count_as_memory():
    fast = tiny_models.runtime("llama")
    before = fast.memory().buffers - fast.backend.scratch_bytes
    fast.engine.prefiller.record(LayerSet.full(6))
    slot = 4 * (1 + 1 + 1 + 48 + 48 + 48 + 89)  # token, pos, line, x, q, attended, h
    assert fast.memory().buffers - fast.backend.scratch_bytes == before + 16 * slot
