"""Every native op, on every ISA of this processor, against its definition in kernels/reference.py."""

from contextlib import nullcontext
from dataclasses import replace

import native_ops
import pytest
import torch
from native_ops import ISAS

from d3rt.kernels import cases, kv_line, reference

ALL = [
    case
    for op in cases.ALL_OPS
    for case in (*cases.TEST_CASES[op], *cases.INT8_CACHE_CASES.get(op, ()), *cases.LINE_CASES.get(op, ()))
]
SOME = [case for case in ALL if case.name in ("gqa3", "gqa16", "odd", "triple", "three_layers", "full_batch")]
each_case = pytest.mark.parametrize("case", ALL, ids=str)
each_isa = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@each_case
@each_isa
def test_is_as_close_to_float64_as_torch_is(case, isa):
    native_ops.assert_close(case, native_ops.native(case, isa), allowed=native_ops.allowed_on(case, isa))


@each_case
@each_isa
def test_writes_what_it_owns_and_nothing_else(case, isa):
    arguments = cases.make(case, slack=5)
    written = cases.outputs(case, arguments)
    before = {name: native_ops.storage_bits(tensor) for name, tensor in cases.tensors(arguments)}
    native_ops.run_native(case, arguments, isa, threads=2)
    for name, tensor in cases.tensors(arguments):
        changed = native_ops.storage_bits(tensor) != before[name]
        if name in written:
            changed &= ~native_ops.owned_bits(case, name, tensor)
        assert not changed.any(), f"{name}: {int(changed.sum())} elements changed that are not the op's"
    for name, tensor in cases.outputs(case, arguments).items():
        assert tensor.isfinite().all(), f"{name}: not all written"


@each_case
@each_isa
def test_threads_do_not_change_a_bit(case, isa):
    alone = native_ops.native(case, isa, threads=1)
    for threads in (2, 3):
        for name, tensor in native_ops.native(case, isa, threads).items():
            assert torch.equal(tensor, alone[name]), f"{name} with {threads} threads"


@each_case
@each_isa
def test_a_replay_repeats_itself_bit_for_bit_on_unaligned_buffers_too(case, isa):
    aligned, shifted = native_ops.native(case, isa), native_ops.native(case, isa, slack=3)
    for name, tensor in aligned.items():
        assert torch.equal(tensor, shifted[name]), name


@each_isa
@pytest.mark.parametrize(
    "sizes", [(1, 67), (2, 96), (3, 577), (5, 1536), (8, 1600), (11, 4097), (16, 33)], ids=str
)
def test_activations_that_bfloat16_holds_lose_nothing_with_bfloat16_weights(isa, sizes):
    """Whether or not an ISA rounds them: as close as with float32 arithmetic."""
    B, K = sizes
    case = cases.Case(
        "proj_add", "bfloat16_activations", torch.bfloat16, B=B, D=37, K=K, bias=True, row_gap=3
    )
    arguments = cases.make(case)
    arguments["a"].copy_(arguments["a"].bfloat16())
    right = native_ops.exact_of(case, arguments)
    allowed = native_ops.bounds_of(case, arguments, right)
    native_ops.run_native(case, arguments, isa, threads=2)
    native_ops.assert_close(case, cases.outputs(case, arguments), right, allowed)


@pytest.mark.skipif(
    "avx512_bf16" not in ISAS, reason="the other ISAs sum several slots in another order than one"
)
@pytest.mark.parametrize("K", [67, 1536, 1600, 4096, 12320])
def test_a_slot_of_a_batch_gets_what_it_gets_alone_where_bfloat16_is_multiplied(K):
    case = cases.Case("proj_add", "batch", torch.bfloat16, B=16, D=21, K=K)
    whole = cases.make(case)
    x, a, w = (whole[name].clone() for name in ("x", "a", "w"))
    native_ops.run_native(case, whole, "avx512_bf16")
    for B in (1, 2, 3, 5, 8, 9):
        some = {**whole, "x": x[:B].clone(), "a": a[:B].clone(), "w": w.clone()}
        native_ops.run_native(replace(case, B=B), some, "avx512_bf16")
        assert torch.equal(some["x"], whole["x"][:B]), f"{B} slots"


