"""Backend and Loop: what the runtime asks of a backend. A new backend is one file that provides these two.

A backend records decode steps on static buffers and hands out a loop that replays them. The reference backend is
the plainest example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from d3rt.kernels.packing import PackedMatrix
from d3rt.sampling import SamplingParams

MAX_BATCH_SIZE = 16  # rows that one recorded step takes (kMaxBatch in csrc/ops.h)


def typed_linear(x: Tensor, w: Tensor) -> Tensor:
    """x [T, K] float32 times w [N, K]^T in w's dtype, as Hugging Face multiplies; float32 [T, N]."""
    return F.linear(x.to(w.dtype), w).float()


def causal_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor | None:
    """bool [queries, keys]: what each query may see when the last query stands at the last key; None where SDPA's own
    causal mask says the same."""
    if queries == keys and not 0 < window < keys:
        return None
    distance = (
        torch.arange(keys - queries, keys, device=device)[:, None]
        - torch.arange(keys, device=device)[None, :]
    )
    return (distance >= 0) & (distance < window) if window else distance >= 0


def causal_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """The prefill's attention: queries [T, H, d] float32 over keys and values [G, T', d], of which the last T are the
    queries' own; each sees itself and what is before it, `window` positions at most (0: all). Float32 [T, H, d].

    The products are in the keys' dtype, by torch's scaled_dot_product_attention.
    """
    mask = causal_mask(len(q), keys.shape[1], window, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0).to(keys.dtype),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1).float()


@dataclass(frozen=True)
class Needs:
    """What a runtime is about to ask of a backend. Sizes in bytes; dtypes are the distinct ones of matrices and of the
    K,V cache. unpacked: values of the largest packed matrix that a prefill multiplies by, 0 where none is packed.
    group: query heads that share a key-value head."""

    weight_dtypes: frozenset[str | torch.dtype]  # "int8" and "int4" for packed ones
    cache_dtype: torch.dtype
    weights: int
    kv_cache: int
    buffers: int
    prefill: int
    unpacked: int = 0
    early_exit: str | None = None  # the text of a policy that decides the depth while a step runs
    group: int = 1
    head_dim: int = 1


@dataclass(frozen=True)
class Built:
    """How a recorded step is replayed, and the device memory that took beside the buffers."""

    mode: str
    device_bytes: int


class Loop(Protocol):
    """The decode loop over the buffers of a fixed number of slots B; see csrc/dispatcher.h for the native one.

    Either `start` a whole generation and `wait` for it or `read` its tokens; or drive it: `begin`, then for each
    step `step` (not for step 0, whose logits the prefill left) and `commit`.
    """

    pos: Tensor
    """int32 [B] in host memory: each slot's position, right whenever no generation runs."""

    def add(self, program: Any, reads: Sequence[int], fills: Sequence[int]) -> int:
        """Adds a recorded step; `reads` are the layers whose attention runs, `fills` those it only writes K,V of."""

    def prepare(
        self, programs: Sequence[int], sampling: SamplingParams | None, eos_tokens: Sequence[int]
    ) -> None:
        """Builds what a generation with these will replay, as far as it is not there yet, so that `start` does not have
        to; sampling None: what the driven path will. It may leave anything in the buffers and in the cache: before a
        prefill only."""

    preparing_keeps_cache: bool
    """Whether `prepare` leaves the cache as it is."""

    def add_ladder(self, rungs: Sequence[tuple[int, int]], top: int, confidence: Tensor) -> int:
        """Adds the parts of a step whose depth is decided while it runs; see csrc/ladder.h. rungs: (segment, exit), by
        their numbers; confidence: float32 [B], which each segment writes. UnsupportedOptionError where it
        cannot be done."""

    def add_climb(self, ladder: int, threshold: float) -> int:
        """Adds a step that climbs the ladder and ends at the first confidence of at least `threshold`; its number is a
        program's."""

    @property
    def exits(self) -> list[int]:
        """Of each step that was replayed since `start` or `begin`: the rung where a climb ended, as many as there are
        for the top; -1 for a step that was no climb."""

    def built(self, program: int) -> Built:
        """What has been built of it so far."""

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
        """Waits for the end; False when the time was over first. Raises what stopped the generation, and what signal
        handlers raise meanwhile."""

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
    device: torch.device
    """Where weights, cache and buffers lie."""

    line_tables: bool
    """Whether its ops take `lines`, by which rows have any line of the cache."""

    def short_prompt(self, w: Tensor | PackedMatrix) -> int:
        """Up to how many tokens of a prompt the recorded ops, a token a slot, are faster than `linear` for matrices of
        such a kind and all that goes with it; 0: never. Asked only where there are line tables."""

    def admit(self, needs: Needs) -> None:
        """Refuses what cannot run here, before any work: BackendUnavailableError or UnsupportedOptionError."""

    def scope(self) -> AbstractContextManager[Any]:
        """Whatever torch does with tensors on `device` goes inside: it is then in order with the recorded steps."""

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
        """Calls step(ops) once and returns a program whose replay() repeats it. ops: see d3rt.kernels.reference.

        replay_after_torch(): the same, for who has just used torch, whose threads may still keep the cores busy.
        """

    def linear(self, x: Tensor, w: Tensor | PackedMatrix) -> Tensor:
        """x [T, K] float32 times w [N, K]^T, at once: the prefill's products. Float32 [T, N]."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
        """The prefill's attention, see causal_attention."""

    def linear_bytes(self, w: Tensor | PackedMatrix) -> int:
        """Bytes that `linear` takes for w beside its arguments and what prefill_bytes counts."""

    def loop(self, token: Tensor, pos: Tensor, logits: Tensor, filled: Tensor) -> Loop:
        """The decode loop over these buffers: token, pos [B] int32 and logits [B, V] float32 on `device`, filled [L, B]
        int32 in host memory."""

    def describe(self) -> dict[str, str]:
        """What `d3rt info` shows of it."""
