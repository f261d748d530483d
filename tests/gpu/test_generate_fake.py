"""A real, tiny model generates on the cuda backend without a GPU: dispatcher, CUDA graphs over a fake driver, and the
PTX of every kernel executed by the interpreter. The tokens are those of Hugging Face, the oracle, the reference."""

from __future__ import annotations

import gc

import oracle
import pytest
import stories260k
import tiny_models
import torch

import d3rt
from d3rt.errors import CudaError, HoleError, NotFiniteError
from d3rt.models import family_of
from d3rt.plan import LayerSet, Plan
from d3rt.sampling import SamplingParams

pytest.importorskip("triton", reason="triton is not installed")

from fake_gpu import FakeGpu  # noqa: E402

LENGTH = 96
PROMPT = [stories260k.BOS, 403, 407, 261, 378]
OTHER = [stories260k.BOS, 410]
STEPS = 16
D3 = d3rt.D3(alpha=0.92, start=0.2)
UP_AND_DOWN = d3rt.LayerSchedule(sets=((0, 1, 2, 3, 4), (0, 4), (0, 2, 4), (1, 3)), cycle=True)


@pytest.fixture
def gpu(monkeypatch):
    """An A100, as far as its kernels go."""
    fake = FakeGpu(80, monkeypatch)
    monkeypatch.setitem(d3rt.backends._MAKERS, "cuda", lambda threads: fake.backend())
    yield fake
    fake.check()
    fake.driver.run_by(None)


def runtime(policy=None, dtype=torch.float32, backend="cuda", **options):
    options = {"max_seq_len": LENGTH} | options
    return d3rt.compile(stories260k.load(dtype), policy, backend=backend, **options)


def padded(prompts):
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[stories260k.EOS] * (width - len(row)) + row for row in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts]),
    }


def hugging_face(prompts, dtype=torch.float32, **options):
    options = {"do_sample": False, "max_new_tokens": STEPS} | options
    return stories260k.load(dtype).generate(**padded(prompts), **options)


def test_the_first_look_at_a_prompt_is_checked_against_launches_one_by_one(gpu):
    runtime().generate(torch.tensor([PROMPT]), max_new_tokens=2)
    # The step and the first token's sampling, once for the check and once for the generation; the prompt's logits.
    assert gpu.driver.count("cuGraphLaunch") == 4
    assert gpu.driver.count("cuLaunchKernel") == 1


def test_the_first_check_is_made_on_a_state_in_which_a_wrong_step_shows(gpu):
    seen, launch = [], gpu.launch

    def noting(each, behind):
        if each.op == "attention":
            seen.append((each.arguments["pos"].tolist(), each.arguments["k_cache"].clone()))
        launch(each, behind)

    gpu.launch = noting
    runtime(batch_size=2).generate(**padded([PROMPT, OTHER]), max_new_tokens=2)
    pos, keys = seen[0]
    assert min(pos) > 1 and pos[0] != pos[1]
    for slot, last in enumerate(pos):
        assert (keys[slot, :, :last].diff(dim=1).abs().amax(2) > 0.1).all(), "positions that are alike"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_full_depth_gives_hugging_faces_tokens(gpu, dtype):
    fast = runtime(dtype=dtype)
    out = fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS)
    assert torch.equal(out, hugging_face([PROMPT], dtype))
    (program,) = fast.programs()
    assert (program.mode, program.replays) == ("graph", STEPS - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("policy", [D3, UP_AND_DOWN], ids=["d3", "up_and_down"])
def test_a_policy_gives_the_oracles_tokens_with_a_graph_for_each_plan(gpu, policy, dtype):
    fast = runtime(policy, dtype)
    plans = policy.schedule(5, STEPS).plans("auto")
    out = fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS, eos_token_id=None)
    assert out[0, len(PROMPT) :].tolist() == oracle.generate(stories260k.load(dtype), PROMPT, plans).tokens
    modes = {program.plan: program.mode for program in fast.programs()}
    assert modes == dict.fromkeys(plans[1:], "graph")
    assert len(modes) >= 3


def test_rows_of_a_padded_batch_stop_at_their_own_eos(gpu):
    free = hugging_face([PROMPT, OTHER], eos_token_id=None)
    eos = [int(free[0, len(PROMPT) + 3]), int(free[1, len(PROMPT) + 6])]
    expected = hugging_face([PROMPT, OTHER], eos_token_id=eos, pad_token_id=7)
    out = runtime(batch_size=2).generate(
        **padded([PROMPT, OTHER]), max_new_tokens=STEPS, eos_token_id=eos, pad_token_id=7
    )
    assert torch.equal(out, expected)
    assert out.shape[1] < len(PROMPT) + STEPS and 7 in out[:, len(PROMPT) :]