@pytest.mark.parametrize("case", SOME, ids=str)
def test_isas_agree(case):
    outputs = {isa: native_ops.native(case, isa) for isa in ISAS}
    for isa in ISAS[1:]:
        for name, tensor in outputs[isa].items():
            difference = (tensor.double() - outputs["scalar"][name].double()).abs()
            # Each may be off by its bound, to its own side.
            allowed = native_ops.bounds(case)[name] + native_ops.allowed_on(case, isa)[name]
            assert (difference <= allowed).all(), f"{isa} {name}"


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_silu_is_right_from_minus_100_to_100_and_keeps_nan(isa, dtype):
    values = torch.cat([torch.linspace(-100, 100, 1001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])])
    rows = len(values)
    arguments = {
        "h": torch.empty(1, rows + 1),
        "x": torch.zeros(1, 1),
        "norm": torch.ones(1),
        "w_gate": torch.zeros(rows + 1, 1, dtype=dtype),
        "w_up": torch.zeros(rows + 1, 1, dtype=dtype),
        "b_gate": torch.cat([values, torch.tensor([torch.nan])]),
        "b_up": torch.ones(rows + 1),
        "eps": 1e-5,
    }
    case = cases.Case("norm_gate_up", "silu", dtype, D=1, F=rows + 1)
    native_ops.run_native(case, arguments, isa)
    got, expected = arguments["h"][0].double(), torch.nn.functional.silu(values.double())
    assert got[-1].isnan()
    # 4 eps relative: exp to 1 ulp, the sum, the division. Under -87 the exponential is clamped at e^88: what comes out
    # is below 1e-37 |x|, next to a true value that is smaller still.
    allowed = 4 * native_ops.EPS * expected.abs() + 1e-37 * values.abs() * (values < -87)
    assert ((got[:-1] - expected).abs() <= allowed).all()


def attend(isa, k_cache, v_cache, pos, window=0, q=None, scale=1.0, threads=2):
    """Native attention of 4 query heads."""
    batch, _, _, head_dim = kv_line.read(k_cache).shape
    q = torch.ones(batch, 4, head_dim) if q is None else q
    arguments = {
        "out": torch.zeros_like(q),
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "pos": torch.tensor(pos, dtype=torch.int32),
        "scale": scale,
        "window": window,
    }
    case = cases.Case("attention", "direct", k_cache.dtype, B=batch)
    native_ops.run_native(case, arguments, isa, threads)
    return arguments["out"]


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_in_the_cache_shows_if_and_only_if_it_is_read(isa, dtype, which):
    last, window = 100, 90
    for position in (0, 10, 11, 63, 64, 99, 100, 101, 129):
        values = {name: torch.randn(1, 2, 130, 10) for name in "kv"}
        values[which][0, 1, position] = torch.nan
        cache = {name: kv_line.kept_as(value, dtype) for name, value in values.items()}
        out = attend(isa, cache["k"], cache["v"], [last], window)
        read = last + 1 - window <= position <= last
        assert out[0, :2].isfinite().all(), "the other key-value head"
        assert out[0, 2:].isnan().all() if read else out[0, 2:].isfinite().all(), f"position {position}"


@each_isa
def test_nan_in_one_slot_leaves_the_others_alone(isa):
    k, v = torch.randn(3, 2, 70, 8), torch.randn(3, 2, 70, 8)
    k[1, :, 5] = torch.nan
    out = attend(isa, k, v, [69, 69, 69])
    assert out[[0, 2]].isfinite().all() and out[1].isnan().all()


@each_isa
@pytest.mark.parametrize("size", [1e3, 1e10, 1e30])
def test_softmax_of_huge_scores_takes_the_largest(isa, size):
    k, v = torch.zeros(1, 1, 130, 2), torch.randn(1, 1, 130, 2)
    for winner in (0, 63, 64, 129):
        k[...] = -size
        k[0, 0, winner] = size
        assert torch.equal(attend(isa, k, v, [129])[0], v[0, 0, winner].expand(4, 2))


@each_isa
def test_softmax_of_equal_scores_is_the_mean(isa):
    k, v = torch.full((1, 1, 200, 6), 12345.0), torch.randn(1, 1, 200, 6)
    for last in (0, 1, 63, 64, 199):
        mean = v[0, 0, : last + 1].double().mean(0)
        # A mean of n values in float32: n roundings at most, each of at most eps of the largest partial mean.
        assert ((attend(isa, k, v, [last])[0] - mean).abs() <= native_ops.EPS * (last + 4)).all()


