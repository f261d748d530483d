"""The cpu backend: C++ SIMD kernels recorded into tapes, and the C++ dispatcher that replays them (csrc/)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from d3rt.backends.base import Built, Needs, causal_attention, typed_linear
from d3rt.backends.cores import usable_cores
from d3rt.backends.native import native
from d3rt.backends.packer import native_pack
from d3rt.kernels.packing import PackedMatrix
from d3rt.sampling import SamplingParams


def gemm_dtypes(cpuinfo: str = "/proc/cpuinfo") -> set[torch.dtype]:
    """The dtypes whose matrix products this processor has instructions for.

    In the others torch converts element by element: on AVX2 alone its bfloat16 products take six times as long as
    float32's, which widening the matrix first does not (2 % of the product at 512 tokens).
    """
    flags: set[str] = set()
    with suppress(OSError), open(cpuinfo, encoding="utf-8") as lines:
        flags = set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
    return {torch.float32} | {dtype for dtype, any_of in _GEMM_FLAGS.items() if flags & any_of}


# Prompts up to this length meet packed weights as they are. For longer ones it may pay to unpack each matrix first, to
# bfloat16 where the processor multiplies that, else to float32, and to leave the product to torch: not where our own
# kernels have the processor's int8 dot products, which do four times as much as float32's.
PACKED_TOKENS = 64
_WITH_DOT_PRODUCTS = {"avx512", "avx512_bf16"}
# Prompts of up to so many tokens are read by the ops of decode steps. Measured on two cores with AVX-512, on the shapes
# of SmolLM2-135M and Llama-3.2-1B. Float32 and bfloat16: where the two ways meet, if not later. Packed: on the smaller
# one 256 tokens are no slower so; on the larger they meet at 24 for int8, 48 for int4. The longest that was measured,
# and 1.1-1.3x as fast so: weights that products would first widen to float32 (float16 on most processors), and
# bfloat16 matrices as small as SmolLM2's, with which torch's products lose more than they gain. Held to AVX2, d3rt and
# torch alike, float32 meets at about 100 tokens, the others later than here.
SHORT_PROMPT, SHORT_PROMPT_PACKED, SHORT_PROMPT_LONGEST = 128, 32, 768
SMALL_MATRIX = 2**20  # elements
MOST_TOKENS = 512  # of one call of `linear`: prefill.py's PREFILL_CHUNK_TOKENS
_GEMM_FLAGS = {
    torch.bfloat16: {"amx_bf16", "avx512_bf16", "bf16"},
    torch.float16: {"amx_fp16", "avx512_fp16", "asimdhp"},
}


class CpuLoop:
    """csrc's Dispatcher; `start` and `add_ladder` differ, in how they are given their parameters."""

    preparing_keeps_cache = True

    def __init__(self, dispatcher: Any, arena: Any, pos: Tensor):
        self._dispatcher, self._arena = dispatcher, arena
        self.pos = pos
        for name in ("add", "add_climb", "wait", "read", "cancel", "begin", "step", "commit"):
            setattr(self, name, getattr(dispatcher, name))

    def start(self, *, programs, eos_tokens, pad_token, sampling: SamplingParams, seen) -> None:
        self._dispatcher.start(
            programs=programs,
            eos_tokens=eos_tokens,
            pad_token=pad_token,
            sampling=native().SamplingParams(**asdict(sampling)),
            seen=seen,
        )

    def add_ladder(self, rungs, top, confidence) -> int:
        return self._dispatcher.add_ladder(self._arena, rungs, top, confidence)

    @property
    def exits(self) -> list[int]:
        return self._dispatcher.exits

    def prepare(self, programs, sampling, eos_tokens) -> None:
        """A tape is all there is to build."""

    def built(self, program: int) -> Built:
        return Built("tape", 0)

    @property
    def step_seconds(self) -> list[float]:
        return self._dispatcher.step_seconds


class CpuBackend:
    """C++ SIMD kernels on `threads` threads (default: every core this process may use, cores.py)."""

    name = "cpu"
    device = torch.device("cpu")
    scope = nullcontext
    attend = staticmethod(causal_attention)
    line_tables = True

    def __init__(self, threads: int | None = None):
        _C = native()
        self.threads = threads or usable_cores()
        self._pool = _C.ThreadPool(self.threads)
        self._arena = _C.Arena()
        self._gemm_dtypes = gemm_dtypes()
        self._packed_tokens = math.inf if _C.selected_isa() in _WITH_DOT_PRODUCTS else PACKED_TOKENS
        self._unpacked_dtype = torch.bfloat16 if torch.bfloat16 in self._gemm_dtypes else torch.float32
        self._dense_bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def scratch_bytes(self) -> int:
        return self._arena.scratch_bytes

    def own(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._arena.add(tensor)

    def own_weights(self, tensors: Sequence[Tensor]) -> None:
        self.own(tensors)
        self._arena.use_large_pages()

    def pack(self, weight: Tensor, format: str) -> PackedMatrix:
        return native_pack(self._pool, weight, format)

    def record(self, step: Callable[[Any], None]) -> Any:
        tape = native().Tape(self._pool, self._arena)
        step(tape)
        return tape

    def linear(self, x: Tensor, w: Tensor | PackedMatrix) -> Tensor:
        if isinstance(w, PackedMatrix):
            if len(x) <= self._packed_tokens:
                out = torch.empty(len(x), w.rows)
                native().linear(self._pool, out, x.contiguous(), w)
                return out
            dense = self._dense(w.shape, self._unpacked_dtype)
            native().unpack(self._pool, dense, w)
            return typed_linear(x, dense)
        if w.dtype in self._gemm_dtypes:
            return typed_linear(x, w)
        return typed_linear(x, self._dense(w.shape, torch.float32).copy_(w))

    def _dense(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A matrix of this shape in memory that the next call takes again."""
        size = math.prod(shape)
        if self._dense_bytes.numel() < size * dtype.itemsize:
            self._dense_bytes = torch.empty(size * dtype.itemsize, dtype=torch.uint8)
        return self._dense_bytes[: size * dtype.itemsize].view(dtype).view(*shape)

    def short_prompt(self, w: Tensor | PackedMatrix) -> int:
        if native().selected_isa() == "scalar":
            return 0
        if isinstance(w, PackedMatrix):
            return SHORT_PROMPT_PACKED
        widened = w.dtype not in self._gemm_dtypes
        small = w.dtype == torch.bfloat16 and w.numel() <= SMALL_MATRIX
        return SHORT_PROMPT_LONGEST if widened or small else SHORT_PROMPT

    def linear_bytes(self, w: Tensor | PackedMatrix) -> int:
        """A matrix that torch cannot multiply as it is gets dense for the time; or the tokens are quantised, with a
        scale and a sum for 32 of their values."""
        if isinstance(w, PackedMatrix):
            if self._packed_tokens >= MOST_TOKENS:
                return MOST_TOKENS * (w.cols + 2 * 4 * w.cols // 32)
            return w.rows * w.cols * self._unpacked_dtype.itemsize
        return 0 if w.dtype in self._gemm_dtypes else 4 * w.numel()

    def loop(self, token, pos, logits, filled) -> CpuLoop:
        dispatcher = native().Dispatcher(self._arena, token, pos, logits, filled)
        return CpuLoop(dispatcher, self._arena, pos)

    def admit(self, needs: Needs) -> None:
        """Everything that compile takes runs here, and memory is taken only as it is written."""

    def describe(self) -> dict[str, str]:
        _C = native()
        return {
            "runs": f"C++ {_C.selected_isa()} (of {', '.join(_C.available_isas())})",
            "threads": str(self.threads),
        }
