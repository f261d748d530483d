"""A row of a batch is what it is alone: whoever is beside it, wherever it stands, whenever the others end."""

import pytest
import schedules
import tiny_models
import torch

BACKENDS = ("reference", "cpu")
STEPS = 16
LENGTHS = (7, 1, 12, 3)


def generate(fast, prompts, **options):
    inputs = tiny_models.left_padded(prompts)
    out = fast.generate(**inputs, **({"max_new_tokens": STEPS, "eos_token_id": None} | options))
    return schedules.new_tokens(out, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_each_row_of_a_ragged_batch_equals_its_solo_run(policy, backend):
    prompts = tiny_models.ragged(LENGTHS, seed=3)
    fast = tiny_models.runtime("llama", policy, backend=backend)
    assert generate(fast, prompts) == [generate(fast, [prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window", "qwen3"])
def test_each_row_equals_its_solo_run_on_other_families(name):
    prompts = tiny_models.ragged(LENGTHS, seed=4)
    layers = tiny_models.make(name).config.num_hidden_layers
    fast = tiny_models.runtime(name, schedules.random_sets(4, layers, STEPS))
    assert generate(fast, prompts) == [generate(fast, [prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_the_rows_does_not_matter(backend):
    prompts = tiny_models.ragged(LENGTHS, seed=5)
    fast = tiny_models.runtime("llama", schedules.POLICIES["schedule-cycle"], backend=backend)
    answers = generate(fast, prompts)
    for order in ((3, 2, 1, 0), (2, 0, 3, 1)):
        assert generate(fast, [prompts[row] for row in order]) == [answers[row] for row in order]


def test_equal_rows_get_equal_answers():
    prompt = tiny_models.prompt(9)
    fast = tiny_models.runtime("llama", schedules.POLICIES["d3-slide"])
    answers = generate(fast, [prompt] * 4)
    assert answers == [answers[0]] * 4


@pytest.mark.parametrize("batch", range(1, 17))
def test_every_batch_size_gives_the_rows_of_the_model(batch):
    prompts = tiny_models.ragged([1 + 5 * row % 11 for row in range(batch)], seed=6)
    inputs = tiny_models.left_padded(prompts)
    expected = tiny_models.make("llama-head-dim").generate(
        **inputs, max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    fast = tiny_models.runtime("llama-head-dim", batch_size=16)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=10, eos_token_id=None), expected)


def test_smaller_batches_in_the_same_runtime_leave_each_other_alone():
    prompts = tiny_models.ragged(LENGTHS, seed=7)
    fast = tiny_models.runtime("llama", schedules.POLICIES["d3-window-tail-1"])
    first = {rows: generate(fast, prompts[:rows]) for rows in (4, 1, 3, 2)}
    for rows, answer in first.items():
        assert generate(fast, prompts[:rows]) == answer == first[4][:rows]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_fill", ["auto", "eager"])
@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_a_row_that_ends_early_is_padded_and_disturbs_no_other(policy, kv_fill, backend):
    prompts = tiny_models.ragged(LENGTHS, seed=8)
    fast = tiny_models.runtime("llama", policy, backend=backend, kv_fill=kv_fill)
    free = generate(fast, prompts)
    eos, pad = free[1][4], 77
    answers = generate(fast, prompts, eos_token_id=eos, pad_token_id=pad)
    for row, tokens in enumerate(free):
        end = tokens.index(eos) + 1 if eos in tokens else STEPS
        width = len(answers[row])
        assert answers[row] == (tokens[:end] + [pad] * (STEPS - end))[:width]
    longest = max(row.index(eos) + 1 if eos in row else STEPS for row in free)
    assert len(answers[0]) == longest


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_also_end_early_when_python_drives_the_steps(backend):
    prompts = tiny_models.ragged(LENGTHS, seed=8)
    fast = tiny_models.runtime("llama", schedules.POLICIES["schedule-cycle"], backend=backend)
    options = dict(eos_token_id=generate(fast, prompts)[1][4], pad_token_id=77)
    assert generate(fast, prompts, **options, output_logits=True) == generate(fast, prompts, **options)


def test_what_a_call_generated_does_not_depend_on_the_calls_before():
    prompts = tiny_models.ragged(LENGTHS, seed=9)
    used = tiny_models.runtime("llama", schedules.POLICIES["random-sublayers-1"])
    generate(used, tiny_models.ragged((40, 33, 20), seed=1), max_new_tokens=30)
    generate(used, prompts[:2], eos_token_id=5)
    new = tiny_models.runtime("llama", schedules.POLICIES["random-sublayers-1"])
    assert generate(used, prompts) == generate(new, prompts)
