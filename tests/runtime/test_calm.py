"""Early exit as a whole: the depths and tokens of the oracle, the two ends of the threshold, and what holds between.

What holds, by construction and checked here: of one step on one cache the depth does not fall when the threshold rises.
Of a run on given tokens it is the sequence of depths that does not fall, in the order of dictionaries: up to the first
step where two thresholds differ the caches are equal, and there the higher one is deeper. Afterwards the caches differ
(above an exit K,V are filled, not computed), so single steps need not keep that order.
"""

import exit_oracle
import oracle
import pytest
import schedules
import tiny_models
import torch

import d3rt
from d3rt.backends.base import Needs
from d3rt.errors import NotFiniteError, UnsupportedOptionError
from d3rt.kernels import reference

BACKENDS = ("reference", "cpu")
MEASURES = ("state", "softmax")
STEPS = 20
PROMPTS = tiny_models.ragged((7, 1, 12))
FREE = dict(max_new_tokens=STEPS, eos_token_id=None)
# On "llama" (6 layers) each of these ends at several depths.
POLICIES = {
    "state": d3rt.CALM(0.8),
    "state-min-3": d3rt.CALM(0.72, min_exit=3),
    "state-every-2nd": d3rt.CALM(0.6, min_exit=1, exit_interval=2),
    "state-decay": d3rt.CALM(0.9, min_exit=2, decay=4.0, horizon=10),
    "softmax": d3rt.CALM(0.15, "softmax"),
    "softmax-every-2nd": d3rt.CALM(0.1, "softmax", min_exit=2, exit_interval=2),
    "softmax-decay": d3rt.CALM(0.3, "softmax", decay=4.0, horizon=5),
}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_measure = pytest.mark.parametrize("measure", MEASURES)
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


def inputs_of(prompts=PROMPTS):
    return tiny_models.left_padded(prompts)


def forced(fast, tokens, prompts=PROMPTS, **options):
    """Logits [B, steps, V] of a run on given tokens, driven from Python; depths are in last_run."""
    inputs = inputs_of(prompts)
    out = fast.generate(
        **inputs,
        **(FREE | options),
        logits_processor=[schedules.Forced(inputs["input_ids"].shape[1], tokens)],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, dim=1)


def some_tokens(rows=3, seed=5):
    return [tiny_models.prompt(STEPS, seed * 10 + row) for row in range(rows)]


# -- the oracle ----------------------------------------------------------------------------------------------------


def check_against_oracle(name, policy, backend, prompts=PROMPTS, eos=None):
    fast = tiny_models.runtime(name, policy, backend=backend)
    right = exit_oracle.generate(tiny_models.make(name), prompts, policy, STEPS, eos=eos)
    inputs = inputs_of(prompts)
    out = fast.generate(**inputs, max_new_tokens=STEPS, eos_token_id=eos, pad_token_id=tiny_models.PAD)
    new = [
        row[: len(tokens)]
        for row, tokens in zip(schedules.new_tokens(out, inputs), right.tokens, strict=True)
    ]
    assert new == right.tokens
    assert list(fast.last_run.depths) == right.depths
    return right


@each_backend
@each_policy
def test_tokens_and_depths_of_a_ragged_batch_are_the_oracles(policy, backend):
    right = check_against_oracle("llama", policy, backend)
    assert len(set(right.depths[1:])) > 2


@pytest.mark.parametrize("name", tiny_models.NAMES)
@pytest.mark.parametrize("policy", [d3rt.CALM(0.8), d3rt.CALM(0.15, "softmax")], ids=str)
def test_every_family_equals_the_oracle(name, policy):
    check_against_oracle(name, policy, "cpu")


@each_backend
@pytest.mark.parametrize("policy", [d3rt.CALM(0.8), d3rt.CALM(0.15, "softmax")], ids=str)
def test_one_row_alone_equals_the_oracle(policy, backend):
    for prompt in PROMPTS:
        check_against_oracle("llama", policy, backend, [prompt])


