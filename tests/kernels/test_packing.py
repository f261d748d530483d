"""int8 and int4 matrices: the layout loses nothing, quantising is as accurate as its step, and every native op with
packed weights does what kernels/reference.py says, on every ISA."""

import math
import time
from dataclasses import replace
from pathlib import Path

import native_ops
import pytest
import torch
from native_ops import ISAS
from packed_cases import CASES, RANGES, WIDTHS, outputs, packed_arguments, parts, random_packed

from d3rt import _C
from d3rt.backends.cpu import MOST_TOKENS, PACKED_TOKENS, CpuBackend, gemm_dtypes
from d3rt.kernels import cases, reference
from d3rt.kernels.cases import Case
from d3rt.kernels.packing import FORMATS, GROUP, pack, pack_codes, quantise_activations
from d3rt.prefill import PREFILL_CHUNK_TOKENS
from d3rt.quantize import empty_packed

EPS = torch.finfo(torch.float32).eps
each_format = pytest.mark.parametrize("format", WIDTHS)


def run_native(case: Case, arguments: dict, isa: str, threads: int) -> dict:
    tape = native_ops.new_tape(native_ops.arena_of(*parts(list(arguments.values()))), isa, threads)
    cases.call(tape, case, arguments)
    tape.replay()
    return outputs(case, arguments)


