"""K,V that was never written is never read: it may hold NaN, and a step that would read it is refused."""

import oracle
import pytest
import schedules
import tiny_models
import torch

import d3rt
from d3rt.errors import HoleError
from d3rt.plan import LayerSet, Plan
from d3rt.sampling import SamplingParams

BACKENDS = ("reference", "cpu")
STEPS = 20


def answer(fast, inputs, poison):
    """Tokens and logits of STEPS steps, after filling the whole cache with `poison`."""
    fast.engine.cache.k.fill_(poison)
    fast.engine.cache.v.fill_(poison)
    out = fast.generate(
        **inputs,
        max_new_tokens=STEPS,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    fast.engine.cache.k.fill_(poison)
    fast.engine.cache.v.fill_(poison)
    native = fast.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None)
    assert torch.equal(native, out.sequences)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_nan_in_every_unwritten_place_changes_no_bit(policy, backend):
    fast = tiny_models.runtime("llama", policy, backend=backend)
    inputs = tiny_models.left_padded(tiny_models.ragged((7, 1, 12)))
    tokens, logits = answer(fast, inputs, 0.0)
    poisoned_tokens, poisoned_logits = answer(fast, inputs, torch.nan)
    assert torch.equal(poisoned_tokens, tokens)
    assert torch.equal(poisoned_logits, logits)


@pytest.mark.parametrize("policy", schedules.NESTED.values(), ids=schedules.NESTED.keys())
def test_a_nested_policy_fills_nothing_and_leaves_the_holes_as_they_were(policy):
    fast = tiny_models.runtime("llama", policy)
    prompt = tiny_models.prompt(7)
    fast.engine.cache.k.fill_(torch.nan)
    fast.engine.cache.v.fill_(torch.nan)
    fast.generate(torch.tensor([prompt]), max_new_tokens=STEPS, eos_token_id=None)
    plans = schedules.plans_of(fast, STEPS)
    for step, plan in enumerate(plans[1:]):
        assert plan.fill_layers == ()
        for layer in range(6):
            k, v = (
                cache[layer, 0, :, len(prompt) + step] for cache in (fast.engine.cache.k, fast.engine.cache.v)
            )
            if layer in plan.layer_set.attention_layers:
                assert k.isfinite().all() and v.isfinite().all()
            else:
                assert k.isnan().all() and v.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window", "qwen3-window"])
def test_a_window_never_reads_what_it_has_left_behind(name, backend):
    prompt, steps = tiny_models.prompt(12), 10
    fast = tiny_models.runtime(name, backend=backend)
    windows = oracle.windows_of(tiny_models.make(name).config)
    expected = oracle.generate(tiny_models.make(name), prompt, schedules.plans_of(fast, steps)).tokens
    rows = begin(fast, prompt)
    tokens = [int(rows.buffers.logits[0].argmax())]
    plan = Plan.of(LayerSet.full(4))
    for step in range(1, steps):
        rows.loop.commit([tokens[-1]], [False])
        pos = len(prompt) + step - 1
        for layer, window in enumerate(windows):
            if window:
                fast.engine.cache.k[layer, :, :, : pos + 1 - window] = torch.nan
                fast.engine.cache.v[layer, :, :, : pos + 1 - window] = torch.nan
        rows.loop.step(rows.number(plan))
        tokens.append(int(rows.buffers.logits[0].argmax()))
    assert tokens == expected


def begin(fast, prompt):
    """Prefills one row through all layers and stands before step 0's choice, as the runtime does."""
    rows = fast.engine.for_rows(1)
    fast.engine.cache.reset()
    whole = LayerSet.full(fast.config.num_hidden_layers)
    fast.engine.decoder.prefill([torch.tensor(prompt)], whole, fast.engine.cache, rows.buffers, 512)
    rows.first_logits.replay()
    rows.loop.begin()
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_would_read_a_hole_is_refused_by_name(backend):
    fast = tiny_models.runtime("llama", backend=backend)
    rows = begin(fast, tiny_models.prompt(5))
    some, whole = Plan.of(LayerSet.of((0, 1, 5), 6)), Plan.of(LayerSet.full(6))
    rows.loop.commit([3], [False])
    rows.loop.step(rows.number(some))
    rows.loop.commit([4], [False])
    logits = rows.buffers.logits.clone()
    with pytest.raises(HoleError, match="layer 2 of slot 0 has K,V for 5 positions, but this step reads 6"):
        rows.loop.step(rows.number(whole))
    assert torch.equal(rows.buffers.logits, logits), "the refused step ran"
    rows.loop.step(rows.number(some))  # and what reads no hole still runs
    assert not torch.equal(rows.buffers.logits, logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fill_that_comes_after_a_hole_does_not_hide_it(backend):
    fast = tiny_models.runtime("llama", backend=backend)
    rows = begin(fast, tiny_models.prompt(5))
    without = LayerSet.of((0, 1, 3, 4, 5), 6)
    for plan in (Plan.of(without), Plan.of(without, fill=(2,))):
        rows.loop.commit([3], [False])
        rows.loop.step(rows.number(plan))
    rows.loop.commit([3], [False])
    with pytest.raises(HoleError, match="layer 2 of slot 0 has K,V for 5 positions, but this step reads 7"):
        rows.loop.step(rows.number(Plan.of(LayerSet.full(6))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_generation_stops_at_a_hole_and_the_runtime_lives_on(backend):
    fast = tiny_models.runtime("llama", backend=backend)
    ids = torch.tensor([tiny_models.prompt(5)])
    before = fast.generate(ids, max_new_tokens=6, eos_token_id=None)
    rows = begin(fast, tiny_models.prompt(5))
    some, whole = Plan.of(LayerSet.of((0, 5), 6)), Plan.of(LayerSet.full(6))
    programs = [rows.number(plan) for plan in (whole, some, whole, whole)]
    rows.loop.start(programs=programs, eos_tokens=[], pad_token=0, sampling=SamplingParams(), seen=[])
    with pytest.raises(HoleError, match="layer 1 of slot 0"):
        while not rows.loop.wait(5.0):
            pass
    rows.loop.cancel()
    assert torch.equal(fast.generate(ids, max_new_tokens=6, eos_token_id=None), before)


def test_a_prompt_that_skipped_layers_cannot_be_followed_by_a_step_that_runs_them():
    policy = d3rt.LayerSchedule(sets=((0, 1), (0, 1), (0, 1, 2)), prompt="skipped")
    fast = tiny_models.runtime("llama", policy)
    with pytest.raises(d3rt.PolicyError, match="step 2 runs the attention of layers 2"):
        fast.generate(torch.tensor([[5, 6]]), max_new_tokens=3)