@each_backend
@each_policy
def test_logits_of_every_step_are_the_oracles(policy, backend):
    tokens = some_tokens()
    fast = tiny_models.runtime("llama", policy, backend=backend)
    ours = forced(fast, tokens)
    same = exit_oracle.generate(tiny_models.make("llama"), PROMPTS, policy, STEPS, forced=tokens)
    exact = exit_oracle.generate(
        schedules.wider("llama", torch.float32), PROMPTS, policy, STEPS, forced=tokens
    )
    assert list(fast.last_run.depths) == same.depths == exact.depths
    same, exact = torch.stack(same.logits, dim=1), torch.stack(exact.logits, dim=1)
    assert oracle.excess(ours, same, exact, torch.float32) <= 1


@each_backend
@pytest.mark.parametrize("policy", [d3rt.CALM(0.8), d3rt.CALM(0.15, "softmax")], ids=str)
def test_a_row_that_has_finished_holds_nobody_up(policy, backend):
    free = exit_oracle.generate(tiny_models.make("llama"), PROMPTS, policy, STEPS)
    eos = free.tokens[0][4]
    ended = check_against_oracle("llama", policy, backend, eos=eos)
    assert len({len(tokens) for tokens in ended.tokens}) > 1


@each_measure
def test_a_batch_ends_a_step_where_its_worst_row_would(measure):
    """At step 1, before which nothing that depends on the other rows has happened."""
    policy = d3rt.CALM(0.8 if measure == "state" else 0.15, measure)
    prompts = tiny_models.ragged((5, 9, 3, 11), seed=3)
    options = dict(max_new_tokens=2, eos_token_id=None)
    fast = tiny_models.runtime("llama", policy)
    alone = []
    for prompt in prompts:
        fast.generate(torch.tensor([prompt]), **options)
        alone.append(fast.last_run.depths[1])
    fast.generate(**inputs_of(prompts), **options)
    # A confidence need not rise with the depth, so the batch may go deeper than its deepest row, never less.
    assert len(set(alone)) > 1 and fast.last_run.depths[1] >= max(alone)
    right = exit_oracle.generate(tiny_models.make("llama"), prompts, policy, 2)
    assert fast.last_run.depths[1] == right.depths[1]


def test_the_threshold_of_a_step_is_that_of_its_position():
    policy = d3rt.CALM(1.05, min_exit=2, decay=1.0, horizon=3)  # above 1 at first: no exit; then below
    fast = tiny_models.runtime("llama", policy)
    fast.generate(torch.tensor([PROMPTS[0]]), **FREE)
    never = [step for step in range(1, STEPS) if policy.threshold_at(step) > 1]
    assert never and all(fast.last_run.depths[step] == 6 for step in never)
    assert min(fast.last_run.depths) < 6


# -- the two ends of the threshold -----------------------------------------------------------------------------------


@each_backend
@each_measure
@pytest.mark.parametrize("interval", [1, 2])
def test_above_1_every_step_runs_all_layers_bit_for_bit(measure, backend, interval):
    calm = d3rt.CALM(1.0001, measure, min_exit=2, exit_interval=interval)
    tokens = some_tokens()
    fast, full = (
        tiny_models.runtime("llama", policy, backend=backend) for policy in (calm, d3rt.FullDepth())
    )
    assert torch.equal(forced(fast, tokens), forced(full, tokens))
    assert set(fast.last_run.depths) == {6}
    inputs = inputs_of()
    assert torch.equal(fast.generate(**inputs, **FREE), full.generate(**inputs, **FREE))


@each_backend
@each_measure
@pytest.mark.parametrize("threshold", [0, -0.5, -3])
@pytest.mark.parametrize("kv_fill", ["auto", "eager"])
def test_at_0_or_below_every_step_is_a_static_exit_bit_for_bit(measure, backend, threshold, kv_fill):
    calm, static = d3rt.CALM(threshold, measure, min_exit=3), d3rt.StaticLayers(layers=(0, 1, 2))
    tokens = some_tokens()
    fast = tiny_models.runtime("llama", calm, backend=backend, kv_fill=kv_fill)
    other = tiny_models.runtime("llama", static, backend=backend, kv_fill=kv_fill)
    assert torch.equal(forced(fast, tokens), forced(other, tokens))
    assert fast.last_run.depths == other.last_run.depths == (6, *[3] * (STEPS - 1))
    inputs = inputs_of()
    assert torch.equal(fast.generate(**inputs, **FREE), other.generate(**inputs, **FREE))