@each_format
@pytest.mark.parametrize("shape", [(16, 32), (1, 64), (33, 96), (131, 576)])
def test_the_layout_keeps_every_code_and_scale(format, shape):
    low, high = RANGES[format[:4]]
    codes = torch.randint(low, high + 1, shape)
    scales = torch.rand(shape[0], shape[1] // GROUP).half()
    minima = torch.rand(shape[0], shape[1] // GROUP).half() if "minima" in format else None
    packed = pack_codes(format[:4], codes, scales, minima)
    zero = 8 if format == "int4" else 0
    assert torch.equal(packed.codes().long(), codes - zero)
    assert torch.equal(packed.group_scales(), scales.float())
    wide = (codes - zero).view(shape[0], -1, GROUP) * scales.float()[..., None]
    wide = wide + minima.float()[..., None] if minima is not None else wide
    assert torch.equal(packed.dequantize(), wide.view(shape))


def test_int8_is_off_by_half_a_step_at_most():
    weight = torch.randn(48, 128)
    packed = pack(weight, "int8")
    step = packed.group_scales().abs().repeat_interleave(GROUP, dim=1)
    assert ((packed.dequantize() - weight).abs() <= 0.5 * step * (1 + 2**-9)).all()


def q8_0(weight):
    """weight as GGUF's Q8_0 keeps it."""
    groups = weight.view(len(weight), -1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
    return ((groups / scales).round().clamp(-127, 127) * scales).view_as(weight)


def test_int8_is_no_worse_than_q8_0_and_much_better_where_values_lie_on_a_grid():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator)
    # What a file of 4 bits holds: multiples of a step from a minimum on, in each group.
    grid = torch.randint(16, (48, 4, GROUP), generator=generator)
    steps, minima = torch.rand(48, 4, 1, generator=generator), torch.randn(48, 4, 1, generator=generator)
    grid = (grid * steps + minima * 3).view(48, 128)
    for values, most in ((weight, 0.9), (grid, 0.5)):
        ours, theirs = (
            squared_errors(values, made) for made in (pack(values, "int8").dequantize(), q8_0(values))
        )
        assert (ours <= theirs * (1 + 64 * EPS)).all()
        assert ours.sum() < most * theirs.sum()


def test_what_q8_0_holds_is_kept_as_it_is():
    blocks = q8_0(torch.randn(48, 128, generator=torch.Generator().manual_seed(0)))
    packed = pack(blocks, "int8")
    assert (
        torch.equal(packed.dequantize(), blocks)
        and packed.codes().abs().view(48, -1, GROUP).amax(-1).eq(127).all()
    )


def squared_errors(weight, dense):
    """Of each group, float64 [rows, groups]."""
    return (dense - weight).double().view(len(weight), -1, GROUP).square().sum(-1)


def test_int4_is_no_worse_than_minimum_and_range_alone_and_better_on_the_whole():
    weight = torch.randn(48, 128)
    groups = weight.view(48, -1, GROUP)
    minima = groups.amin(-1, keepdim=True).half().float()
    scales = ((groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15).half().float()
    plain = ((groups - minima) / scales).round().clamp(0, 15) * scales + minima
    ours = squared_errors(weight, pack(weight, "int4").dequantize())
    theirs = squared_errors(weight, plain.view_as(weight))
    assert (ours <= theirs * (1 + 64 * EPS)).all()
    assert ours.sum() < 0.9 * theirs.sum()


def test_outliers_cost_less_with_minima_than_without():
    """A symmetric scale must reach the largest weight on both sides; most groups have it on one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator) / torch.rand(48, 128, generator=generator).sqrt()
    groups = weight.view(48, -1, GROUP)
    scales = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
    codes = (groups / scales[..., None] + 8).round().clamp(0, 15)
    symmetric = pack_codes("int4", codes.view_as(weight), scales)
    ours = squared_errors(weight, pack(weight, "int4").dequantize()).sum()
    assert ours < 0.7 * squared_errors(weight, symmetric.dequantize()).sum()


def test_sixteen_equally_spaced_values_are_kept_as_they_are():
    """What a Q4_1 block holds; its scale and minimum are float16."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (37, 64), generator=generator)
    codes.view(37, -1, GROUP)[..., 5], codes.view(37, -1, GROUP)[..., 20] = 0, 15
    scales = torch.rand(37, 2, generator=generator).half() / 64 + 2**-10
    minima = torch.randn(37, 2, generator=generator).half()
    blocks = pack_codes("int4", codes, scales, minima)
    again = pack(blocks.dequantize(), "int4")
    assert torch.equal(again.dequantize(), blocks.dequantize())
    assert torch.equal(again.data, blocks.data)


def awkward(rows, cols, dtype):
    """Weights of every kind a matrix may have: outliers, equal ones, zeros of either sign, some too small for float16,
    some that stand on the edge of two codes."""
    generator = torch.Generator().manual_seed(rows + cols)
    weight = torch.randn(rows, cols, generator=generator) / torch.rand(rows, cols, generator=generator)
    weight[::5] = torch.randint(-127, 128, weight[::5].shape, generator=generator) / 2
    weight[1::7] *= 1e-7
    weight[2::11] = 0.1
    weight[3::13] = 0.0
    weight[4::17, ::2] = -0.0
    weight[5::19] += 100
    return weight.to(dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (37, 96), (131, 576), (300, 32)], ids=str)
def test_packing_natively_gives_the_very_bits_whatever_the_threads(shape, dtype, format):
    weight = awkward(*shape, dtype)
    expected = pack(weight, format)
    for threads in (1, 2, 5):
        got = CpuBackend(threads).pack(weight, format)
        assert (got.format, got.shape) == (format, shape)
        assert_same_bits(got, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "of",
    [
        lambda w: w[3:40, :96],  # rows further apart than they are long
        lambda w: w[:, :64].double(),  # no kernel's dtype
        lambda w: w.T[:64, :64],  # columns further apart than rows
    ],
    ids=["part", "float64", "transposed"],
)
def test_packing_natively_takes_any_matrix_that_the_definition_takes(of, format):
    weight = of(awkward(64, 128, torch.float32))
    assert_same_bits(CpuBackend(2).pack(weight, format), pack(weight, format))


def assert_same_bits(got, expected):
    assert torch.equal(got.data, expected.data)
    assert torch.equal(got.scales.view(torch.int16), expected.scales.view(torch.int16))
    assert (got.minima is None) is (expected.minima is None)
    if got.minima is not None:
        assert torch.equal(got.minima.view(torch.int16), expected.minima.view(torch.int16))


def test_packing_natively_refuses_what_does_not_fit_by_name():
    pool = native_ops.pool(1)
    out = empty_packed("int8", 70, 96)
    with pytest.raises(
        ValueError, match=r"pack: weight is float32 \[71, 96\], but must be float32 \[70, 96\]"
    ):
        _C.pack(pool, out, torch.zeros(71, 96))
    with pytest.raises(ValueError, match="pack: weight is int32.*must be float32, bfloat16 or float16"):
        _C.pack(pool, out, torch.zeros(70, 96, dtype=torch.int32))
    with pytest.raises(ValueError, match="pack: minima is missing"):
        _C.pack(pool, replace(empty_packed("int4", 70, 96), minima=None), torch.zeros(70, 96))
    with pytest.raises(ValueError, match="pack: int8 has no minima"):
        _C.pack(pool, replace(out, minima=out.scales), torch.zeros(70, 96))


def test_a_group_of_equal_weights_packs_to_them():
    for format in FORMATS:
        assert not pack(torch.zeros(16, 32), format).dequantize().any()
    assert (pack(torch.full((16, 32), 0.375), "int4").dequantize() == 0.375).all()


@each_format
def test_some_rows_are_taken_without_the_others(format):
    packed, rows = random_packed(131, 64, format), torch.tensor([130, 0, 17, 17, 15])
    assert torch.equal(packed.take(rows), packed.dequantize()[rows])


def test_a_width_that_is_no_multiple_of_the_group_is_refused():
    with pytest.raises(ValueError, match="48 columns.*multiple of 32"):
        pack_codes("int8", torch.zeros(4, 48, dtype=torch.int8), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="int3.*int8, int4"):
        pack_codes("int3", torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4, 1))


def test_activations_are_off_by_half_a_step_at_most_and_zeros_stay_zero():
    x = torch.randn(5, 96) * torch.tensor([1e-20, 1, 1e3, 0, 1e20])[:, None]
    codes, scales = quantise_activations(x)
    step = scales.repeat_interleave(GROUP, dim=-1)
    assert ((codes * step - x).abs() <= step * (0.5 + 127 * 2 * EPS)).all()
    assert codes.abs().max() == 127 and not codes[3].any()


@each_format
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op_does_what_the_reference_says(case, isa, format):
    expected = packed_arguments(case, format)
    cases.call(reference, case, expected)
    for name, value in outputs(case, expected).items():
        # Sums of the same integers, scaled in float32. Where a norm comes first its last bit may differ, which moves
        # an activation by a whole step where it stood on the edge of two: 2^-7 of a group's largest term.
        exact_input = case.op in ("embed", "proj_add")
        size = value.abs().max()
        allowed = size * (64 * EPS if exact_input else 2**-7)
        for threads in (1, 3):
            got = run_native(case, packed_arguments(case, format), isa, threads)[name]
            assert ((got - value).abs() <= allowed).all(), f"{name}, {threads} threads"


@each_format
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 4, 37])
def test_the_prefill_product_equals_the_reference(tokens, isa, format):
    w, x = random_packed(70, 96, format), torch.randn(tokens, 96)
    out = torch.full((tokens, 70), torch.nan)
    _C.linear(native_ops.pool(2), out, x, w, isa)
    expected = reference.linear(x, w)
    assert ((out - expected).abs() <= 64 * EPS * expected.abs().max()).all()


