"""Ladder: the recorded parts of a decode step whose depth is decided while it runs, for one number of rows.

    segment 0    embed, layers 0 .. e0-1, a test of what they made      exit 0    fill K,V of layers e0 .. L-1, logits
    segment 1    layers e0 .. e1-1, a test                              exit 1    fill K,V of layers e1 .. L-1, logits
    top          the layers above the last exit, logits

The loop of the backend climbs it: segment by segment, until a test is confident; then that rung's exit ends the step.
Every layer has K,V of every position afterwards, whatever the depth, so that no step can meet a hole. Which exits there
are, the measure and the thresholds are the policy's (policies/early_exit.py); the decision is csrc/ladder.h's, and
reference.confident its definition.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from d3rt.backends.base import Backend, Loop
from d3rt.models.decoder import Decoder, StepBuffers, nbytes
from d3rt.plan import LayerSet, Plan
from d3rt.policies.early_exit import Climb


@dataclass(frozen=True)
class Outcome:
    """What a climb did, and by which ladder. `layer_set` is as a Plan's."""

    plan: Plan  # the layers that ran and those that were filled
    heads: int  # how often the lm_head was read
    exits: tuple[int, ...]
    measure: str

    @property
    def layer_set(self) -> LayerSet:
        return self.plan.layer_set


class Ladder:
    """The parts of all climbs with these exits and this measure, recorded when it is made. Thresholds are not recorded:
    each has a number of its own by which the loop climbs to it."""

    def __init__(
        self,
        backend: Backend,
        decoder: Decoder,
        buf: StepBuffers,
        loop: Loop,
        exits: tuple[int, ...],
        measure: str,
    ):
        self._decoder, self._buf, self._loop = decoder, buf, loop
        self._exits, self._measure = exits, measure
        self._layers = layers = decoder.config.num_hidden_layers
        self._before = torch.zeros_like(buf.x)  # the hidden state before the last layer of a segment
        self._confidence = torch.zeros(len(buf.x), dtype=torch.float32, device=buf.x.device)
        backend.own([self._before, self._confidence])
        rungs = []
        for below, depth in zip((0, *exits), exits, strict=False):
            segment = backend.record(lambda ops, a=below, b=depth: self._segment(ops, a, b))
            leave = backend.record(lambda ops, b=depth: self._leave(ops, b))
            rungs.append(
                (
                    loop.add(segment, tuple(range(below, depth)), ()),
                    loop.add(leave, (), tuple(range(depth, layers))),
                )
            )
        top = backend.record(self._top)
        self.top = loop.add(top, tuple(range(exits[-1], layers)), ())  # a program's number
        self._ladder = loop.add_ladder(rungs, self.top, self._confidence)
        self._climbs: dict[float, int] = {}
        self.outcomes = tuple(map(self._outcome, range(len(exits) + 1)))

    @property
    def nbytes(self) -> int:
        """Bytes of its own buffers."""
        return nbytes([self._before, self._confidence])

    def number(self, threshold: float) -> int:
        """The loop's number of the climb that ends at this confidence."""
        if threshold not in self._climbs:
            self._climbs[threshold] = self._loop.add_climb(self._ladder, threshold)
        return self._climbs[threshold]

    def _outcome(self, rung: int) -> Outcome:
        """Ended at that rung; len(exits) is the top."""
        depth = self._exits[rung] if rung < len(self._exits) else self._layers
        run = LayerSet.of(range(depth), self._layers)
        heads = rung + 1 if self._measure == "softmax" else 1
        return Outcome(Plan.of(run, range(depth, self._layers)), heads, self._exits, self._measure)

    def _run(self, ops, layers: Iterable[int]) -> None:
        """Those layers, from buf.x to buf.x."""
        layers = tuple(layers)
        if layers:
            self._decoder.run_plan(ops, Plan.of(LayerSet.of(layers, self._layers)), self._buf)

    def _segment(self, ops, below: int, depth: int) -> None:
        """Layers below .. depth - 1, and the confidence of what they made."""
        buf = self._buf
        if below == 0:
            self._decoder.embed(ops, buf)
        if self._measure == "softmax":
            self._run(ops, range(below, depth))
            self._decoder.project_logits(ops, buf)
            ops.top2_margin(self._confidence, buf.logits)
            return
        self._run(ops, range(below, depth - 1))
        ops.copy_hidden(self._before, buf.x)
        self._run(ops, (depth - 1,))
        ops.hidden_cosine(self._confidence, self._before, buf.x)

    def _leave(self, ops, depth: int) -> None:
        """The step ends after `depth` layers: K,V of those above, from the state as it is. The softmax measure has made
        the logits already."""
        buf = self._buf
        above = [
            self._decoder.fill_layer(layer, buf.k[layer], buf.v[layer])
            for layer in range(depth, self._layers)
        ]
        ops.kv_fill(above, buf.x, buf.cos, buf.sin, buf.pos, self._decoder.config.rms_norm_eps)
        if self._measure != "softmax":
            self._decoder.project_logits(ops, buf)

    def _top(self, ops) -> None:
        self._run(ops, range(self._exits[-1], self._layers))
        self._decoder.project_logits(ops, self._buf)


class Ladders:
    """The ladders of one number of rows, each recorded when a climb first asks for it."""

    def __init__(self, backend: Backend, decoder: Decoder, buf: StepBuffers, loop: Loop):
        self._made = backend, decoder, buf, loop
        self._ladders: dict[tuple[tuple[int, ...], str], Ladder] = {}

    def of(self, climb: Climb) -> Ladder:
        key = climb.exits, climb.measure
        if key not in self._ladders:
            self._ladders[key] = Ladder(*self._made, *key)
        return self._ladders[key]

    def __iter__(self):
        return iter(self._ladders.values())

    @property
    def nbytes(self) -> int:
        return sum(ladder.nbytes for ladder in self)