@pytest.mark.parametrize("widths", [dict(dtype=torch.bfloat16), dict(kv_cache_dtype="int8")], ids=str)
def test_both_ends_hold_in_other_widths_too(widths):
    inputs = inputs_of()
    for policy, same in (
        (d3rt.CALM(2, min_exit=2), d3rt.FullDepth()),
        (d3rt.CALM(0, min_exit=2), d3rt.StaticLayers(layers=(0, 1))),
    ):
        fast, other = (tiny_models.runtime("llama", each, **widths) for each in (policy, same))
        assert torch.equal(fast.generate(**inputs, **FREE), other.generate(**inputs, **FREE))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_both_ends_hold_with_packed_weights(weights):
    model, inputs = tiny_models.fresh("llama", **tiny_models.PACKABLE), inputs_of()
    for policy, same in (
        (d3rt.CALM(2, "softmax", min_exit=2), d3rt.FullDepth()),
        (d3rt.CALM(0, min_exit=2), d3rt.StaticLayers(layers=(0, 1))),
    ):
        answers = [
            d3rt.compile(model, each, backend="cpu", threads=1, batch_size=3, weights=weights).generate(
                **inputs, **FREE
            )
            for each in (policy, same)
        ]
        assert torch.equal(*answers)


# -- in between ------------------------------------------------------------------------------------------------------

GRID = {
    "state": [-1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 2],
    "softmax": [-1, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 2],
}


def depths_by_threshold(name, measure, tokens, prompts, backend="cpu"):
    model_layers = tiny_models.make(name).config.num_hidden_layers
    fast = tiny_models.runtime(name, backend=backend)
    found = []
    for threshold in GRID[measure]:
        fast.policy = d3rt.CALM(threshold, measure)
        fast.policy.validate(model_layers)
        forced(fast, tokens, prompts)
        found.append(fast.last_run.depths)
    return found


@each_measure
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "qwen2"])
def test_on_given_tokens_the_sequence_of_depths_never_falls_when_the_threshold_rises(name, measure):
    for seed in range(3):
        prompts = tiny_models.ragged((4, 9), seed=seed)
        found = depths_by_threshold(name, measure, some_tokens(2, seed), prompts)
        assert found == sorted(found)  # tuples compare at the first step that differs
        assert len(set(found)) > 3
        means = [sum(depths) for depths in found]
        assert means == sorted(means)  # not so by construction, but on these tokens
        # So the first step, which both find the same cache at, is monotone by itself ...
        first = [depths[1] for depths in found]
        assert first == sorted(first)
        # ... and no run is shallower than the lowest threshold's or deeper than the highest's, at any step.
        for depths in found:
            assert all(low <= at <= high for low, at, high in zip(found[0], depths, found[-1], strict=True))


@each_backend
@each_measure
def test_one_step_on_one_cache_gets_deeper_as_the_threshold_rises(measure, backend):
    """At every position of a run at full depth, whose K,V all thresholds are then given."""
    fast = tiny_models.runtime("llama", d3rt.CALM(2, measure), backend=backend)
    tokens = tiny_models.prompt(16)
    for length in range(1, 16, 3):
        found = []
        for threshold in GRID[measure]:
            fast.policy = d3rt.CALM(threshold, measure)
            forced(fast, [tokens[length : length + 2]], [tokens[:length]], max_new_tokens=2)
            found.append(fast.last_run.depths[1])
        assert found == sorted(found)


# -- K,V, threads, the ways to run -------------------------------------------------------------------------------------


