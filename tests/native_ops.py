"""Runs one op of a case natively (a tape of its own), by the reference, and in float64: what the kernel tests compare.

Also the tolerance they share. Everything comes from d3rt.kernels.cases; nothing here knows an op by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import torch
from torch import Tensor

from d3rt import _C
from d3rt.kernels import cases, kv_line, reference
from d3rt.kernels.cases import Case

ISAS = _C.available_isas()
EPS = torch.finfo(torch.float32).eps
# How far a float32 value moves at most, relative to itself, when it is rounded to 8 or 11 significant bits; or,
# relative to the largest of its row, to int16 and a scale.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.int16: 2.0**-16}
MATRIX_OPS = {"norm_qkv_rope", "proj_add", "norm_gate_up", "kv_fill", "norm_logits"}
FLOAT16_STEP = 2.0**-24  # between the smallest float16 values, which have fewer bits


@cache
def pool(threads: int):
    return _C.ThreadPool(threads)


def arena_of(*tensors: Tensor):
    arena = _C.Arena()
    for tensor in tensors:
        arena.add(tensor)
    return arena


def new_tape(arena, isa: str = "", threads: int = 1):
    return _C.Tape(pool(threads), arena, isa)


def run_native(case: Case, arguments: dict, isa: str = "", threads: int = 1) -> None:
    """Records the op on buffers that the arena owns, and replays it once."""
    tape = new_tape(arena_of(*(tensor for _, tensor in cases.tensors(arguments))), isa, threads)
    cases.call(tape, case, arguments)
    tape.replay()


def native(case: Case, isa: str = "", threads: int = 1, slack: int = 0) -> dict[str, Tensor]:
    """The op's outputs from the native kernel."""
    arguments = cases.make(case, slack=slack)
    run_native(case, arguments, isa, threads)
    return cases.outputs(case, arguments)


def _converted(arguments: dict, dtype: torch.dtype) -> dict:
    """A copy with every float tensor in this dtype, and every int8 cache as the values [B, G, S, d] it stands for."""

    def convert(name: str, value):
        if isinstance(value, list):
            return [
                reference.FillLayer(*(convert(*item) for item in layer._asdict().items())) for layer in value
            ]
        if name.endswith("_cache") and value.dtype == torch.int8:
            value = kv_line.decode(value)
        wanted = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype, copy=True) if wanted else value

    return {name: convert(name, value) for name, value in arguments.items()}


@cache
def exact(case: Case) -> dict[str, Tensor]:
    """The op's outputs by its definition, with every tensor and all arithmetic in float64."""
    return exact_of(case, cases.make(case))


def exact_of(case: Case, arguments: dict) -> dict[str, Tensor]:
    """`exact` for arguments of one's own, which stay as they are."""
    arguments = _converted(arguments, torch.float64)
    with mock.patch.object(
        torch.Tensor, "float", torch.Tensor.double
    ):  # reference widens weights by .float()
        cases.call(reference, case, arguments)
    return cases.outputs(case, arguments)


@cache
def bounds(case: Case) -> dict[str, Tensor]:
    """How far each output element may be from `exact`: twice the largest error that torch's float32 makes on the same
    numbers, plus 4 eps of the largest value, for tensors so small that torch's own error is 0 by luck (the most that
    was needed of it is 0.9 eps). Where the output is kept in 16 or 8 bits, its last rounding comes on top."""
    return bounds_of(case, cases.make(case), exact(case))


def whole_numbers(x: Tensor) -> Tensor:
    """x as int16 of one scale over the last dimension hold it."""
    scale = x.abs().amax(-1, keepdim=True) / 32767
    return torch.where(scale > 0, x / scale, 0).round() * scale


def rounded_attention(case: Case, arguments: dict, dtype: torch.dtype) -> Tensor:
    """Attention by its definition in float64, but for q and the softmax's weights, which products of 16-bit numbers
    want rounded to dtype. int16, for an int8 cache: a line of V gives its scale to its weight; rounding over all
    positions is no finer than over some."""
    out = torch.zeros_like(arguments["q"]).double()
    group = case.H // case.G

    def rounded(x: Tensor) -> Tensor:
        return whole_numbers(x) if dtype == torch.int16 else x.to(dtype).double()

    for slot, (line, last) in enumerate(zip(case.lines or range(case.B), case.pos, strict=True)):
        first = max(0, last + 1 - case.window) if case.window else 0
        seen = [arguments[name][line, :, first : last + 1] for name in ("k_cache", "v_cache")]
        of_v = 1.0
        if dtype == torch.int16:
            of_v = kv_line.parts(seen[1])[1].double().squeeze(-1).repeat_interleave(group, dim=0)
        seen = [kv_line.read(lines) for lines in seen]
        k, v = (values.double().repeat_interleave(group, dim=0) for values in seen)
        q = rounded(arguments["q"][slot].double())
        scores = torch.einsum("hd,htd->ht", q, k) * arguments["scale"]
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        sums = torch.einsum("ht,htd->hd", rounded(weights * of_v) / of_v, v)
        out[slot] = sums / weights.sum(-1, keepdim=True)
    return out


