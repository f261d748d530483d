"""Launch: one kernel launch, as a value. plans.py makes them, compiled.py makes machine code of them; who launches what
is up to eager.py and to the backend's graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARTIALS, COUNTERS = "partials", "counters"  # stand for working memory in Launch.arguments
ALIGNMENT = 16  # bytes; what 128-bit loads need

TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: one node of a graph.

    arguments: the pointers, in the order of the compiled kernel's parameters; PARTIALS and COUNTERS stand for working
    memory of `partials` float32 and `counters` int32, shared by all launches and the latter 0 before each.
    constants: everything else, compiled in. uploads: arguments whose content was made here, in host memory.
    """

    op: str
    kernel: Any  # a @triton.jit function
    grid: tuple[int, int, int]
    arguments: Mapping[str, Tensor | str]
    constants: Mapping[str, Any]
    warps: int
    stages: int = 1
    partials: int = 0
    counters: int = 0
    uploads: tuple[str, ...] = ()

    def signature(self) -> dict[str, str]:
        """Type of every parameter of the kernel, as Triton's compiler takes them: "*fp16", or "constexpr"."""
        kinds = {PARTIALS: torch.float32, COUNTERS: torch.int32}
        return {
            name: "constexpr"
            if name in self.constants
            else "*" + TRITON_TYPES[kinds[at] if isinstance(at := self.arguments[name], str) else at.dtype]
            for name in self.kernel.arg_names
        }

    def aligned(self) -> tuple[str, ...]:
        """The pointers that are multiples of ALIGNMENT; the kernel must be compiled with no more than these so."""
        return tuple(
            name
            for name, at in self.arguments.items()
            if isinstance(at, str) or (at.device.type == "meta" or at.data_ptr() % ALIGNMENT == 0)
        )


def launch_of(op: str, kernel, grid, values: dict[str, Any], warps: int, **more) -> Launch:
    """A Launch out of all the kernel's parameters: tensors and working memory are arguments, the rest constants."""
    missing = set(kernel.arg_names) ^ set(values)
    if missing:
        raise TypeError(f"{op}: parameters {sorted(missing)} do not fit the kernel")
    pointers = {
        name: values[name]
        for name in kernel.arg_names
        if isinstance(values[name], Tensor) or values[name] in (PARTIALS, COUNTERS)
    }
    constants = {name: values[name] for name in kernel.arg_names if name not in pointers}
    return Launch(op, kernel, (*grid, 1, 1)[:3], pointers, constants, warps, **more)