@each_backend
@each_policy
def test_every_layer_has_every_positions_kv_and_nothing_unwritten_is_read(policy, backend):
    fast = tiny_models.runtime("llama", policy, backend=backend)
    inputs = inputs_of()
    clean = fast.generate(**inputs, **FREE)
    fast.engine.cache.k.fill_(torch.nan)
    fast.engine.cache.v.fill_(torch.nan)
    assert torch.equal(fast.generate(**inputs, **FREE), clean)
    for row, prompt in enumerate(PROMPTS):
        written = len(prompt) + STEPS - 1
        assert (fast.engine.cache.filled[:, row] == written).all()
        for kept in (fast.engine.cache.k, fast.engine.cache.v):
            assert kept[:, row, :, :written].isfinite().all()
            assert kept[:, row, :, written:].isnan().all()


@each_policy
def test_any_number_of_threads_gives_the_same_bits(policy):
    answers = []
    for threads in (1, 2, 3):
        fast = tiny_models.runtime("llama", policy, threads=threads)
        answers.append((forced(fast, some_tokens()), fast.last_run.depths))
    for logits, depths in answers[1:]:
        assert torch.equal(logits, answers[0][0]) and depths == answers[0][1]


@each_backend
@each_policy
def test_driven_from_python_it_decides_the_same(policy, backend):
    fast = tiny_models.runtime("llama", policy, backend=backend)
    inputs = inputs_of()
    eos = fast.generate(**inputs, **FREE)[0, inputs["input_ids"].shape[1] + 6].item()
    for options in (dict(), dict(do_sample=True, temperature=0.8, top_k=20, seed=7), dict(eos_token_id=eos)):
        options = FREE | dict(pad_token_id=0) | options
        native = fast.generate(**inputs, **options)
        depths = fast.last_run.depths
        driven = fast.generate(**inputs, **options, logits_processor=[lambda ids, scores: scores])
        assert torch.equal(native, driven)
        assert fast.last_run.depths == depths


def test_what_is_drawn_is_the_same_on_both_backends():
    options = FREE | dict(do_sample=True, temperature=0.7, top_p=0.95, repetition_penalty=1.2, seed=3)
    for policy in (POLICIES["state"], POLICIES["softmax"]):
        runs = [tiny_models.runtime("llama", policy, backend=backend) for backend in BACKENDS]
        answers = [fast.generate(**inputs_of(), **options) for fast in runs]
        assert torch.equal(*answers)
        assert runs[0].last_run.depths == runs[1].last_run.depths


@each_backend
def test_a_stream_gives_the_same_tokens_and_may_be_closed_midway(backend):
    fast = tiny_models.runtime("llama", POLICIES["state"], backend=backend)
    prompt = torch.tensor(PROMPTS[0])
    whole = fast.generate(prompt[None], **FREE)[0, len(prompt) :].tolist()
    depths = fast.last_run.depths
    assert list(fast.stream(prompt, **FREE)) == whole
    assert fast.last_run.depths == depths
    pieces = fast.stream(prompt, **FREE)
    assert [next(pieces) for _ in range(5)] == whole[:5]
    pieces.close()
    assert fast.last_run.depths == depths[: fast.last_run.steps]
    assert fast.generate(prompt[None], **FREE)[0, len(prompt) :].tolist() == whole


@each_backend
@pytest.mark.parametrize("at", range(0, STEPS, 3))
def test_an_error_midway_leaves_the_runtime_usable(backend, at):
    fast = tiny_models.runtime("llama", POLICIES["softmax"], backend=backend)
    inputs = inputs_of()
    whole = fast.generate(**inputs, **FREE)
    depths = fast.last_run.depths
    width = inputs["input_ids"].shape[1]

    def raises(ids, scores):
        if ids.shape[1] == width + at:
            raise KeyboardInterrupt
        return scores

    with pytest.raises(KeyboardInterrupt):
        fast.generate(**inputs, **FREE, logits_processor=[raises])
    assert at == 0 or fast.last_run.depths == depths[:at]
    assert torch.equal(fast.generate(**inputs, **FREE), whole)
    assert fast.last_run.depths == depths