@each_format
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_gives_the_very_floats(dtype, isa, format):
    w = random_packed(70, 96, format)
    out = torch.full((70, 96), torch.nan, dtype=dtype)
    _C.unpack(native_ops.pool(3), out, w, isa)
    assert torch.equal(out, w.dequantize(dtype))


def test_unpacking_into_another_shape_or_dtype_is_refused():
    w = random_packed(70, 96, "int8")
    with pytest.raises(
        ValueError, match=r"unpack: out is float32 \[71, 96\], but must be float32 \[70, 96\]"
    ):
        _C.unpack(native_ops.pool(1), torch.empty(71, 96), w)
    with pytest.raises(ValueError, match="unpack: out must be float32 or bfloat16"):
        _C.unpack(native_ops.pool(1), torch.empty(70, 96, dtype=torch.float16), w)


@each_format
@pytest.mark.parametrize("native_bfloat16", [False, True])
def test_long_prompts_meet_the_unpacked_matrix(native_bfloat16, format):
    """In float32 the product is exact up to rounding; in bfloat16 both factors are rounded to 2^-9 of themselves."""
    backend = CpuBackend()
    backend._packed_tokens = PACKED_TOKENS
    backend._unpacked_dtype = torch.bfloat16 if native_bfloat16 else torch.float32
    w, x = random_packed(70, 96, format), torch.randn(PACKED_TOKENS + 1, 96)
    dense = w.dequantize()
    expected, terms = x @ dense.T, x.abs() @ dense.abs().T
    allowed = terms * (2.0**-8 + 2.0**-9 if native_bfloat16 else 96 * EPS)
    assert ((backend.linear(x, w) - expected).abs() <= allowed).all()
    assert backend.linear_bytes(w) == 70 * 96 * (2 if native_bfloat16 else 4)


