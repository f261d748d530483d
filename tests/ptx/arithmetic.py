"""Instructions that look at one thread only: each as a numpy function over all threads.

`function` gives it for an opcode, with the types of its sources and of its result. Approximate ones (ex2, rsqrt, rcp,
div.full) are computed exactly: within what their approximation allows, and the tests' tolerances know neither.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

DTYPES = {
    "pred": np.bool_,
    **dict.fromkeys(("b8", "u8"), np.uint8),
    **dict.fromkeys(("b16", "u16", "bf16"), np.uint16),
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2"), np.uint32),
    **dict.fromkeys(("b64", "u64"), np.uint64),
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64},
}
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_ROUNDING = {"rn", "rzi", "full", "approx", "ftz", "lo"}  # of the modifiers those that need nothing more said


def bits_of(dtype) -> np.dtype:
    """The unsigned type of the same width."""
    return np.dtype(f"u{np.dtype(dtype).itemsize}") if dtype != np.bool_ else np.dtype(np.bool_)


@cache
def _half_table() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def widen_bfloat16(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(x):
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def widen_float16(x):
    """float16 to float32, by a table: quicker than numpy's conversion."""
    return _half_table()[x.view(np.uint16)]


def _fma(x, y, z):
    return (x.astype(np.float64) * y + z).astype(x.dtype)


def _multiply_high(x, y):
    if x.dtype.itemsize == 4:
        wide = np.int64 if x.dtype.kind == "i" else np.uint64
        return ((x.astype(wide) * y.astype(wide)) >> 32).astype(x.dtype)
    if x.dtype.kind == "i":
        raise KeyError("mul.hi.s64")
    low = np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> 32, y & low, y >> 32
    middle = x1 * y0 + ((x0 * y0) >> 32)
    return x1 * y1 + (middle >> 32) + (((middle & low) + x0 * y1) >> 32)


def _divide(x, y):
    """As C does, towards 0; of integers, what is divided by 0 is all ones."""
    if x.dtype.kind == "f":
        return x / y
    x, y = np.broadcast_arrays(x, y)
    quotient = np.floor_divide(np.abs(x), np.abs(y), out=np.full(x.shape, -1).astype(x.dtype), where=y != 0)
    return np.where((x < 0) != (y < 0), -quotient, quotient) if x.dtype.kind == "i" else quotient


def _shift(operation, fills_with_sign: bool):
    def shift(x, by):
        width = 8 * x.dtype.itemsize
        far = (x >> (width - 1) if x.dtype.kind == "i" else np.zeros_like(x)) if fills_with_sign else x * 0
        return np.where(by >= width, far, operation(x, np.minimum(by, width - 1).astype(x.dtype))).astype(
            x.dtype
        )

    return shift


def _extract(x, position, length):
    """bfe, for fields that lie within x"""
    width = 8 * x.dtype.itemsize
    position = np.minimum(position & 0xFF, width - 1)
    length = np.minimum(length & 0xFF, width - position)
    up = np.minimum(width - position - length, width - 1).astype(x.dtype)
    down = np.minimum(width - length, width - 1).astype(x.dtype)
    return np.where(length == 0, np.zeros_like(x), (x << up) >> down)


