"""Rows: the buffers, the dispatcher and the recorded steps of a runtime for one number of rows.

A step is recorded when a plan is first asked for, and has a number by which the dispatcher knows it; one whose depth is
decided while it runs is a Climb, recorded in parts (ladder.py). Which plans there are is up to the policy; what a step
does is models/decoder.py; what recording means is up to the backend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from d3rt.backends.base import Backend, Built
from d3rt.kv_cache import KVCache
from d3rt.ladder import Ladders, Outcome
from d3rt.models.decoder import Decoder, StepBuffers, nbytes
from d3rt.plan import Plan
from d3rt.policies.early_exit import Climb


@dataclass(frozen=True)
class ProgramInfo:
    """One recorded step, as `Runtime.programs()` lists it; with a policy that decides while it runs, one way through
    the recorded parts of a step."""

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
        self.ladders = Ladders(backend, decoder, buf, self.loop)
        self.replays: Counter[Plan | Outcome] = Counter()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers that are its own."""
        return self.buffers.nbytes + self.ladders.nbytes

    def recorded(self) -> Iterator[tuple[Plan | Outcome, Built]]:
        """Every step that can be replayed, and how."""
        for plan, number in self.numbers.items():
            yield plan, self.loop.built(number)
        for ladder in self.ladders:
            for outcome in ladder.outcomes:
                yield outcome, self.loop.built(ladder.top)

    def weight_bytes(self, step: Plan | Outcome) -> int:
        """Weight bytes that one such step reads: layers, fills, and the lm_head as often as it was read."""
        if isinstance(step, Plan):
            return self._decoder.step_bytes(step)
        weights = self._decoder.weights
        tested = (step.heads - 1) * nbytes([weights.lm_head, weights.norm])
        return self._decoder.step_bytes(step.plan) + tested

    def ran(self, steps: Sequence[Plan | Climb]) -> list[Plan | Outcome]:
        """What the generation that ended last did at each of these steps, of which the first is the prefill."""
        exits = self.loop.exits if any(isinstance(step, Climb) for step in steps) else ()
        return [
            self.ladders.of(step).outcomes[exits[i - 1]] if isinstance(step, Climb) else step
            for i, step in enumerate(steps)
        ]

    def numbers_of(self, plans: Sequence[Plan | Climb]) -> list[int]:
        """`number` of each; a plan that stands for many steps is looked up once."""
        distinct = {id(plan): plan for plan in plans}
        found = {key: self.number(plan) for key, plan in distinct.items()}
        return [found[id(plan)] for plan in plans]

    def number(self, plan: Plan | Climb) -> int:
        """The dispatcher's number of this plan's program, recorded on first use."""
        if isinstance(plan, Climb):
            return self.ladders.of(plan).number(plan.threshold)
        if plan not in self.numbers:
            decoder, buf = self._decoder, self.buffers
            if new := buf.keep(plan.num_gaps):
                self._backend.own(new)
            program = self._backend.record(lambda ops: decoder.decode_step(ops, plan, buf))
            reads = plan.layer_set.attention_layers
            self.numbers[plan] = self.loop.add(program, reads, plan.fill_layers)
        return self.numbers[plan]
