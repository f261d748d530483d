"""Rows: the buffers, the dispatcher and the recorded steps of a runtime for one number of rows.

A step is recorded when a plan is first asked for, and has a number by which the dispatcher knows it. Which plans there
are is up to the policy; what a step does is models/decoder.py; what recording means is up to the backend.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from d3rt.backends.base import Backend
from d3rt.kv_cache import KVCache
from d3rt.models.decoder import Decoder, StepBuffers
from d3rt.plan import Plan


@dataclass(frozen=True)
class ProgramInfo:
    """One recorded step, as `Runtime.programs()` lists it."""

    plan: Plan
    rows: int
    depth: float
    weight_bytes: int  # read by one replay
    replays: int
    mode: (
        str  # how: "tape" on cpu, "python" on reference; "graph", "captured", "eager" or "not built" on cuda
    )
    device_bytes: int  # taken by its graphs

    def __str__(self) -> str:
        taken = f" of {self.device_bytes / 1e6:.1f} MB" if self.device_bytes else ""
        return (
            f"rows {self.rows}: {self.plan} ({self.depth} layers, {self.weight_bytes / 1e6:.1f} MB, replayed "
            f"{self.replays}x, {self.mode}{taken})"
        )


class Rows:
    """Buffers, dispatcher and recorded steps for one number of rows.

    Keeps no reference to the runtime, which keeps this: a dropped runtime's cache is freed at once, not by the garbage
    collector some time.
    """

    def __init__(
        self, backend: Backend, decoder: Decoder, cache: KVCache, rope: tuple[Tensor, Tensor], rows: int
    ):
        self.buffers = StepBuffers(decoder.config, cache, *rope, rows)
        backend.own(self.buffers.tensors())
        buf = self.buffers
        self.loop = backend.loop(buf.token, buf.pos, buf.logits, buf.filled)
        self.first_logits = backend.record(lambda ops: decoder.project_logits(ops, buf))
        self._backend, self._decoder = backend, decoder
        self.numbers: dict[Plan, int] = {}
        self.replays: Counter[Plan] = Counter()

    def number(self, plan: Plan) -> int:
        """The dispatcher's number of this plan's program, recorded on first use."""
        if plan not in self.numbers:
            decoder, buf = self._decoder, self.buffers
            if new := buf.keep(plan.num_gaps):
                self._backend.own(new)
            program = self._backend.record(lambda ops: decoder.decode_step(ops, plan, buf))
            reads = plan.layer_set.attention_layers
            self.numbers[plan] = self.loop.add(program, reads, plan.fill_layers)
        return self.numbers[plan]
