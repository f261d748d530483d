"""A fill writes exactly the K,V that the skipped layer's own norm, projections and RoPE make of the hidden state."""

import oracle
import pytest
import schedules
import tiny_models
import torch

import d3rt
from d3rt.plan import Action, LayerSet, Plan

BACKENDS = ("reference", "cpu")
STEPS = 16
PROMPTS = tiny_models.ragged((6, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "llama-biases", "llama-llama3-rope", "qwen2-window", "qwen3"])
def test_the_cache_holds_what_the_models_own_layers_make_of_the_hidden_state(name, dtype, backend):
    layers = tiny_models.make(name).config.num_hidden_layers
    policy = schedules.random_sets(7, layers, STEPS)
    fast = tiny_models.runtime(name, policy, backend=backend, dtype=dtype, kv_fill="eager")
    plans = schedules.plans_of(fast, STEPS)
    filled = {action for plan in plans for _, action, _ in plan}
    assert Action.FILL in filled and Action.RUN in filled
    runs = [schedules.truth(name, dtype, plans, tuple(prompt)) for prompt in PROMPTS]
    inputs = tiny_models.left_padded(PROMPTS)
    fast.generate(
        **inputs,
        max_new_tokens=STEPS,
        eos_token_id=None,
        logits_processor=[schedules.Forced(inputs["input_ids"].shape[1], [same.tokens for same, _ in runs])],
    )
    for row, (same, exact) in enumerate(runs):
        # The last token's K,V are not written: no step has consumed it.
        places = [(layer, pos) for layer in range(layers) for pos in range(len(PROMPTS[row]) + STEPS - 1)]
        for cache, read in ((fast.engine.cache.k, oracle.Run.keys), (fast.engine.cache.v, oracle.Run.values)):
            ours = torch.stack([cache[layer, row, :, pos] for layer, pos in places])
            theirs, truth = (torch.stack([read(run, *place) for place in places]) for run in (same, exact))
            assert ours.dtype == dtype
            assert oracle.excess(ours.double(), theirs.double(), truth, dtype) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_writes_its_own_position_in_the_layers_it_runs_or_fills_and_nothing_else(backend):
    fast = tiny_models.runtime("llama", backend=backend, batch_size=3)
    rows = fast.engine.for_rows(2)
    cache, buf = fast.engine.cache, rows.buffers
    prompts = [torch.tensor(prompt) for prompt in PROMPTS]
    cache.reset()
    fast.engine.decoder.prefill(prompts, LayerSet.full(6), cache, buf, 512)
    rows.loop.begin()
    rows.loop.commit([3, 4], [False, False])
    # A value that no K,V is, in every place the prompts have not written, the third slot included.
    for row, prompt in enumerate([*prompts, ()]):
        cache.k[:, row, :, len(prompt) :] = cache.v[:, row, :, len(prompt) :] = 12345.0
    before = cache.k.clone(), cache.v.clone()
    plan = Plan.of(LayerSet.of_sublayers((0, 5), (0, 2, 5), 6), fill=(1, 3))
    rows.loop.step(rows.number(plan))
    for old, new in zip(before, (cache.k, cache.v), strict=True):
        changed = old != new
        expected = torch.zeros_like(changed)
        for layer in (0, 1, 3, 5):
            for row, prompt in enumerate(prompts):
                expected[layer, row, :, len(prompt)] = True
        assert torch.equal(changed, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_filling_all_skipped_layers_changes_no_bit_of_the_answer(policy, backend):
    inputs = tiny_models.left_padded(PROMPTS)
    answers = []
    for kv_fill in ("auto", "eager"):
        fast = tiny_models.runtime("llama", policy, backend=backend, kv_fill=kv_fill)
        options = dict(max_new_tokens=STEPS, eos_token_id=None, return_dict_in_generate=True)
        answers.append(fast.generate(**inputs, **options, output_logits=True))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert torch.equal(torch.stack(answers[0].logits), torch.stack(answers[1].logits))


def test_auto_fills_only_what_a_later_step_reads():
    policy = d3rt.LayerSchedule(sets=((0,), (0, 5), (0, 3, 5), (0, 5)))
    fast = tiny_models.runtime("llama", policy)
    prompt = tiny_models.prompt(4)
    fast.engine.cache.k.fill_(torch.nan)
    fast.generate(torch.tensor([prompt]), max_new_tokens=5, eos_token_id=None)
    written = [
        (layer, int(pos))
        for layer in range(6)
        for pos in fast.engine.cache.k[layer, 0, 0, :, 0].isfinite().nonzero()
    ]
    expected = {(layer, pos) for layer in range(6) for pos in range(4)}
    expected |= {(layer, pos) for layer in (0, 5) for pos in range(4, 8)}
    expected |= {(3, 4), (3, 5)}  # filled at step 1, run at step 2, then not needed any more
    assert set(written) == expected
