"""A runtime whose K,V cache is int8: one answer on every backend, however the prompt was cut and whoever is beside.

Two runs that differ in float32's roundings may give different codes to a value in the middle between two, and differ
by one of a line's 127 steps there. It happens to few values of many, so such runs are far closer to each other than
either is to a run with a float cache: that distance is the measure here.
"""

import pytest
import schedules
import tiny_models
import torch

import d3rt
from d3rt import prefill
from d3rt.backends.cpu import CpuBackend
from d3rt.kernels import kv_line
from d3rt.plan import LayerSet

STEPS = 16
LENGTHS = (23, 1, 7, 40)
PROMPTS = tiny_models.ragged(LENGTHS, seed=8)
INPUTS = tiny_models.left_padded(PROMPTS)
FORCED = [tiny_models.prompt(STEPS, seed=20 + row) for row in range(len(PROMPTS))]
# Root mean squares, of the distance between two int8 runs over that to a float run. Where prefill or steps read other
# values than the lines stand for, it is about 1.
CLOSE = 0.25


def rms(values):
    return values.double().square().mean().sqrt().item()


def forced_logits(name, policy=None, **options):
    """Logits [STEPS, B, V] of a ragged batch on tokens that are given, so that every step can be compared."""
    fast = tiny_models.runtime(name, policy, **options)
    out = fast.generate(
        **INPUTS,
        max_new_tokens=STEPS,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=[schedules.Forced(INPUTS["input_ids"].shape[1], FORCED)],
    )
    return torch.stack(out.logits)


def int8_logits(name, policy=None, **options):
    return forced_logits(name, policy, kv_cache_dtype="int8", **options)


def random_policy(name):
    return schedules.random_sets(5, tiny_models.make(name).config.num_hidden_layers, STEPS)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_cpu_and_reference_answer_alike(name):
    for policy in (None, random_policy(name)):
        floats, native, plain = (
            forced_logits(name, policy),
            int8_logits(name, policy),
            int8_logits(name, policy, backend="reference"),
        )
        assert rms(native - plain) <= CLOSE * rms(plain - floats)
        assert 0 < rms(plain - floats) <= 0.05 * rms(floats), "a line has 127 steps either way"


@pytest.mark.parametrize("chunk", [1, 3, 7, 24])
@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen2-window", "qwen3-window"])
def test_a_prompt_read_in_chunks_answers_as_one_read_at_once(name, chunk, monkeypatch):
    floats, at_once = forced_logits(name)[0], int8_logits(name)[0]  # by the ops of decode steps
    monkeypatch.setattr(CpuBackend, "short_prompt", lambda backend, w: 0)
    monkeypatch.setattr(prefill, "PREFILL_CHUNK_TOKENS", chunk)
    assert rms(int8_logits(name)[0] - at_once) <= CLOSE * rms(at_once - floats)


