"""Every Triton kernel against its definition in kernels/reference.py, in Triton's interpreter, on the cases of
kernels/cases.py and in every type that weights and cache may have.

The interpreter runs the algorithm: masks, tables, grids, the order of sums. What the compiler makes of it, see
tests/gpu/.
"""

import random
from dataclasses import replace
from unittest import mock

import native_ops
import packed_cases
import pytest
import token_ops
import torch

from d3rt.kernels import cases
from d3rt.kernels.cases import Case
from d3rt.sampling import SamplingParams

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # numpy's; silu wants that infinity
from triton_bounds import allowed, widened  # noqa: E402
from triton_interpreter import Interpreted, interpreted  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL = [
    replace(case, dtype=dtype)
    for op in cases.OPS
    for case in cases.TEST_CASES[op]
    if case.dtype == torch.float32
    for dtype in DTYPES
]
LONG = [
    case for case in ALL if (case.K or case.D) >= 129 and case.op not in ("embed", "attention", "keep_hidden")
]
ARCHS = {70: "without tensor cores", 80: "with tensor cores"}  # the two ways that attention goes
each_arch = pytest.mark.parametrize("arch", ARCHS, ids=ARCHS.get)
INF = float("inf")


def run(case: Case, arguments: dict, arch: int = 80) -> None:
    ops = Interpreted(arch)
    cases.call(ops, case, arguments)
    assert not ops.eager.counters.any(), "counters must be 0 for the next launch"


@pytest.mark.parametrize(
    "case, arch",
    [(case, arch) for case in ALL for arch in ARCHS if case.op == "attention" or arch == 80],
    ids=lambda value: ARCHS.get(value) if isinstance(value, int) else str(value),
)
def test_does_what_the_reference_says_and_writes_nothing_else(case, arch):
    arguments = cases.make(case, slack=5)
    before = {name: native_ops.storage_bits(tensor) for name, tensor in cases.tensors(arguments)}
    run(case, arguments, arch)
    outputs = cases.outputs(case, arguments)
    native_ops.assert_close(case, outputs, allowed=allowed(case, arch))
    for name, tensor in cases.tensors(arguments):
        changed = native_ops.storage_bits(tensor) != before[name]
        if name in outputs:
            changed &= ~native_ops.owned_bits(case, name, tensor)
        assert not changed.any(), f"{name}: {int(changed.sum())} elements changed that are not the op's"


# -- int8 and int4 -----------------------------------------------------------------------------------------------------


PACKED = [
    *packed_cases.CASES,
    Case("norm_qkv_rope", "packed", torch.float32, B=2, D=160, H=2, G=1, d=64, S=9, pos=(8, 3)),
    Case("norm_qkv_rope", "packed", torch.float32, B=9, D=64, H=2, G=2, d=128, S=3, pos=(1,) * 9, bias=True),
    Case("norm_logits", "packed", torch.float32, B=16, D=320, V=50),
]


@pytest.mark.parametrize("format", packed_cases.WIDTHS)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_weights_are_multiplied_as_their_dequantised_values(case, format):
    arguments = packed_cases.packed_arguments(case, format)
    float_arguments = widened(arguments)
    right = native_ops.exact_of(case, float_arguments)
    bounds = native_ops.bounds_of(case, float_arguments, right)
    run(case, arguments)
    native_ops.assert_close(case, packed_cases.outputs(case, arguments), right, bounds)