def test_the_next_generation_knows_nothing_of_steps_that_ran_beyond_the_end(gpu):
    fast = runtime()
    free = hugging_face([PROMPT], eos_token_id=None)
    first = fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS, eos_token_id=int(free[0, 7]))
    again = fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS, eos_token_id=None)
    assert torch.equal(first, free[:, :8]) and torch.equal(again, free)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.9, top_k=40, top_p=0.95),
        dict(temperature=1.3, min_p=0.02, repetition_penalty=1.3),
    ],
    ids=["nucleus", "penalised"],
)
def test_draws_with_a_seed_are_the_reference_backends(gpu, options):
    call = dict(max_new_tokens=STEPS, do_sample=True, seed=5, eos_token_id=None) | options
    inputs = padded([PROMPT, OTHER])
    drawn = runtime(batch_size=2).generate(**inputs, **call)
    assert torch.equal(drawn, runtime(backend="reference", batch_size=2).generate(**inputs, **call))
    assert not torch.equal(drawn, hugging_face([PROMPT, OTHER], eos_token_id=None))


def test_greedy_tokens_with_a_repetition_penalty_are_hugging_faces(gpu):
    options = dict(repetition_penalty=1.5, max_new_tokens=STEPS)
    out = runtime().generate(torch.tensor([PROMPT]), **options)
    assert torch.equal(out, hugging_face([PROMPT], **options))


def test_a_generation_samples_by_its_own_settings_and_not_by_those_of_one_before(gpu):
    ours, right = runtime(), runtime(backend="reference")
    drawn, greedy = dict(do_sample=True, temperature=0.9, seed=5), dict(do_sample=False)
    for prompt, options in (
        (PROMPT, drawn),
        (PROMPT, drawn | dict(seed=6)),
        (PROMPT, drawn | dict(temperature=1.7)),
        (PROMPT, greedy),  # a step of another kind
        (PROMPT, greedy | dict(repetition_penalty=2.0)),
        (OTHER, greedy | dict(repetition_penalty=2.0)),  # which has not seen what the one before has
        (OTHER, greedy | dict(repetition_penalty=1.2)),
    ):
        call = dict(max_new_tokens=8, eos_token_id=None) | options
        ids = torch.tensor([prompt])
        assert torch.equal(ours.generate(ids, **call), right.generate(ids, **call)), options


def test_python_drives_the_same_steps(gpu):
    options = dict(no_repeat_ngram_size=1, max_new_tokens=6, eos_token_id=None)
    fast = runtime(batch_size=2)
    fast.generate(**padded([PROMPT, OTHER]), max_new_tokens=2)
    chosen_on_device = fast.engine._rows[2].loop._slots.step.clone()
    out = fast.generate(
        **padded([PROMPT, OTHER]), output_logits=True, return_dict_in_generate=True, **options
    )
    theirs = hugging_face([PROMPT, OTHER], output_logits=True, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(fast.engine._rows[2].loop._slots.step, chosen_on_device), (
        "Python's steps chose tokens too"
    )


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_packed_weights_decode_as_the_floats_they_stand_for(gpu, width):
    model = tiny_models.fresh("llama", **tiny_models.PACKABLE)
    fast = d3rt.compile(model, backend="cuda", weights=width, kv_cache_dtype="fp32", max_seq_len=LENGTH)
    out = fast.generate(
        torch.tensor([[7]]),
        max_new_tokens=6,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    dense = tiny_models.fresh("llama", **tiny_models.PACKABLE)
    with torch.no_grad():
        for name, weight in family_of(dense.config).named(fast.engine.decoder.weights).items():
            floats = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
            dense.get_parameter(name).copy_(floats)
        exact = dense(out.sequences[:, :-1]).logits[0]
    error = torch.cat(out.logits) - exact
    # The one token of the prompt went through bfloat16 products, and later ones attend to it.
    assert error.square().mean().sqrt() < 8 * torch.finfo(torch.bfloat16).eps * exact.square().mean().sqrt()


def test_warmup_builds_what_a_generation_needs(gpu):
    fast = runtime(D3)
    fast.warmup(max_new_tokens=STEPS)
    built = gpu.driver.count("cuGraphInstantiateWithFlags")
    fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS)
    assert gpu.driver.count("cuGraphInstantiateWithFlags") == built > 3


def test_a_dropped_runtime_leaves_nothing_with_the_driver(gpu):
    gc.collect()  # of other tests
    before = gpu.driver.live()
    fast = runtime(D3)
    fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS)
    assert gpu.driver.live() > before
    del fast  # at once, not when the garbage collector comes
    assert gpu.driver.live() == before


