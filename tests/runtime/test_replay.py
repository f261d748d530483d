"""A recorded step gives the same bits however it is replayed: op by op, in any order, on any number of threads."""

import pytest
import schedules
import tiny_models
import torch

from d3rt.plan import LayerSet, Plan

PLANS = {
    "full": Plan.of(LayerSet.full(4)),
    "some": Plan.of(LayerSet.of((0, 2), 4)),
    "filling": Plan.of(LayerSet.of((0, 3), 4), fill=(1, 2)),
    "sublayers": Plan.of(LayerSet.of_sublayers((1,), (0, 3), 4), fill=(0, 2, 3)),
    "no attention": Plan.of(LayerSet.of_sublayers((), (2,), 4), fill=(0, 1, 2, 3)),
}
PROMPTS = tiny_models.ragged((70, 1, 12))  # one longer than a chunk of split attention


class OneByOne:
    """Ops that run at once, each as a tape of its own."""

    def __init__(self, backend):
        self.backend = backend
        self.names = []

    def __getattr__(self, name):
        def run(*args):
            self.names.append(name)
            self.backend.record(lambda ops: getattr(ops, name)(*args)).replay()

        return run


class State:
    """A runtime that stands before a decode step of three rows, and can go back there."""

    def __init__(self, name, dtype=torch.float32, threads=1, rows=3):
        self.fast = tiny_models.runtime(name, dtype=dtype, threads=threads)
        self.rows = self.fast.engine.for_rows(rows)
        self.buffers, cache = self.rows.buffers, self.fast.engine.cache
        prompts = [torch.tensor(prompt) for prompt in PROMPTS[:rows]]
        cache.k.zero_()
        cache.v.zero_()
        self.fast.engine.decoder.prefill(prompts, LayerSet.full(4), cache, self.buffers, 512)
        self.buffers.token.copy_(torch.tensor([5, 77, 130][:rows]))
        self.buffers.pos.add_(1)
        self.tensors = [cache.k, cache.v, self.buffers.x, self.buffers.logits]
        self.start = self.now()

    def now(self):
        return [tensor.clone() for tensor in self.tensors]

    def restore(self):
        for tensor, value in zip(self.tensors, self.start, strict=True):
            tensor.copy_(value)

    def record(self, plan):
        return self.fast.backend.record(
            lambda ops: self.fast.engine.decoder.decode_step(ops, plan, self.buffers)
        )

    def result_of(self, *programs):
        """K, V, x and logits after these programs, from the start."""
        self.restore()
        for program in programs:
            program.replay()
        return self.now()


def assert_same_bits(a, b):
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-window"])
def test_a_recorded_step_equals_its_ops_run_one_by_one(name, plan, dtype, rows):
    state = State(name, dtype, threads=2, rows=rows)
    recorded = state.record(plan)
    replayed = state.result_of(recorded)
    state.restore()
    eager = OneByOne(state.fast.backend)
    state.fast.engine.decoder.decode_step(eager, plan, state.buffers)
    assert eager.names == recorded.ops
    assert_same_bits(state.now(), replayed)
    assert not torch.equal(state.start[3], replayed[3])


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_a_tape_holds_the_ops_of_what_its_plan_runs_and_fills(plan):
    state = State("llama-mha")
    ops = state.record(plan).ops
    attention, mlp = plan.layer_set.attention_layers, plan.layer_set.mlp_layers
    assert ops.count("norm_qkv_rope") == ops.count("attention") == len(attention)
    assert ops.count("norm_gate_up") == len(mlp)
    assert ops.count("proj_add") == len(attention) + len(mlp)
    assert bool(ops.count("kv_fill")) == bool(plan.fill_layers)
    assert ops[0] == "embed" and ops[-1] == "norm_logits"


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_replaying_twice_from_the_same_state_gives_the_same_bits(plan):
    state = State("llama-mha", threads=2)
    program = state.record(plan)
    assert_same_bits(state.result_of(program), state.result_of(program))


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-window"])
def test_what_was_replayed_before_leaves_no_trace_in_the_logits(name):
    state = State(name, threads=2)
    programs = {key: state.record(plan) for key, plan in PLANS.items()}
    for program in programs.values():
        alone = state.result_of(program)
        for before in programs.values():
            # Both write K,V at the same position; attention reads this step's own, so the step before is overwritten.
            after = state.result_of(before, program)
            assert torch.equal(after[2], alone[2]) and torch.equal(after[3], alone[3])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_the_number_of_threads_changes_no_bit(plan, dtype, rows):
    results = []
    for threads in (1, 2, 3):
        state = State("llama-biases", dtype, threads, rows)
        results.append(state.result_of(state.record(plan)))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("policy", ["d3-window-tail-1", "schedule-cycle"])
def test_a_whole_generation_has_the_same_logits_on_any_number_of_threads(policy):
    inputs = tiny_models.left_padded(PROMPTS)
    answers = []
    for threads in (1, 2, 3):
        fast = tiny_models.runtime("llama", schedules.POLICIES[policy], threads=threads)
        out = fast.generate(
            **inputs, max_new_tokens=12, eos_token_id=None, output_logits=True, return_dict_in_generate=True
        )
        answers.append(torch.stack(out.logits))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_two_runtimes_do_not_disturb_each_other():
    inputs = tiny_models.left_padded(PROMPTS)
    one = tiny_models.runtime("llama", schedules.POLICIES["d3-window-tail-1"])
    two = tiny_models.runtime("llama", schedules.POLICIES["schedule-cycle"])
    options = dict(max_new_tokens=10, eos_token_id=None)
    alone = one.generate(**inputs, **options)
    two.generate(**inputs, **options)
    assert torch.equal(one.generate(**inputs, **options), alone)