def _permute(low, high, selector):
    """prmt.b32: byte i of the result is the one that hex digit i of selector names; 8 and up repeat its sign."""
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint64)
    for i in range(4):
        digit = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((digit & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte >> np.uint64(7) != 0, np.uint64(0xFF), np.uint64(0))
        out |= np.where(digit & np.uint64(8) != 0, sign, byte) << np.uint64(8 * i)
    return out.astype(np.uint32)


def _compare(name: str, kind: str) -> Callable:
    if name in ("num", "nan"):
        either = lambda x, y: np.isnan(x) | np.isnan(y)  # noqa: E731
        return either if name == "nan" else lambda x, y: ~either(x, y)
    if kind[0] == "f" and name == "ne":
        return lambda x, y: (x < y) | (x > y)
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    plain = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    plain |= {"eq": np.equal, "ne": np.not_equal}
    if kind[0] == "f" and name.endswith("u"):  # true if either is NaN
        ordered = _compare(name[:-1], kind)
        return lambda x, y: ordered(x, y) | np.isnan(x) | np.isnan(y)
    return plain[unsigned.get(name, name)]


def _to_integer(dtype):
    """Towards 0, to the nearest that there is; NaN to 0."""
    limits = np.iinfo(dtype)

    def convert(x):
        wide = np.trunc(np.where(np.isnan(x), 0, x).astype(np.float64))
        inside = (wide > float(limits.min)) & (wide < float(limits.max))
        return np.where(
            inside, np.where(inside, wide, 0).astype(dtype), np.where(wide < 0, limits.min, limits.max)
        )

    return lambda x: convert(x).astype(dtype)


def _convert(target: str, source: str) -> Callable:
    to, floats = DTYPES[target], ("f16", "bf16", "f32", "f64")
    if target.endswith("x2"):
        half = round_to_bfloat16 if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        return lambda high, low: (half(high).astype(np.uint32) << 16) | half(low)
    if source == "bf16":
        return {"f32": widen_bfloat16}[target]
    if target == "bf16":
        return {"f32": round_to_bfloat16}[source]
    if (source, target) == ("f16", "f32"):
        return widen_float16
    if source in floats and target not in floats:
        return _to_integer(to)
    return lambda x: x.astype(to)


_FLOAT = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "fma": _fma},
    **{"min": np.fmin, "max": np.fmax, "neg": np.negative, "abs": np.abs},
    **{"ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rcp": np.reciprocal},
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype),
}
_INTEGER = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide},
    "rem": lambda x, y: x - _divide(x, y) * y,
    "mad": lambda x, y, z: x * y + z,
    **{"min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs},
}
_BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_SOURCES = {
    "neg": 1,
    "abs": 1,
    "not": 1,
    "ex2": 1,
    "lg2": 1,
    "sqrt": 1,
    "rcp": 1,
    "rsqrt": 1,
    "fma": 3,
    "mad": 3,
}


def function(parts: list[str]) -> tuple[Callable, list[str], str] | None:
    """(function of the sources, their types, the result's type) of an opcode like ["add", "f32"], or None."""
    name, kind, modifiers = parts[0], parts[-1], set(parts[1:-1])
    if name == "setp" and len(parts) == 3:
        return _compare(parts[1], kind), [kind, kind], "pred"
    if name == "selp":
        return lambda x, y, which: np.where(which, x, y), [kind, kind, "pred"], kind
    if name == "cvt":
        target, source = parts[-2], kind
        if set(parts[1:-2]) - {"rn", "rzi"} or ({source, target} - DTYPES.keys()):
            return None
        return _convert(target, source), [source] * (2 if target.endswith("x2") else 1), target
    if name in ("mul", "mad") and "wide" in modifiers:
        wide = _WIDER[kind]
        to = DTYPES[wide]
        if name == "mul":
            return lambda x, y: x.astype(to) * y.astype(to), [kind, kind], wide
        return lambda x, y, z: x.astype(to) * y.astype(to) + z, [kind, kind, wide], wide
    if name == "mul" and "hi" in modifiers:
        return _multiply_high, [kind, kind], kind
    if modifiers - _ROUNDING or kind not in DTYPES:
        return None
    if name in ("shl", "shr"):
        operation = np.left_shift if name == "shl" else np.right_shift
        return _shift(operation, name == "shr"), [kind, "u32"], kind
    if name == "bfe":
        return _extract, [kind, "u32", "u32"], kind
    if name == "prmt":
        return _permute, ["b32"] * 3, "b32"
    if name == "popc":
        return lambda x: np.bitwise_count(x).astype(np.uint32), [kind], "u32"
    if name in _BITS:
        return _BITS[name], [kind] * _SOURCES.get(name, 2), kind
    table = _FLOAT if kind in ("f32", "f64") else _INTEGER if kind[0] in "su" else {}
    if name in table:
        return table[name], [kind] * _SOURCES.get(name, 2), kind
    return None
