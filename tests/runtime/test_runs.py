"""What a generation runs and leaves behind: layers executed, filled lengths, recorded steps, and its limits."""

import pytest
import schedules
import tiny_models
import torch

import d3rt
from d3rt.kernels import reference

BACKENDS = ("reference", "cpu")
STEPS = 14


def options(eos=None):
    return dict(max_new_tokens=STEPS, eos_token_id=eos)


@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_the_sublayers_executed_are_those_of_the_schedule(policy, monkeypatch):
    executed = {"norm_qkv_rope": 0, "attention": 0, "norm_gate_up": 0, "kv_fill": 0}

    def counting(op):
        original = getattr(reference, op)

        def run(first, *rest):
            executed[op] += len(first) if op == "kv_fill" else 1
            original(first, *rest)

        return run

    for op in executed:
        monkeypatch.setattr(reference, op, counting(op))
    fast = tiny_models.runtime("llama", policy, backend="reference")
    fast.generate(torch.tensor([tiny_models.prompt(5)]), **options())
    plans = schedules.plans_of(fast, STEPS)[1:]
    attention = sum(len(plan.layer_set.attention_layers) for plan in plans)
    mlp = sum(len(plan.layer_set.mlp_layers) for plan in plans)
    fills = sum(len(plan.fill_layers) for plan in plans)
    assert executed == dict(norm_qkv_rope=attention, attention=attention, norm_gate_up=mlp, kv_fill=fills)
    assert (attention + mlp) / 2 == sum(fast.last_run.depths[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_replays_times_depth_is_the_sum_of_depths(policy, backend):
    fast = tiny_models.runtime("llama", policy, backend=backend)
    ids = torch.tensor([tiny_models.prompt(5)])
    fast.generate(ids, **options())
    fast.generate(ids, **options(), output_logits=True)
    programs = fast.programs()
    assert sum(program.replays for program in programs) == 2 * (STEPS - 1)
    schedule = policy.schedule(6, STEPS)
    assert sum(program.replays * program.depth for program in programs) == 2 * sum(schedule.depths[1:])
    assert fast.last_run.depths == (schedule.prompt_set.depth, *schedule.depths[1:])
    assert {program.plan for program in programs} == set(schedules.plans_of(fast, STEPS)[1:])


def test_a_generation_that_ends_early_counts_the_steps_that_ran():
    fast = tiny_models.runtime("llama", schedules.POLICIES["d3-window-tail-1"])
    ids = torch.tensor([tiny_models.prompt(5)])
    tokens = fast.generate(ids, **options())[0, 5:].tolist()
    ended = next(step for step in range(3, STEPS) if tokens[step] not in tokens[:step])
    fast.generate(ids, **options(eos=tokens[ended]))
    assert fast.last_run.steps == ended + 1
    assert sum(program.replays for program in fast.programs()) == STEPS - 1 + ended


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_fill", ["auto", "eager"])
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_filled_lengths_say_how_far_each_layers_kv_is_complete(policy, kv_fill, backend):
    fast = tiny_models.runtime("llama", policy, backend=backend, kv_fill=kv_fill)
    prompts = tiny_models.ragged((5, 2, 8))
    inputs = tiny_models.left_padded(prompts)
    free = schedules.new_tokens(fast.generate(**inputs, **options()), inputs)
    # Row 0 ends at step 6 (or before); the others go on unless they say the same token.
    eos = free[0][6]
    new = schedules.new_tokens(fast.generate(**inputs, **options(eos)), inputs)
    plans = schedules.plans_of(fast, STEPS)
    for row, prompt in enumerate(prompts):
        emitted = new[row].index(eos) + 1 if eos in new[row] else STEPS
        for layer in range(6):
            # The prompt and each consumed token up to the first hole; the last token was consumed by no step.
            complete = len(prompt) if layer in plans[0].layer_set.attention_layers else 0
            for step in range(1, emitted):
                written = (*plans[step].layer_set.attention_layers, *plans[step].fill_layers)
                if complete == len(prompt) + step - 1 and layer in written:
                    complete += 1
            assert fast.engine.cache.filled[layer, row] == complete, f"layer {layer}, row {row}"


def test_eager_filling_leaves_every_layer_complete():
    fast = tiny_models.runtime("llama", schedules.POLICIES["d3-slide"], kv_fill="eager")
    fast.generate(torch.tensor([tiny_models.prompt(5)]), **options())
    assert (fast.engine.cache.filled[:, 0] == 5 + STEPS - 1).all()


# -- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_seq_len", [24, 64, 65])
def test_a_sequence_may_fill_the_cache_to_the_last_place(max_seq_len, backend):
    inputs = tiny_models.left_padded(tiny_models.ragged((10, 3)))
    new = max_seq_len - 10
    expected = tiny_models.make("llama").generate(
        **inputs, max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    fast = tiny_models.runtime("llama", backend=backend, max_seq_len=max_seq_len)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=new, eos_token_id=None), expected)
    with pytest.raises(ValueError, match=f"exceed max_seq_len={max_seq_len}"):
        fast.generate(**inputs, max_new_tokens=new + 1, eos_token_id=None)


def test_a_sequence_may_use_every_position_of_the_model():
    ids = torch.tensor([tiny_models.prompt(12)])
    fast = tiny_models.runtime("llama")
    assert fast.max_seq_len == 160
    expected = tiny_models.make("llama").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=148, do_sample=False, eos_token_id=None
    )
    assert torch.equal(fast.generate(ids, max_new_tokens=148, eos_token_id=None), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_ends_early_stands_still_at_the_edge_of_the_cache(backend):
    inputs = tiny_models.left_padded(tiny_models.ragged((10, 10)))
    fast = tiny_models.runtime("llama", backend=backend, max_seq_len=10 + STEPS)
    free = schedules.new_tokens(fast.generate(**inputs, **options()), inputs)
    eos = next(token for token in free[0][-3:-1] if token not in free[1])  # near the end, in row 0 only
    new = schedules.new_tokens(fast.generate(**inputs, **options(eos)), inputs)
    assert new[1] == free[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_new_token_needs_no_step(backend):
    fast = tiny_models.runtime("llama", backend=backend, max_seq_len=9)
    ids = torch.tensor([tiny_models.prompt(8)])
    expected = tiny_models.make("llama")(ids).logits[0, -1].argmax()
    assert fast.generate(ids, max_new_tokens=1)[0, 8] == expected
    assert fast.programs() == []


# -- what is recorded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_second_call_records_nothing(backend, monkeypatch):
    fast = tiny_models.runtime("llama", schedules.POLICIES["schedule-cycle"], backend=backend)
    ids = torch.tensor([tiny_models.prompt(5)])
    first = fast.generate(ids, **options())
    monkeypatch.setattr(fast.backend, "record", None)
    assert torch.equal(fast.generate(ids, **options()), first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_fill", ["auto", "eager"])
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_after_a_warmup_no_generation_of_that_length_records(policy, kv_fill, backend, monkeypatch):
    fast = tiny_models.runtime("llama", policy, backend=backend, kv_fill=kv_fill)
    count = fast.warmup(max_new_tokens=STEPS, rows=1)
    # A shorter generation can need other fills than the beginning of a longer one.
    needed = {plan for steps in range(1, STEPS + 1) for plan in schedules.plans_of(fast, steps)[1:]}
    assert {program.plan for program in fast.programs()} == needed and count == len(needed)
    monkeypatch.setattr(fast.backend, "record", None)
    ids = torch.tensor([tiny_models.prompt(5)])
    for new_tokens in range(1, STEPS + 1):
        fast.generate(ids, max_new_tokens=new_tokens, eos_token_id=None)
    assert len(fast.programs()) == count


def test_equal_steps_share_one_recording():
    fast = tiny_models.runtime("llama", d3rt.StaticLayers(layers=(0, 3)))
    fast.generate(torch.tensor([tiny_models.prompt(5)]), **options())
    (program,) = fast.programs()
    assert program.replays == STEPS - 1


def test_a_bad_token_in_the_buffer_is_refused_before_anything_runs():
    fast = tiny_models.runtime("llama")
    fast.generate(torch.tensor([tiny_models.prompt(5)]), max_new_tokens=2, eos_token_id=None)
    rows = fast.engine.for_rows(1)
    rows.loop.begin()
    rows.loop.commit([tiny_models.VOCAB_SIZE], [False])
    fast.engine.cache.filled.fill_(100)
    with pytest.raises(ValueError, match=r"token\[0\] is 131, but must be in 0..130"):
        rows.loop.step(0)