@each_isa
@pytest.mark.parametrize("int8_cache", [False, True], ids=["", "int8_cache"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kv_fill_writes_the_same_bits_as_norm_qkv_rope(isa, dtype, int8_cache):
    sizes = dict(B=3, D=67, G=2, d=10, S=20, pos=(19, 0, 7), bias=True, head_norm=True, int8_cache=int8_cache)
    fill = cases.Case("kv_fill", "direct", dtype, layers=4, **sizes)
    arguments = cases.make(fill)
    native_ops.run_native(fill, arguments, isa)
    for filled in arguments["layers"]:
        qkv = cases.Case("norm_qkv_rope", "direct", dtype, H=2, **sizes)
        of_layer = cases.make(qkv, seed=1)
        of_layer |= {name: getattr(filled, name) for name in ("norm", "wk", "wv", "bk", "bv", "k_norm")}
        of_layer |= {name: arguments[name] for name in ("x", "cos", "sin", "pos")}
        native_ops.run_native(qkv, of_layer, isa)
        for name in ("k_cache", "v_cache"):
            bits, same = (native_ops.storage_bits(cache) for cache in (getattr(filled, name), of_layer[name]))
            assert torch.equal(bits, same), name


@each_isa
@pytest.mark.parametrize("int8_cache", [False, True], ids=["", "int8_cache"])
def test_ops_read_the_cache_of_some_slots_out_of_a_larger_one(isa, int8_cache):
    """A runtime for 4 rows that generates 2 gives views into the middle of its cache."""
    sizes = dict(B=2, H=4, G=2, d=6, S=90, pos=(80, 3), int8_cache=int8_cache)
    case = cases.Case("attention", "strided", torch.float32, **sizes)
    arguments = cases.make(case)
    for name in ("k_cache", "v_cache"):
        larger = torch.full((4, 2, 100, 6), torch.nan)
        if int8_cache:
            larger = torch.full((4, 2, 100, 10), kv_line.POISON, dtype=torch.int8)
        larger[1:3, :, :90] = arguments[name]
        arguments[name] = larger[1:3, :, :90]
    native_ops.run_native(case, arguments, isa)
    native_ops.assert_close(case, cases.outputs(case, arguments))


def margin(isa, logits, threads=2):
    """Native top2_margin of logits [B, V]."""
    arguments = {"out": torch.full((len(logits),), torch.nan), "logits": logits}
    case = cases.Case("top2_margin", "direct", torch.float32, B=len(logits), V=logits.shape[1])
    native_ops.run_native(case, arguments, isa, threads)
    return arguments["out"]


@each_isa
def test_a_margin_is_0_for_a_tie_and_1_for_a_certain_token_wherever_it_stands(isa):
    for size in (2, 3, 17, 4095, 4096, 4097, 9000):
        for place in {0, 1, size // 2, size - 2, size - 1}:
            logits = torch.zeros(1, size)
            logits[0, place] = 200.0
            assert margin(isa, logits).item() == 1.0
            for second in {0, size // 3, size - 1} - {place}:
                logits[0, second] = 200.0
                assert margin(isa, logits).item() == 0.0
                logits[0, second] = 0.0


@each_isa
@pytest.mark.parametrize("size", [1e3, 1e10, 1e38])
def test_a_margin_of_huge_logits_and_of_logits_cut_off_is_right(isa, size):
    logits = torch.full((3, 5000), -size)
    logits[0, 4999] = size
    logits[1, :2] = size
    logits[2] = -torch.inf
    logits[2, 7] = -size
    assert margin(isa, logits).tolist() == [1.0, 0.0, 1.0]


@each_isa
@pytest.mark.parametrize("place", [0, 3, 4095, 4096, 5000])
def test_a_margin_is_nan_exactly_in_the_row_that_has_no_distribution(isa, place):
    for broken in (torch.nan, torch.inf):
        logits = torch.randn(3, 5001)
        logits[1, place] = broken
        got = margin(isa, logits)
        assert got[1].isnan() and got[[0, 2]].isfinite().all()
    assert margin(isa, torch.full((1, 5001), -torch.inf)).isnan().all()


@each_isa
def test_a_cosine_stays_within_1_and_is_nan_exactly_where_a_state_is(isa):
    for n in (1, 7, 64, 577):
        a = torch.randn(5, n)
        b = a * torch.tensor([[1.0], [-3.0], [0.0], [1e15], [torch.nan]])
        a[3] *= 1e15
        out = torch.empty(5)
        case = cases.Case("hidden_cosine", "direct", torch.float32, B=5, D=n)
        native_ops.run_native(case, {"out": out, "a": a, "b": b}, isa, threads=2)
        right = torch.tensor([1.0, -1.0, 0.0, 1.0])
        assert ((out[:4] - right).abs() <= 4 * native_ops.EPS).all() and out[:4].abs().max() <= 1
        assert out[4].isnan()


WRITES_INT8 = [case for op in ("norm_qkv_rope", "kv_fill") for case in cases.INT8_CACHE_CASES[op]]


def int8_lines(case, arguments):
    """Codes (whole numbers) and scales of every cache line that the op wrote."""
    for name, tensor in cases.tensors(arguments):
        if name.endswith("_cache"):
            codes, scales = kv_line.parts(tensor[cases.owned(case, name)])
            yield name, codes.int(), scales


@pytest.mark.parametrize("case", WRITES_INT8, ids=str)
@each_isa
def test_int8_lines_are_the_references_but_where_a_value_lies_between_two_codes(case, isa):
    """K and V themselves differ from the reference's by float32's roundings (native_ops.bounds), so a value that lies
    that near to the middle between two codes may get either. No code may be further away, and few may differ."""
    native, right = cases.make(case), cases.make(case)
    native_ops.run_native(case, native, isa)
    rounds = native_ops.rounds_on(case, isa)
    with native_ops.rounding_products(case.dtype) if rounds else nullcontext():
        cases.call(reference, case, right)
    different, count = 0, 0
    for (name, codes, scales), (_, expected, right_scales) in zip(
        int8_lines(case, native), int8_lines(case, right), strict=True
    ):
        torch.testing.assert_close(scales, right_scales, rtol=1e-4, atol=0)
        assert (codes - expected).abs().max() <= 1, name
        assert (codes.abs().amax(-1) == 127).all(), "the largest value of a line has the largest code"
        different, count = different + int((codes != expected).sum()), count + codes.numel()
    assert different <= max(1, 0.01 * count)


@each_isa
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_makes_the_scale_of_an_int8_line_nan(isa, bad):
    case = cases.Case(
        *("norm_qkv_rope", "direct", torch.float32),
        **dict(B=2, D=8, H=1, G=2, d=6, S=3, pos=(1, 1), bias=True, int8_cache=True),
    )
    arguments = cases.make(case)
    arguments["bv"][7] = bad  # of V's head 1
    native_ops.run_native(case, arguments, isa)
    (_, _, k_scales), (_, codes, scales) = int8_lines(case, arguments)
    assert k_scales.isfinite().all() and scales[:, 0].isfinite().all()
    assert scales[:, 1].isnan().all() and not codes[:, 1].any()
    expected = cases.make(case)
    expected["bv"][7] = bad
    cases.call(reference, case, expected)
    assert cases.outputs(case, expected)["v_cache"][:, 1].isnan().all()


@each_isa
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_int8_lines_hold_values_of_any_size(isa, size):
    case = cases.Case(
        *("kv_fill", "direct", torch.float32),
        **dict(D=8, G=1, d=6, S=1, pos=(0,), layers=1, bias=True, int8_cache=True),
    )
    arguments = cases.make(case)
    (layer,) = arguments["layers"]
    layer.wv.zero_()
    layer.bv.copy_(size * torch.tensor([1.0, -1.0, 0.5, -0.25, 0.0, 0.75]))
    native_ops.run_native(case, arguments, isa)
    written = cases.outputs(case, arguments)["layers[0].v_cache"][0, 0]
    # Half a step, and what is too small for a scale of its own is 0.
    assert ((written - layer.bv).abs() <= size / 127 * 0.501 + 1e-36 * (size < 1e-36)).all()


@each_isa
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_in_x_makes_the_logits_of_its_slot_nan(isa, bad):
    case = cases.Case("norm_logits", "direct", torch.float32, B=2, D=70, V=40)
    arguments = cases.make(case)
    arguments["x"][1, 33] = bad
    native_ops.run_native(case, arguments, isa)
    assert arguments["logits"][0].isfinite().all()
    assert arguments["logits"][1].isnan().all()  # x / rms(x) is inf / inf; so it is in reference.py
    expected = cases.make(case)
    expected["x"][1, 33] = bad
    cases.call(reference, case, expected)
    assert expected["logits"][1].isnan().all()
