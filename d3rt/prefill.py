"""Prefill: what reads prompts into a K,V cache, in the way that is fastest for so many tokens.

Long prompts are matrix products, torch's and the backend's (Decoder.run_chunk), which take some thirty calls a layer
whatever they do. Short ones go through the fused ops of a decode step instead, a token a slot, recorded once for each
number of tokens: every slot of a chunk has the same line of the cache, each a position of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d3rt.backends.base import MAX_BATCH_SIZE, Backend
from d3rt.kv_cache import KVCache
from d3rt.models.decoder import Decoder, Piece, StepBuffers
from d3rt.plan import LayerSet, Plan

PREFILL_CHUNK_TOKENS = 512  # the most that matrix products read at once, which bounds the memory taken


class Prefill:
    """Reads prompts into the lines of one cache."""

    def __init__(self, backend: Backend, decoder: Decoder, rope: tuple[Tensor, Tensor], cache: KVCache):
        self._backend, self._decoder, self._rope, self._cache = backend, decoder, rope, cache
        self._chunk_tokens = PREFILL_CHUNK_TOKENS
        self.short = short_prompt(backend, decoder)
        self._slots: StepBuffers | None = None
        self._recorded: dict[tuple[int, LayerSet], Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return self._slots.nbytes if self._slots else 0

    def read(
        self,
        prompts: Sequence[Tensor],
        layers: LayerSet,
        buf: StepBuffers,
        starts: Sequence[int] | None = None,
        lines: Sequence[int] | None = None,
    ) -> None:
        """See Decoder.prefill. Called inside the backend's scope."""
        tokens = sum(map(len, prompts)) - sum(starts or ())
        chunk, run = (MAX_BATCH_SIZE, self._run_slots) if tokens <= self.short else (self._chunk_tokens, None)
        self._decoder.prefill(prompts, layers, self._cache, buf, chunk, starts, lines, run)

    def _run_slots(self, prompts, pieces: Sequence[Piece], layers, cache, lines, buf) -> Tensor:
        """A RunChunk (models/decoder.py) of at most MAX_BATCH_SIZE tokens."""
        where = [(lines[row], pos) for row, start, stop in pieces for pos in range(start, stop)]
        slots = self._part(len(where))
        slots.token.copy_(torch.cat([prompts[row][start:stop] for row, start, stop in pieces]))
        place = torch.tensor(where, dtype=torch.int32)
        slots.lines.copy_(place[:, 0])
        slots.pos.copy_(place[:, 1])
        self._program(slots, layers).replay_after_torch()
        return slots.x

    def record(self, layers: LayerSet) -> None:
        """Whatever a short prompt may need; no later one of the same layers records."""
        for count in range(1, min(self.short, MAX_BATCH_SIZE) + 1):
            self._program(self._part(count), layers)

    def _part(self, count: int) -> StepBuffers:
        if self._slots is None:
            config = self._decoder.config
            self._slots = StepBuffers(
                config, self._cache, *self._rope, MAX_BATCH_SIZE, line_table=True, with_logits=False
            )
            self._backend.own(self._slots.tensors())
        return self._slots.part(slice(0, count))

    def _program(self, slots: StepBuffers, layers: LayerSet) -> Any:
        """What reads a chunk of so many tokens, recorded on first use."""
        key = slots.rows, layers
        if key not in self._recorded:
            decoder, plan = self._decoder, Plan.of(layers)

            def chunk(ops) -> None:
                decoder.embed(ops, slots)
                decoder.run_plan(ops, plan, slots)

            self._recorded[key] = self._backend.record(chunk)
        return self._recorded[key]


def short_prompt(backend: Backend, decoder: Decoder) -> int:
    """Up to how many tokens prompts are short on this backend, with these weights; 0: none is."""
    if not backend.line_tables:
        return 0
    return min(backend.short_prompt(w) for layer in decoder.weights.layers for w in layer.matrices())