@contextmanager
def rounding_products(dtype: torch.dtype) -> Iterator[None]:
    """Here the reference rounds to dtype what meets a weight matrix."""
    definition = reference.linear

    def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return definition(x.to(dtype).to(x.dtype), w, bias)

    with mock.patch.object(reference, "linear", linear):
        yield


@cache
def rounded_bounds(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """`bounds` of an op that rounds to dtype like that: twice the error that the rounding alone makes on the same
    numbers comes on top, and one rounding of the largest value, where that is 0 by luck."""
    arguments, allowed = cases.make(case), {}
    if case.op == "attention":
        rounded = {"out": rounded_attention(case, arguments, dtype)}
    else:
        with rounding_products(dtype):
            rounded = exact_of(case, arguments)
    for name, right in exact(case).items():
        error = (rounded[name] - right).abs().max()
        allowed[name] = bounds(case)[name] + 2 * error + ROUNDING[dtype] * right.abs().max()
    return allowed


PAIRED = {"avx2": 16, "avx512": 32, "avx512_bf16": 32}  # what head_dim must be a multiple of, up to 256


def rounds_on(case: Case, isa: str) -> bool:
    """Whether the kernels of this ISA round what they multiply: csrc/cpu/attend_products.h and halves_dot.h."""
    if case.op == "attention":
        paired = case.d <= 256 and case.d % PAIRED.get(isa, 512) == 0
        return paired and (case.int8_cache or (isa == "avx512_bf16" and case.dtype == torch.bfloat16))
    return isa == "avx512_bf16" and case.dtype == torch.bfloat16 and case.op in MATRIX_OPS


def allowed_on(case: Case, isa: str) -> dict[str, Tensor]:
    """How far the kernels of this ISA may be: `bounds`, or rounded_bounds where they round."""
    if not rounds_on(case, isa):
        return bounds(case)
    whole = case.op == "attention" and case.int8_cache
    return rounded_bounds(case, torch.int16 if whole else case.dtype)


def bounds_of(case: Case, arguments: dict, right: dict[str, Tensor]) -> dict[str, Tensor]:
    """`bounds` for arguments of one's own, which stay as they are, and what is right for them."""
    arguments = _converted(arguments, torch.float32)  # torch's error without rounding; a copy
    cases.call(reference, case, arguments)
    torch_outputs = cases.outputs(case, arguments)
    allowed = {}
    for name, value in right.items():
        arithmetic = 2 * (torch_outputs[name] - value).abs().max() + 4 * EPS * value.abs().max()
        if case.int8_cache:  # half a step between codes
            rounding = value.abs().amax(-1, keepdim=True) / 127 / 2
        else:
            rounding = ROUNDING[case.dtype] * value.abs() + FLOAT16_STEP * (case.dtype == torch.float16)
        allowed[name] = arithmetic + rounding * (name == "hidden" or name.endswith("_cache"))
    return allowed


def assert_close(case: Case, got: dict[str, Tensor], right=None, allowed=None) -> None:
    """`got` within what is allowed (None: on this process' ISA) of what is right (`exact`); NaN is never close."""
    right, allowed = right or exact(case), allowed or allowed_on(case, _C.selected_isa())
    for name, value in right.items():
        error = (got[name].double() - value).abs()
        worst = float((error / allowed[name].clamp(min=1e-300)).max())
        assert worst <= 1.0, (
            f"{case} {name}: off by {worst:.2f} times what is allowed, {float(error.max()):.3g}"
        )


def storage_bits(tensor: Tensor) -> Tensor:
    """The whole storage under a tensor as integers, so that NaN equals itself; a copy."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]).clone()


def owned_bits(case: Case, name: str, tensor: Tensor) -> Tensor:
    """Mask over `storage_bits(tensor)` of the elements that output `name` of the op owns."""
    mask = torch.zeros(storage_bits(tensor).shape, dtype=torch.bool)
    view = mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    view[cases.owned(case, name)] = True
    return mask
