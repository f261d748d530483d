"""Backend and Loop: what the runtime asks of a backend. A new backend is one file that provides these two.

A backend records decode steps on static buffers and hands out a loop that replays them. The reference backend is
the plainest example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from d3rt.kernels.packing import PackedMatrix
from d3rt.sampling import SamplingParams


def typed_linear(x: Tensor, w: Tensor) -> Tensor:
    """x [T, K] float32 times w [N, K]^T in w's dtype, as Hugging Face multiplies; float32 [T, N]."""
    return torch.nn.functional.linear(x.to(w.dtype), w).float()


class Loop(Protocol):
    """The decode loop over the buffers of a fixed number of slots B; see csrc/dispatcher.h for the native one.

    Either `start` a whole generation and `wait` for it or `read` its tokens; or drive it: `begin`, then for each
    step `step` (not for step 0, whose logits the prefill left) and `commit`.
    """

    def add(self, program: Any, reads: Sequence[int], fills: Sequence[int]) -> int:
        """Adds a recorded step; `reads` are the layers whose attention runs, `fills` those it only writes K,V of."""

    def start(
        self,
        *,
        programs: Sequence[int],
        eos_tokens: Sequence[int],
        pad_token: int,
        sampling: SamplingParams,
        seen: Sequence[Sequence[int]],
    ) -> None:
        """Starts a generation of len(programs) + 1 tokens a slot; programs[i - 1] is replayed at step i."""

    def wait(self, seconds: float) -> bool:
        """Waits for the end; False when the time was over first. Raises what stopped the generation."""

    def read(self, first_step: int, seconds: float) -> tuple[list[int], bool]:
        """Tokens [steps * B] from first_step on, and whether none will follow."""

    def cancel(self) -> None:
        """Stops after the current step; returns when stopped."""

    def begin(self) -> None: ...

    def step(self, program: int) -> None: ...

    def commit(self, tokens: Sequence[int], finished: Sequence[bool]) -> None: ...

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of each step of the last generation, replay and sampling."""


class Backend(Protocol):
    """Where decode steps run."""

    name: str
    threads: int

    @property
    def scratch_bytes(self) -> int:
        """Working memory of the steps recorded so far."""

    def own(self, tensors: Sequence[Tensor]) -> None:
        """Registers static memory: cache, buffers. Recorded steps may use no other, and own_weights'."""

    def own_weights(self, tensors: Sequence[Tensor]) -> None:
        """The same for the weights, which every step streams: a backend may move them to where that is fast."""

    def pack(self, weight: Tensor, format: str) -> PackedMatrix:
        """weight [rows, cols], of any float dtype, as int8 or int4: bit for bit what d3rt.kernels.packing.pack makes of
        it, and without a float copy of the whole."""

    def record(self, step: Callable[[Any], None]) -> Any:
        """Calls step(ops) once and returns a program whose replay() repeats it. ops: see d3rt.kernels.reference."""

    def linear(self, x: Tensor, w: Tensor | PackedMatrix) -> Tensor:
        """x [T, K] float32 times w [N, K]^T, at once: the prefill's products. Float32 [T, N]."""

    def linear_bytes(self, w: Tensor | PackedMatrix) -> int:
        """Bytes that `linear` takes for w beside its arguments and what prefill_bytes counts."""

    def loop(self, token: Tensor, pos: Tensor, logits: Tensor, filled: Tensor) -> Loop:
        """The decode loop over these buffers: token, pos [B] and filled [L, B] int32, logits [B, V] float32."""

    def describe(self) -> dict[str, str]:
        """What `d3rt info` shows of it."""