@pytest.mark.parametrize("short", [0, 128])
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_decode_steps_read_what_the_prefill_read(name, short, monkeypatch):
    """A prompt in the prefill, and the same prompt token by token through decode steps."""
    monkeypatch.setattr(CpuBackend, "short_prompt", lambda backend, w: short)
    prompt = tiny_models.prompt(30)
    logits = {}
    for kept in ("float32", "int8"):
        fast = tiny_models.runtime(name, kv_cache_dtype=kept)
        call = dict(eos_token_id=None, output_logits=True, return_dict_in_generate=True)
        logits[kept, "prefill"] = fast.generate(torch.tensor([prompt]), max_new_tokens=1, **call).logits[0]
        forced = [schedules.Forced(1, [[*prompt[1:], 3]])]
        steps = fast.generate(
            torch.tensor([prompt[:1]]), max_new_tokens=len(prompt), logits_processor=forced, **call
        )
        logits[kept, "steps"] = steps.logits[-1]
    lossy = rms(logits["int8", "prefill"] - logits["float32", "prefill"])
    assert rms(logits["int8", "steps"] - logits["int8", "prefill"]) <= CLOSE * lossy


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("policy", ["full", "d3-window-tail-1", "random-sublayers-1"])
def test_each_row_of_a_ragged_batch_equals_its_solo_run(policy, backend):
    fast = tiny_models.runtime(
        "llama", schedules.POLICIES[policy], backend=backend, kv_cache_dtype="int8", batch_size=4
    )
    options = dict(max_new_tokens=STEPS, eos_token_id=None)
    together = schedules.new_tokens(fast.generate(**INPUTS, **options), INPUTS)
    alone = [
        fast.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS
    ]
    assert together == alone


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_what_was_never_written_is_never_read_and_filling_it_changes_no_bit(policy, backend):
    answers = []
    for kv_fill, unwritten in (("auto", 0), ("auto", kv_line.POISON), ("eager", kv_line.POISON)):
        fast = tiny_models.runtime("llama", policy, backend=backend, kv_cache_dtype="int8", kv_fill=kv_fill)
        fast.engine.cache.k.fill_(unwritten)
        fast.engine.cache.v.fill_(unwritten)
        options = dict(max_new_tokens=STEPS, eos_token_id=None, return_dict_in_generate=True)
        answers.append(fast.generate(**INPUTS, **options, output_logits=True))
    for answer in answers[1:]:
        assert torch.equal(answer.sequences, answers[0].sequences)
        assert torch.equal(torch.stack(answer.logits), torch.stack(answers[0].logits))
        assert torch.stack(answer.logits).isfinite().all()


def test_a_poisoned_line_that_is_read_stops_the_generation():
    fast = tiny_models.runtime("llama", kv_cache_dtype="int8")
    rows = fast.engine.for_rows(1)
    fast.engine.cache.reset()
    fast.engine.decoder.prefill(
        [torch.tensor(PROMPTS[0])], LayerSet.full(6), fast.engine.cache, rows.buffers, 512
    )
    fast.engine.cache.v[3, 0, 1, 5] = kv_line.POISON
    program = fast.backend.record(
        lambda ops: fast.engine.decoder.decode_step(ops, full_plan(fast), rows.buffers)
    )
    rows.buffers.pos.add_(1)
    program.replay()
    assert rows.buffers.logits.isnan().all()


def full_plan(fast):
    return fast.policy.schedule(fast.config.num_hidden_layers, 2).plans(fast.kv_fill)[1]


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_the_prefill_writes_the_prompts_lines_and_nothing_else(name):
    fast = tiny_models.runtime(name, kv_cache_dtype="int8")
    cache, rows = fast.engine.cache, fast.engine.for_rows(4)
    cache.k.fill_(kv_line.POISON)
    cache.v.fill_(kv_line.POISON)
    layers = LayerSet.of((0, 2), fast.config.num_hidden_layers)
    fast.engine.decoder.prefill([torch.tensor(prompt) for prompt in PROMPTS], layers, cache, rows.buffers, 5)
    for tensor in (cache.k, cache.v):
        written = (tensor != kv_line.POISON).any(-1)
        expected = torch.zeros_like(written)
        for row, prompt in enumerate(PROMPTS):
            expected[[0, 2], row, :, : len(prompt)] = True
        assert torch.equal(written, expected)
        assert torch.equal(kv_line.decode(tensor).isfinite().all(-1), expected)


def test_the_bytes_read_are_those_of_lines_with_their_scales():
    prompt = torch.tensor([PROMPTS[0]])
    for kept, line in (("float32", 12 * 4), ("int8", 12 + 4)):
        fast = tiny_models.runtime("llama", kv_cache_dtype=kept)
        fast.generate(prompt, max_new_tokens=3, eos_token_id=None)
        positions = (LENGTHS[0] + 1, LENGTHS[0] + 2)
        assert fast.last_run.kv_bytes == (
            0,
            *(2 * 6 * 2 * line * n for n in positions),
        )  # K and V, layers, heads


@pytest.mark.demo_model
def test_the_embedded_model_speaks(demo):
    model, tokenizer = demo
    fast = d3rt.compile(model, weights="int8", kv_cache_dtype="int8")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(fast.generate(**ids, max_new_tokens=8)[0])
