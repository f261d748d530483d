"""Every native op, on every ISA of this processor, against its definition in kernels/reference.py."""

import native_ops
import pytest
import torch
from native_ops import ISAS

from d3rt.kernels import cases, reference

ALL = [case for op in cases.OPS for case in cases.TEST_CASES[op]]
SOME = [case for case in ALL if case.name in ("gqa3", "gqa16", "odd", "triple", "three_layers", "full_batch")]
each_case = pytest.mark.parametrize("case", ALL, ids=str)
each_isa = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@each_case
@each_isa
def test_is_as_close_to_float64_as_torch_is(case, isa):
    native_ops.assert_close(case, native_ops.native(case, isa))


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


@pytest.mark.parametrize("case", SOME, ids=str)
def test_isas_agree(case):
    outputs = {isa: native_ops.native(case, isa) for isa in ISAS}
    for isa in ISAS[1:]:
        for name, tensor in outputs[isa].items():
            difference = (tensor.double() - outputs["scalar"][name].double()).abs()
            # Each may be off by its bound, to its own side.
            assert (difference <= 2 * native_ops.bounds(case)[name]).all(), f"{isa} {name}"


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
    batch, _, _, head_dim = k_cache.shape
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_in_the_cache_shows_if_and_only_if_it_is_read(isa, dtype, which):
    last, window = 100, 90
    for position in (0, 10, 11, 63, 64, 99, 100, 101, 129):
        cache = {name: torch.randn(1, 2, 130, 10).to(dtype) for name in "kv"}
        cache[which][0, 1, position] = torch.nan
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kv_fill_writes_the_same_bits_as_norm_qkv_rope(isa, dtype):
    sizes = dict(B=3, D=67, G=2, d=10, S=20, pos=(19, 0, 7), bias=True, head_norm=True)
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
            written = getattr(filled, name)
            assert torch.equal(written.nan_to_num(-7.0), of_layer[name].nan_to_num(-7.0)), name


@each_isa
def test_ops_read_the_cache_of_some_slots_out_of_a_larger_one(isa):
    """A runtime for 4 rows that generates 2 gives views into the middle of its cache."""
    case = cases.Case("attention", "strided", torch.float32, B=2, H=4, G=2, d=6, S=90, pos=(80, 3))
    arguments = cases.make(case)
    for name in ("k_cache", "v_cache"):
        larger = torch.full((4, 2, 100, 6), torch.nan)
        larger[1:3, :, :90] = arguments[name]
        arguments[name] = larger[1:3, :, :90]
    native_ops.run_native(case, arguments, isa)
    native_ops.assert_close(case, cases.outputs(case, arguments))


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