def test_broken_weights_stop_the_generation_with_the_cpus_words(gpu):
    model = stories260k.load()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    fast = d3rt.compile(model, backend="cuda", max_seq_len=LENGTH)
    with pytest.raises(NotFiniteError, match="slot 0 at step 0 hold NaN"):
        fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS)


# -- when something is not as it should be -----------------------------------------------------------------------------


def test_a_graph_that_differs_from_its_launches_is_replaced_and_said(gpu):
    expected = hugging_face([PROMPT])

    def damage_once(op, tensors):
        gpu.damage = None
        tensors[0].view(-1)[0] += 1e-3

    gpu.damage = damage_once
    fast = runtime()
    with pytest.warns(RuntimeWarning) as said:
        out = fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS)
    words = [str(warning.message) for warning in said]
    assert "as a graph, " in words[0] and "values of x differ" in words[0] and "torch captures" in words[0]
    assert "no torch.cuda to capture with; falling back to launches one by one" in words[1]
    assert torch.equal(out, expected)
    assert fast.programs()[0].mode == "eager"


def test_a_driver_that_refuses_a_graph_is_named_and_the_tokens_still_come(gpu):
    fast = runtime()
    gpu.driver.fail("cuGraphInstantiateWithFlags:1:2")
    with pytest.warns(RuntimeWarning) as said:
        out = fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS)
    words = [str(warning.message) for warning in said]
    assert "CUDA_ERROR_OUT_OF_MEMORY" in words[0] and "falling back" in words[0]
    assert torch.equal(out, hugging_face([PROMPT]))
    assert "1 as eager" in fast.backend.describe()["steps"]


def test_a_device_that_fails_midway_raises_a_typed_error(gpu):
    fast = runtime()
    fast.warmup(max_new_tokens=STEPS)
    gpu.driver.fail("cuGraphLaunch:3:700")
    with pytest.raises(CudaError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS)


def test_a_step_that_would_read_a_hole_is_refused_by_name(gpu):
    fast = runtime()
    rows, whole = fast.engine.for_rows(1), LayerSet.full(5)
    programs = [rows.number(Plan.of(layers)) for layers in (LayerSet.of((0, 4), 5), whole)]
    rows.loop.prepare(programs, SamplingParams(), [])
    fast.engine.cache.reset()
    fast.engine.decoder.prefill([torch.tensor(PROMPT)], whole, fast.engine.cache, rows.buffers, 512)
    rows.first_logits.replay()
    rows.loop.start(programs=programs, eos_tokens=[], pad_token=0, sampling=SamplingParams(), seen=[])
    with pytest.raises(HoleError, match="layer 1 of slot 0 has K,V for 5 positions, but this step reads 6"):
        rows.loop.wait(60.0)
    expected = hugging_face([PROMPT])
    assert torch.equal(fast.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS), expected)


def test_memory_of_graphs_and_working_memory_is_reported(gpu):
    fast = runtime()
    before = fast.memory().buffers
    fast.generate(torch.tensor([PROMPT]), max_new_tokens=2)
    assert fast.memory().buffers - before >= 4 * max(
        launch.partials for launch in fast.engine._rows[1].first_logits.recorded.launches
    )
    assert fast.programs()[0].device_bytes >= 0


@pytest.mark.parametrize("kv_fill", ["eager", "deferred", "recompute"])
def test_a_conversation_is_the_oracles(gpu, kv_fill):
    fast = runtime(D3, kv_fill=kv_fill)
    session, plans = fast.session(), D3.schedule(5, 8).plans(kv_fill)
    conversation = oracle.Conversation.new(stories260k.load(torch.float32), exact=kv_fill == "recompute")
    for new in (PROMPT, OTHER):
        reply = session.send(new, max_new_tokens=8, eos_token_id=None)
        assert list(reply.tokens) == conversation.send([*conversation.ids, *new], plans).tokens
        fast.generate(torch.tensor([OTHER]), max_new_tokens=2)  # takes the cache, and gives it back
    assert {program.mode for program in fast.programs()} == {"graph"}


def test_rows_that_change_places_are_refused_by_name(gpu):
    with pytest.raises(d3rt.UnsupportedOptionError, match="serve_batch.*'cuda' has not"):
        runtime().serve_batch()