@each_format
def test_long_prompts_meet_the_packed_matrix_where_kernels_have_dot_products(format):
    """Then a prompt is read with the very numbers that decoding uses, whatever its length."""
    backend = CpuBackend()
    backend._packed_tokens = math.inf
    w, x = random_packed(70, 96, format), torch.randn(PACKED_TOKENS + 1, 96)
    together = backend.linear(x, w)
    assert torch.equal(together, torch.cat([backend.linear(row, w) for row in x.split(1)]))
    assert MOST_TOKENS == PREFILL_CHUNK_TOKENS
    assert backend.linear_bytes(w) == MOST_TOKENS * (96 + 3 * 8)  # codes; three groups' scales and sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_are_exact_where_the_processor_has_none(dtype):
    """They are then float32 products of the same weights: only the order of sums may differ."""
    backend = CpuBackend()
    backend._gemm_dtypes = {torch.float32}
    w, x = torch.randn(70, 96).to(dtype), torch.randn(5, 96)
    expected, terms = x @ w.float().T, x.abs() @ w.float().abs().T
    assert ((backend.linear(x, w) - expected).abs() <= 96 * EPS * terms).all()
    assert backend.linear_bytes(w) == 4 * w.numel()


@pytest.mark.parametrize(
    ("flags", "dtypes"),
    [
        ("flags\t\t: fpu avx2 fma", set()),
        ("flags\t\t: avx512f avx512_bf16", {torch.bfloat16}),
        ("Features\t: fp asimd asimdhp bf16", {torch.bfloat16, torch.float16}),
        ("", set()),
    ],
)
def test_what_the_processor_multiplies_is_read_off_its_flags(tmp_path, flags, dtypes):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    assert gemm_dtypes(str(tmp_path / "cpuinfo")) == {torch.float32} | dtypes
    assert gemm_dtypes(str(tmp_path / "absent")) == {torch.float32}


def test_a_packed_matrix_of_the_wrong_size_is_refused_by_name():
    case = CASES[3]
    arguments = packed_arguments(case, "int8")
    arguments["w"] = replace(arguments["w"], rows=12)
    tape = native_ops.new_tape(native_ops.arena_of(*parts(list(arguments.values()))))
    with pytest.raises(ValueError, match=r"proj_add: w is packed \[12, 576\], but must be \[33, 576\]"):
        cases.call(tape, case, arguments)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_products_of_a_prefill_are_done_by_torchs_threads():
    """Workers of ours would share the cores with torch's threads, which spin for a while after each of its products."""

    def threads() -> set[Path]:
        return set(Path("/proc/self/task").iterdir())

    def times_woken(thread: Path) -> str:
        lines = (thread / "status").read_text().splitlines()
        return next(line for line in lines if line.startswith("voluntary_ctxt_switches"))

    before = threads()
    pool = _C.ThreadPool(2)
    (worker,) = threads() - before
    time.sleep(0.1)  # until it has parked
    asleep = times_woken(worker)
    _C.linear(pool, torch.empty(64, 64), torch.randn(64, 512), random_packed(64, 512, "int8"))
    time.sleep(0.1)
    assert times_woken(worker) == asleep