@each_backend
@each_measure
def test_nan_in_a_layer_is_never_confident(measure, backend):
    model = tiny_models.fresh("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    fast = d3rt.compile(model, d3rt.CALM(0.0001, measure, min_exit=2), backend=backend, threads=1)
    # The prompt's own logits are broken, so a run gets no further; the step is asked for by hand.
    with pytest.raises(NotFiniteError):
        fast.generate(torch.tensor([PROMPTS[0]]), **FREE)
    rows = fast.engine.for_rows(1)
    number = rows.number(fast.policy.schedule(6, 2).plans()[1])
    rows.loop.begin()
    rows.loop.commit([5], [False])
    rows.loop.step(number)
    assert rows.loop.exits == [len(fast.policy.exits(6))]


# -- what is recorded, and what is said of it --------------------------------------------------------------------------


@each_policy
def test_only_the_layers_of_the_depth_are_executed_and_the_rest_is_filled(policy, monkeypatch):
    counted = {"norm_qkv_rope": 0, "norm_gate_up": 0, "kv_fill": 0, "norm_logits": 0, "embed": 0}

    def counting(op):
        original = getattr(reference, op)

        def run(first, *rest):
            counted[op] += len(first) if op == "kv_fill" else 1
            original(first, *rest)

        return run

    for op in counted:
        monkeypatch.setattr(reference, op, counting(op))
    fast = tiny_models.runtime("llama", policy, backend="reference")
    fast.generate(**inputs_of(), **FREE)
    depths = fast.last_run.depths[1:]
    tested = [sum(exit <= depth for exit in policy.exits(6)) for depth in depths]
    heads = (
        len(depths)
        if policy.measure == "state"
        else sum(count + (depth == 6) for count, depth in zip(tested, depths, strict=True))
    )
    assert counted == dict(
        norm_qkv_rope=sum(depths),
        norm_gate_up=sum(depths),
        kv_fill=sum(6 - depth for depth in depths),
        norm_logits=1 + heads,  # the prefill's
        embed=len(depths),
    )


@each_backend
@each_policy
def test_statistics_count_layers_fills_and_tests(policy, backend):
    fast = tiny_models.runtime("llama", policy, backend=backend)
    fast.generate(torch.tensor([PROMPTS[0]]), **FREE)
    stats, weights = fast.last_run, fast.engine.decoder.weights
    head = weights.lm_head.nbytes + weights.norm.nbytes
    for step, depth in enumerate(stats.depths[1:], 1):
        expected = sum(layer.attention_bytes + layer.mlp_bytes for layer in weights.layers[:depth])
        expected += sum(layer.kv_bytes for layer in weights.layers[depth:])
        tests = sum(exit <= depth for exit in policy.exits(6))
        heads = 1 if policy.measure == "state" else tests + (depth == 6)
        assert stats.weight_bytes[step] == expected + heads * head
        assert stats.layers[step] == ("0-" if depth > 1 else "0") + (str(depth - 1) if depth > 1 else "")
        line = 2 * 2 * 12 * 4  # K and V, heads, values, bytes
        assert stats.kv_bytes[step] == depth * line * (len(PROMPTS[0]) + step)
    assert stats.full_weight_bytes == fast.engine.decoder.step_bytes(schedules.plans_of(fast, 1)[0])


@each_backend
@each_policy
def test_programs_lists_each_way_through_and_a_warmup_leaves_nothing_to_record(policy, backend, monkeypatch):
    fast = tiny_models.runtime("llama", policy, backend=backend)
    ways = len(policy.exits(6)) + 1
    assert fast.warmup(rows=1) == ways
    monkeypatch.setattr(fast.backend, "record", None)
    fast.generate(torch.tensor([PROMPTS[0]]), **FREE)
    programs = fast.programs()
    assert [program.depth for program in programs] == [*policy.exits(6), 6]
    depths = fast.last_run.depths[1:]
    assert [program.replays for program in programs] == [depths.count(program.depth) for program in programs]
    for program in programs:
        assert program.plan.fill_layers == tuple(range(int(program.depth), 6))
        bytes_then = [
            fast.last_run.weight_bytes[step] for step, depth in enumerate(depths, 1) if depth == program.depth
        ]
        assert set(bytes_then) <= {program.weight_bytes}


def test_the_policy_of_a_runtime_may_change_from_call_to_call():
    fast = tiny_models.runtime("llama")
    inputs = inputs_of()
    policies = [*POLICIES.values(), d3rt.FullDepth(), d3rt.StaticLayers(layers=(0, 1))]
    first = []
    for policy in policies:
        fast.policy = policy
        first.append((fast.generate(**inputs, **FREE).tolist(), fast.last_run.depths))
    for policy, (tokens, depths) in reversed(list(zip(policies, first, strict=True))):
        fast.policy = policy
        assert fast.generate(**inputs, **FREE).tolist() == tokens
        assert fast.last_run.depths == depths


def test_its_buffers_count_as_memory():
    fast = tiny_models.runtime("llama", POLICIES["state"], batch_size=3)
    before = fast.memory().buffers
    fast.warmup(rows=3)
    held = fast.engine.for_rows(3)
    assert held.ladders.nbytes == 3 * (48 + 1) * 4
    assert fast.memory().buffers >= before + held.nbytes


def test_a_saved_runtime_keeps_it(tmp_path):
    policy = POLICIES["softmax-decay"]
    fast = tiny_models.runtime("llama", policy)
    expected = fast.generate(**inputs_of(), **FREE)
    fast.save(tmp_path / "saved")
    loaded = d3rt.load(tmp_path / "saved", threads=1, backend="cpu")
    assert loaded.policy == policy
    assert torch.equal(loaded.generate(**inputs_of(), **FREE), expected)


def test_min_exit_beyond_the_model_is_refused_before_anything_is_made():
    with pytest.raises(d3rt.PolicyError, match=r"CALM\(min_exit=6\) on 6 layers"):
        tiny_models.runtime("llama", d3rt.CALM(0.9, min_exit=6))


def test_the_cuda_backend_refuses_by_name_before_any_work():
    pytest.importorskip("triton")
    from d3rt.backends.cuda import CudaBackend
    from d3rt.backends.cuda_loop import CudaLoop

    needs = Needs(frozenset(), torch.float16, 0, 0, 0, 0, early_exit=str(POLICIES["state"]))
    with pytest.raises(UnsupportedOptionError, match="policy 'calm:threshold=0.8': .*backend='cpu'"):
        CudaBackend.admit(None, needs)
    with pytest.raises(UnsupportedOptionError, match="early exit: .*backend='cpu'"):  # a policy given later
        CudaLoop.add_ladder(None, [], 0, None)


def test_a_runtime_tells_its_backend_of_it():
    seen = []

    class Told(Exception):
        pass

    def admit(needs):
        seen.append(needs.early_exit)
        raise Told

    from d3rt.backends.reference import ReferenceBackend

    for policy, text in ((d3rt.CALM(0.5), "calm:threshold=0.5"), (d3rt.FullDepth(), None)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ReferenceBackend, "admit", lambda self, needs: admit(needs))
            with pytest.raises(Told):
                tiny_models.runtime("llama", policy, backend="reference")
        assert seen.pop() == text


@pytest.mark.demo_model
@each_measure
def test_the_embedded_model_gets_deeper_as_the_threshold_rises(demo, measure):
    model, tokenizer = demo
    ids = tokenizer("Photosynthesis is the process by which", return_tensors="pt").input_ids
    full = d3rt.compile(model, backend="cpu")
    options = dict(max_new_tokens=24, eos_token_id=None)
    tokens = full.generate(ids, **options)[:, ids.shape[1] :]
    processor = schedules.Forced(ids.shape[1], tokens.tolist())
    found = []
    for threshold in (0.0, 0.5, 0.9, 0.95, 0.99, 1.01):
        full.policy = d3rt.CALM(threshold, measure, min_exit=6, exit_interval=6)
        full.generate(ids, **options, logits_processor=[processor])
        found.append(full.last_run.depths)
    assert found == sorted(found) and len(set(found)) > 2
    assert set(found[0][1:]) == {6} and set(found[-1]) == {30}
    assert torch.equal(full.generate(ids, **options)[:, ids.shape[1] :], tokens)  # above 1: the same tokens
