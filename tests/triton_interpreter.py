"""Triton's kernels on the CPU: d3rt.kernels.cuda imported once more for Triton's interpreter, with bfloat16 mended.

`interpreted()` gives modules of their own, so that the same process may also have the kernels for compiling; run
their kernels inside `interpreting()`, or simply through `Interpreted`. Nothing here knows an op.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

PACKAGE = "d3rt.kernels.cuda"


@cache
def interpreted() -> SimpleNamespace:
    """The modules of d3rt.kernels.cuda (plans, eager, tokens, tiles), their kernels run by the interpreter. Skips where
    Triton is missing."""
    pytest.importorskip("triton", reason="triton is not installed")
    mend_bfloat16()
    mine = {name: module for name, module in sys.modules.items() if name.startswith(PACKAGE)}
    before = os.environ.get("TRITON_INTERPRET")
    for name in mine:
        del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"  # read by every @triton.jit
    try:
        found = {
            name: importlib.import_module(f"{PACKAGE}.{name}")
            for name in ("plans", "eager", "tokens", "tiles")
        }
    finally:
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            del sys.modules[name]
        sys.modules.update(mine)
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return SimpleNamespace(**found)


class Interpreted:
    """The ops of d3rt.kernels.cuda for `arch`, interpreted, on CPU tensors."""

    def __init__(self, arch: int):
        self.eager = interpreted().eager.Eager(arch, device="cpu")

    def __getattr__(self, op: str):
        def run(*arguments, **named):
            with interpreting():
                getattr(self.eager, op)(*arguments, **named)

        return run


@cache
def _standard_functions() -> list[tuple[object, str, object, object]]:
    """Where Triton keeps its own @jit functions (tl.sum, tl.zeros, ..): module, name, as it is, interpreted."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    importlib.import_module(
        "triton.experimental.gluon"
    )  # else the first launch does, and wants them as they are
    twins: dict[int, InterpretedFunction] = {}
    found = []
    for module in (tl.standard, tl):
        for name, value in vars(module).items():
            if isinstance(value, JITFunction):
                twin = twins.setdefault(id(value), InterpretedFunction(value.fn))
                found.append((module, name, value, twin))
    return found


@contextmanager
def interpreting() -> Iterator[None]:
    """Triton's own functions were made for the compiler when it was imported; in here they are the interpreter's."""
    try:
        for module, name, _, twin in _standard_functions():
            setattr(module, name, twin)
        yield
    finally:
        for module, name, value, _ in _standard_functions():
            setattr(module, name, value)


@cache
def mend_bfloat16() -> None:
    """The interpreter (Triton 3.4 to 3.9) keeps bfloat16 as uint16 and multiplies and adds those integers, and cuts
    where it should round. This widens to float32, computes, and rounds to nearest even, as the hardware does."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, bfloat16 = interpreter.InterpreterBuilder, tl.bfloat16
    handle = interpreter.TensorHandle
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widened(value):
        if value.dtype.scalar != bfloat16:
            return value.data
        return (value.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self, a, b, d, precision, imprecise):
        if bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return plain_dot(self, a, b, d, precision, imprecise)
        return handle(np.matmul(widened(a), widened(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def cast(self, source, target):
        if not (source.dtype.scalar == tl.float32 and target.scalar == bfloat16):
            return plain_cast(self, source, target)
        bits = np.asarray(source.data, np.float32).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return handle(np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded), bfloat16)

    def arithmetic(operation):
        def run(self, left, right):
            if left.dtype.scalar != bfloat16:
                return self.binary_op(left, right, operation)
            wide = operation(widened(left), widened(right)).astype(np.float32)
            return self.cast_impl(handle(wide, tl.float32), bfloat16)

        return run

    builder.create_dot, builder.cast_impl = dot, cast
    builder.create_fp_trunc = lambda self, source, target: self.cast_impl(source, target)
    operations = {"fadd": np.add, "fsub": np.subtract, "fmul": np.multiply, "fdiv": np.divide}
    for name, operation in operations.items():
        setattr(builder, f"create_{name}", arithmetic(operation))