def mixed(arguments: dict, *names: str) -> dict:
    """int4 matrices, those named with minima, as in GGUF files that mix Q4_0 and Q4_1."""
    return {
        name: packed_cases.random_packed(*value.shape, "int4 with minima" if name in names else "int4")
        if name in packed_cases.WEIGHTS
        else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize(
    "case, names",
    [(packed_cases.CASES[2], ("wv",)), (packed_cases.CASES[6], ("w_up",))],
    ids=["norm_qkv_rope", "norm_gate_up"],
)
def test_matrices_of_one_op_may_be_of_different_formats(case, names):
    arguments = mixed(cases.make(case), *names)
    float_arguments = widened(arguments)
    right = native_ops.exact_of(case, float_arguments)
    bounds = native_ops.bounds_of(case, float_arguments, right)
    run(case, arguments)
    native_ops.assert_close(case, cases.outputs(case, arguments), right, bounds)


def test_kv_fill_of_layers_of_different_formats_takes_a_launch_each():
    case = Case("kv_fill", "mixed", torch.float32, B=2, D=64, G=2, d=8, S=4, pos=(3, 0), layers=3)
    arguments = cases.make(case)
    arguments["layers"][1] = arguments["layers"][1]._replace(
        wv=packed_cases.random_packed(16, 64, "int8"), wk=packed_cases.random_packed(16, 64, "int4")
    )
    float_arguments = widened(arguments)
    right = native_ops.exact_of(case, float_arguments)
    bounds = native_ops.bounds_of(case, float_arguments, right)
    assert len(interpreted().plans.kv_fill(80, *arguments.values())) == 2
    run(case, arguments)
    native_ops.assert_close(case, cases.outputs(case, arguments), right, bounds)


# -- splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LONG, ids=str)
def test_columns_split_over_programs_add_up_to_the_same(case):
    with mock.patch.object(
        interpreted().tiles, "splits", lambda arch, tile, blocks, steps, most: min(steps, 3)
    ):
        arguments = cases.make(case)
        assert any(launch.partials for launch in planned(case, arguments)), (
            "the case is too short for a split"
        )
        run(case, arguments)
        native_ops.assert_close(case, cases.outputs(case, arguments))


def planned(case: Case, arguments: dict, arch: int = 80) -> list:
    return getattr(interpreted().plans, case.op)(arch, **arguments)


@pytest.mark.parametrize("case", [c for c in ALL if c.dtype == torch.float16], ids=str)
def test_every_op_is_one_launch(case):
    """So a retained layer is 5 nodes of a graph, and embed, norm_logits, sample and advance are 4 more a step."""
    for arch in interpreted().tiles.ARCHS:
        assert len(planned(case, cases.make(case), arch)) == 1


# -- attention ---------------------------------------------------------------------------------------------------------


def attend(arch, k_cache, v_cache, pos, window=0, scale=1.0):
    """Attention of 4 query heads of ones."""
    batch, _, _, head_dim = k_cache.shape
    out = torch.full((batch, 4, head_dim), torch.nan)
    arguments = dict(out=out, q=torch.ones(batch, 4, head_dim), k_cache=k_cache, v_cache=v_cache)
    arguments |= dict(pos=torch.tensor(pos, dtype=torch.int32), scale=scale, window=window)
    run(Case("attention", "direct", k_cache.dtype, B=batch), arguments, arch)
    return out


@each_arch
@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_in_the_cache_shows_if_and_only_if_it_is_read(arch, which):
    last, window = 100, 90
    for position in (0, 10, 11, 63, 64, 99, 100, 101, 129):
        cache = {name: torch.randn(1, 2, 130, 10).half() for name in "kv"}
        cache[which][0, 1, position] = torch.nan
        out = attend(arch, cache["k"], cache["v"], [last], window)
        read = last + 1 - window <= position <= last
        assert out[0, :2].isfinite().all(), "the other key-value head"
        assert out[0, 2:].isnan().all() if read else out[0, 2:].isfinite().all(), f"position {position}"


@each_arch
def test_nan_in_one_slot_leaves_the_others_alone(arch):
    k, v = torch.randn(3, 2, 70, 8).half(), torch.randn(3, 2, 70, 8).half()
    k[1, :, 5] = torch.nan
    out = attend(arch, k, v, [69, 69, 69])
    assert out[[0, 2]].isfinite().all() and out[1].isnan().all()


@each_arch
def test_softmax_of_huge_scores_takes_the_largest(arch):
    k, v = torch.zeros(1, 1, 130, 2).half(), torch.randn(1, 1, 130, 2).half()
    for winner in (0, 63, 64, 129):
        k[...] = -1e4
        k[0, 0, winner] = 1e4
        assert torch.equal(attend(arch, k, v, [129])[0], v[0, 0, winner].float().expand(4, 2))


@each_arch
def test_ops_read_the_cache_of_some_slots_out_of_a_larger_one(arch):
    case = Case("attention", "strided", torch.float32, B=2, H=4, G=2, d=6, S=90, pos=(80, 3))
    arguments = cases.make(case)
    for name in ("k_cache", "v_cache"):
        larger = torch.full((4, 2, 100, 6), torch.nan)
        larger[1:3, :, :90] = arguments[name]
        arguments[name] = larger[1:3, :, :90]
    run(case, arguments, arch)
    native_ops.assert_close(case, cases.outputs(case, arguments))


# -- the token ---------------------------------------------------------------------------------------------------------


def sampled(logits, params: SamplingParams, step: int = 0, seen=None) -> list[int]:
    """One token a row of logits [B, V]; seen: tokens of each row, for the penalty."""
    rows = logits if logits.dim() == 2 else logits[None]
    mask = None
    if seen is not None:
        mask = torch.zeros(rows.shape, dtype=torch.int8)
        for row, tokens in enumerate(seen):
            mask[row, list(tokens)] = 1
    token = torch.full((len(rows),), -7, dtype=torch.int32)
    settings = interpreted().plans.sampling_settings(params)
    at = torch.tensor([step], dtype=torch.int32)
    Interpreted(80).sample(token, rows.contiguous(), settings, at, mask, params.do_sample)
    if mask is not None:
        assert all(mask[row, chosen] == 1 for row, chosen in enumerate(token.tolist()) if chosen >= 0)
    return token.tolist()


@pytest.mark.parametrize("vocab", [1, 2, 17, 4097])
def test_greedy_takes_the_lowest_of_equal_tokens(vocab):
    logits = torch.zeros(2, vocab)
    logits[1, vocab // 2 :] = 1.0
    assert sampled(logits, SamplingParams()) == [0, vocab // 2]


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(do_sample=True)], ids=["greedy", "drawn"]
)
def test_logits_without_an_answer_give_a_token_that_says_so(params):
    logits = torch.zeros(4, 33)
    logits[1, 20], logits[2], logits[3, 5] = torch.nan, -INF, INF
    assert sampled(logits, params) == [sampled(logits[:1], params)[0], -1, -1, -2 if params.do_sample else 5]


def test_the_repetition_penalty_counts_what_was_seen_and_what_is_drawn():
    logits = torch.tensor([[2.0, 1.5, -1.0], [-1.0, -1.1, -3.0]])
    params = SamplingParams(repetition_penalty=2.0)
    assert sampled(logits, params, seen=[[], []]) == [0, 0]
    assert sampled(logits, params, seen=[[0], [0]]) == [1, 1]


@pytest.mark.parametrize("seed", range(40))
def test_a_draw_is_the_references(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    vocab = rng.choice([1, 2, 7, 40, 300, 5000])
    params = SamplingParams(
        do_sample=True,
        temperature=rng.choice([1.0, rng.uniform(0.2, 2.0)]),
        top_k=rng.choice([0, 0, 1, rng.randint(1, 60)]),
        top_p=rng.choice([1.0, rng.uniform(0.01, 0.999), rng.choice([0.3, 0.5, 0.9, 0.95])]),
        min_p=rng.choice([0.0, 0.0, rng.uniform(0.001, 0.7)]),
        repetition_penalty=rng.choice([1.0, rng.uniform(0.7, 1.5)]),
        seed=rng.getrandbits(64),
    )
    logits = rng.choice([0.3, 2.0, 8.0]) * torch.randn(3, vocab, generator=generator)
    if rng.random() < 0.4:
        logits = (logits * 2).round() / 2  # equal values
    logits[2, torch.rand(vocab, generator=generator) < 0.3] = -INF
    seen = [rng.sample(range(vocab), min(vocab, 3)) for _ in logits]
    step = rng.getrandbits(20)
    penalised = params.repetition_penalty != 1.0
    expected = [token_ops.chosen(row, params, set(seen[i]), step, i) for i, row in enumerate(logits)]
    assert sampled(logits, params, step, seen if penalised else None) == expected


def test_advance_is_the_references():
    token_ops.assert_advance_is_the_references(Interpreted(80))


def test_advance_finishes_at_an_end_token_and_hands_the_tokens_on():
    token_ops.assert_advance_finishes_at_an_end_token_and_hands_the_tokens_on(Interpreted(80))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_these_kernels_cannot_do_is_refused_by_name():
    plans = interpreted().plans
    with pytest.raises(ValueError, match="17 rows; these kernels take 1 to 16"):
        plans.proj_add(80, torch.zeros(17, 4), torch.zeros(17, 4), torch.zeros(4, 4), None)
    with pytest.raises(ValueError, match="proj_add: w is torch.float64; choose one of float32"):
        plans.proj_add(80, torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(4, 4).double(), None)
    with pytest.raises(ValueError, match=r"proj_add: w is \(3, 4\); it must be \(4, 4\)"):
        plans.proj_add(80, torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(3, 4), None)
    with pytest.raises(ValueError, match=r"proj_add: input .* contiguous \(1, 4\)"):
        plans.proj_add(80, torch.zeros(1, 4), torch.zeros(1, 8)[:, ::2], torch.zeros(4, 4), None)
