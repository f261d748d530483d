"""The cpu backend: C++ SIMD kernels recorded into tapes, and the C++ dispatcher that replays them (csrc/).

The only file that imports d3rt._C, on first use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from d3rt.errors import BackendUnavailableError
from d3rt.kernels.packing import PackedMatrix
from d3rt.sampling import SamplingParams


def native() -> Any:
    """The extension module; BackendUnavailableError says how to build it when it is missing."""
    try:
        from d3rt import _C
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend 'cpu': the extension d3rt._C does not load ({error}); build it with 'pip install -e .'; "
            "available here: reference."
        ) from error
    return _C


def usable_cores() -> int:
    """Cores this process may run on; all of them where the system cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CpuLoop:
    """csrc's Dispatcher; only `start` differs, in how it is given its parameters."""

    def __init__(self, dispatcher: Any):
        self._dispatcher = dispatcher
        for name in ("add", "wait", "read", "cancel", "begin", "step", "commit"):
            setattr(self, name, getattr(dispatcher, name))

    def start(self, *, programs, eos_tokens, pad_token, sampling: SamplingParams, seen) -> None:
        self._dispatcher.start(
            programs=programs,
            eos_tokens=eos_tokens,
            pad_token=pad_token,
            sampling=native().SamplingParams(**asdict(sampling)),
            seen=seen,
        )

    @property
    def step_seconds(self) -> list[float]:
        return self._dispatcher.step_seconds


class CpuBackend:
    """C++ SIMD kernels on `threads` threads (default: every core this process may use)."""

    name = "cpu"

    def __init__(self, threads: int | None = None):
        _C = native()
        self.threads = threads or usable_cores()
        self._pool = _C.ThreadPool(self.threads)
        self._arena = _C.Arena()

    @property
    def scratch_bytes(self) -> int:
        return self._arena.scratch_bytes

    def own(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._arena.add(tensor)

    def own_weights(self, tensors: Sequence[Tensor]) -> None:
        self.own(tensors)
        self._arena.use_large_pages()

    def record(self, step: Callable[[Any], None]) -> Any:
        tape = native().Tape(self._pool, self._arena)
        step(tape)
        return tape

    def packed_linear(self, x: Tensor, w: PackedMatrix) -> Tensor:
        out = torch.empty(len(x), w.rows)
        native().linear(self._pool, out, x.contiguous(), w)
        return out

    def loop(self, token, pos, logits, filled) -> CpuLoop:
        return CpuLoop(native().Dispatcher(self._arena, token, pos, logits, filled))

    def describe(self) -> dict[str, str]:
        _C = native()
        return {
            "runs": f"C++ {_C.selected_isa()} (of {', '.join(_C.available_isas())})",
            "threads": str(self.threads),
        }
