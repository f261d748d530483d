"""Whole generations on the device: Hugging Face's tokens at full depth, the reference backend's with every policy, and
what is refused. Through the public API alone."""

import warnings

import pytest
import schedules
import stories260k
import tiny_models
import torch

import d3rt

STEPS = 20
RAGGED = (9, 1, 17, 4)


def new_tokens(fast, prompts, **options):
    inputs = tiny_models.left_padded(prompts)
    out = fast.generate(**inputs, **({"max_new_tokens": STEPS, "eos_token_id": None} | options))
    return schedules.new_tokens(out, inputs)


def on(backend, name, policy=None, **options):
    model = tiny_models.make(name, options.pop("model_dtype", torch.float32))
    return d3rt.compile(model, policy, backend=backend, **({"batch_size": 4, "max_seq_len": 96} | options))


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_full_depth_gives_hugging_faces_tokens_in_float32(name, backend):
    inputs = tiny_models.left_padded(tiny_models.ragged(RAGGED))
    expected = tiny_models.make(name).generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None
    )
    got = on(backend, name).generate(**inputs, max_new_tokens=STEPS, eos_token_id=None)
    assert torch.equal(got, expected)


@pytest.mark.demo_model
def test_full_depth_gives_hugging_faces_tokens_on_a_real_model(backend, demo, demo_prompts, demo_reference):
    model, tokenizer = demo
    fast = d3rt.compile(model, backend=backend, dtype="float32", max_seq_len=512)
    for name, prompt in demo_prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        out = fast.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None)
        assert out[0, inputs.input_ids.shape[1] :].tolist() == demo_reference[name][:32], name


def test_sixteen_bits_agree_with_float32_on_most_tokens(backend, record_property):
    model, prompt = stories260k.load(), torch.tensor([[stories260k.BOS]])
    options = dict(max_new_tokens=64, do_sample=False, eos_token_id=None)
    wide = model.generate(prompt, **options)[0].tolist()
    narrow = d3rt.compile(model, backend=backend, dtype="float16", max_seq_len=128).generate(
        prompt, **options
    )
    same = next(
        (at for at, pair in enumerate(zip(wide, narrow[0].tolist(), strict=True)) if len(set(pair)) > 1), 65
    )
    record_property("float16 tokens equal to float32's, of 64", same - 1)
    assert same > 8, "float16 differs from float32 at once: that is no rounding"


@pytest.mark.parametrize("policy", schedules.POLICIES.values(), ids=schedules.POLICIES.keys())
def test_every_policy_gives_the_reference_backends_tokens(policy, backend):
    prompts = tiny_models.ragged(RAGGED, seed=2)
    assert new_tokens(on(backend, "llama", policy), prompts) == new_tokens(
        on("reference", "llama", policy), prompts
    )


def test_d3_gives_the_reference_backends_tokens_on_a_real_model(backend):
    model, prompt = stories260k.load(), torch.tensor([[stories260k.BOS]])
    answers = [
        d3rt.compile(model, d3rt.D3(alpha=0.98, start=0.5), backend=name, max_seq_len=128).generate(
            prompt, max_new_tokens=64, eos_token_id=None
        )
        for name in (backend, "reference")
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(temperature=0.7, top_k=20), dict(top_p=0.8), dict(min_p=0.1), dict(repetition_penalty=1.2)],
    ids=str,
)
def test_sampling_draws_the_reference_backends_tokens(options, backend):
    prompts = tiny_models.ragged(RAGGED, seed=3)
    call = dict(do_sample=True, seed=11, **options)
    policy = schedules.POLICIES["d3-slide"]
    assert new_tokens(on(backend, "llama", policy), prompts, **call) == new_tokens(
        on("reference", "llama", policy), prompts, **call
    )


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_each_row_of_a_batch_is_what_it_is_alone(rows, backend):
    prompts = tiny_models.ragged([1 + 5 * row % 11 for row in range(rows)], seed=6)
    fast = on(backend, "llama-head-dim", batch_size=16)
    assert new_tokens(fast, prompts) == [new_tokens(fast, [prompt])[0] for prompt in prompts]


def test_rows_end_at_their_own_eos_and_disturb_no_other(backend):
    prompts = tiny_models.ragged(RAGGED, seed=8)
    fast = on(backend, "llama", schedules.POLICIES["d3-window-tail-1"])
    free = new_tokens(fast, prompts)
    eos, pad = free[1][4], 77
    answers = new_tokens(fast, prompts, eos_token_id=eos, pad_token_id=pad)
    for row, tokens in enumerate(free):
        end = tokens.index(eos) + 1 if eos in tokens else STEPS
        assert answers[row] == (tokens[:end] + [pad] * (STEPS - end))[: len(answers[row])]


def test_steps_that_python_drives_give_the_same_tokens(backend):
    prompts = tiny_models.ragged(RAGGED, seed=9)
    fast = on(backend, "llama", schedules.POLICIES["schedule-cycle"])
    assert new_tokens(fast, prompts, output_logits=True) == new_tokens(fast, prompts)


def test_every_step_is_a_graph_that_equals_eager_launches_bit_for_bit(backend):
    """The backend compares each graph with eager launches before it uses it, and warns where they differ, or where it
    cannot compare; then the step would not be a graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        fast = on(backend, "llama", schedules.POLICIES["d3-slide"])
        prompt = [tiny_models.prompt(9)]
        first = new_tokens(fast, prompt)
        assert new_tokens(fast, prompt) == first
    replayed = [program for program in fast.programs() if program.replays]
    assert replayed
    wanted = "graph" if backend == "cuda" else "tape"
    assert {getattr(program, "mode", "tape") for program in replayed} == {wanted}


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_weights_stay_close_to_the_same_values_unpacked(weights, backend):
    model = tiny_models.fresh("llama", **tiny_models.PACKABLE)
    call = dict(return_dict_in_generate=True, output_logits=True, max_new_tokens=1, do_sample=False)
    ids = torch.tensor([tiny_models.prompt(9)])
    logits = [
        d3rt.compile(model, backend=name, weights=weights, max_seq_len=64).generate(ids, **call).logits[0]
        for name in (backend, "reference")
    ]
    # the two multiply activations differently (kernels/cuda): as far apart as int8 activations are from exact ones
    got, right = (each.float().cpu() for each in logits)
    assert (got - right).abs().max() < 0.1 * right.abs().max()


def test_a_v100_is_refused_bfloat16(backend, arch):
    if arch >= 75:
        pytest.skip(f"sm_{arch} takes bfloat16")
    with pytest.raises(d3rt.UnsupportedOptionError, match="float16"):
        on(backend, "llama", dtype="bfloat16")


def test_a_batch_that_is_too_large_is_refused(backend):
    with pytest.raises(ValueError, match="17"):
        on(backend, "llama", batch_size=17)


def test_a_cache_that_does_not_fit_is_refused_with_its_size(backend):
    if backend != "cuda":
        pytest.skip("the CPU's cache costs address space, not memory")
    sizes = dict(max_position_embeddings=2**18, num_attention_heads=64, num_key_value_heads=64, head_dim=256)
    model = tiny_models.fresh("llama", **sizes)  # 3.3 TB of K,V
    with pytest.raises(d3rt.BackendUnavailableError, match="GB"):
        d3rt.compile(model, backend=backend, batch_size=16, max_seq_len=2**18)
