"""Early exit: a policy whose depth is decided while a step runs, and what there is of it before the first token.

An ordinary policy is a rule (step, num_layers) -> layers, so its schedule says everything. Here the rule is a test of
the hidden state: a step runs its layers from the bottom and ends at the first exit whose confidence reaches the step's
threshold. Still everything that must be recorded is known up front: the exits, the measure, the thresholds. So such a
policy answers `layer_set` with its ceiling, all layers, and its schedule holds one `Climb` a step: the key under which
the parts of a step are recorded, as a `Plan` is for a step whose layers are fixed. A measure is an op
(kernels/reference.py), running a climb is up to ladder.py and to the loops of the backends.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet, Plan
from d3rt.policies.base import Policy, Schedule, check_step

MEASURES = ("state", "softmax")
KV_FILLS = ("auto", "eager", "recompute")


@dataclass(frozen=True)
class Climb:
    """A decode step that runs layers from the bottom and ends after the first `exits[k]` layers whose confidence is at
    least `threshold`, or else at the top. A threshold of 0 or less is always reached, one above 1 never."""

    num_layers: int
    exits: tuple[int, ...]  # numbers of layers after which it may end, ascending, each in 1..num_layers - 1
    measure: str  # one of MEASURES
    threshold: float

    @property
    def layer_set(self) -> LayerSet:
        """The ceiling: what runs when no confidence is reached."""
        return LayerSet.full(self.num_layers)


class EarlyExit(Policy):
    """A policy that ends a step where it is confident. A subclass answers `exits` and `threshold`.

    The prompt runs all layers, and so does nothing else that is known up front: `layer_set` is the ceiling. All rows of
    a batch end a step together, where the least confident row that has not finished allows it. A step that ends early
    fills the K,V of the layers above from its last hidden state, since a later step may go deeper.
    """

    measure: str
    prompt: ClassVar[str] = "full"

    @abstractmethod
    def exits(self, num_layers: int) -> tuple[int, ...]:
        """Numbers of layers, ascending and below num_layers, after which a step may end."""

    @abstractmethod
    def threshold_at(self, step: int) -> float:
        """The confidence that ends step `step` (1, 2, ...; step 0 is the prefill)."""

    def layer_set(self, step: int, num_layers: int) -> LayerSet:
        """All layers: the most that a step runs."""
        check_step(step)
        return LayerSet.full(num_layers)

    def schedule(self, num_layers: int, num_steps: int, first: int = 0) -> ExitSchedule:
        """What is known of steps 0..num_steps-1 before they run; first: see Policy.schedule."""
        ceiling = super().schedule(num_layers, num_steps, first)
        return ExitSchedule(self, num_layers, ceiling.sets, first)


@dataclass(frozen=True)
class ExitSchedule(Schedule):
    """The ceiling of each step, where it may end, and the confidence that it takes. `sets`, `depths` and `mean_depth`
    are of the ceiling: how deep a step went is in `GenerationStats.depths` afterwards."""

    policy: EarlyExit
    first: int = 0  # steps of the rule before this schedule

    @property
    def exits(self) -> tuple[int, ...]:
        """Numbers of layers after which a decode step may end."""
        return self.policy.exits(self.num_layers)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Of each step; the prefill's, which never ends early, is not tested."""
        return tuple(self.policy.threshold_at(self.first + step) for step in range(len(self.sets)))

    @property
    def nested(self) -> bool:
        """False: a step may go deeper than the one before."""
        return len(self.sets) < 2

    def plans(self, kv_fill: str = "auto") -> tuple[Plan | Climb, ...]:
        """The prefill's plan, then a Climb a step; equal ones are one object. The K,V above an exit are always
        filled at once, so it makes no difference which of KV_FILLS it is; what a session's next turn uses of it, does.
        """
        if kv_fill not in KV_FILLS:
            raise PolicyError(
                f"kv_fill={kv_fill!r}: {type(self.policy).__name__} decides the depth while a step runs and fills what "
                f"it left out at once; choose {' or '.join(map(repr, KV_FILLS))}."
            )
        exits, measure = self.exits, self.policy.measure
        same: dict[float, Climb] = {}
        climbs = [
            same.setdefault(threshold, Climb(self.num_layers, exits, measure, threshold))
            for threshold in self.thresholds[1:]
        ]
        return Plan.of(self.prompt_set), *climbs

    def every_plan(self, kv_fill: str = "auto") -> tuple[Plan | Climb, ...]:
        """The different ones of the decode steps; a shorter schedule needs no other."""
        return tuple(dict.fromkeys(self.plans(kv_fill)[1:]))

    @property
    def fill_words(self) -> str:
        """When K,V of skipped layers is written, for people."""
        return "filled at each step that ends early"

    def _rows(self) -> Iterator[str]:
        yield f"step 0 (prefill): {self.num_layers} layers {self.prompt_set}"
        step = 1
        for _, run in groupby(self.thresholds[1:], key=lambda threshold: round(threshold, 2)):
            first, *rest = run
            last = step + len(rest)
            at = f"step {step}" if step == last else f"steps {step}-{last}"
            lowest = rest[-1] if rest else first
            falling = f", falling to {lowest:.4g}" if lowest != first else ""
            yield f"{at}: ends at the first exit whose confidence is at least {first:.4g}{falling}"
            step = last + 1

    def __str__(self) -> str:
        exits = ", ".join(map(str, self.exits))
        return (
            f"{self.policy} on {self.num_layers} layers, {len(self.sets)} steps: the depth is decided while a step "
            f"runs, at most {self.num_layers}, not known before\nmeasure {self.policy.measure}, exits after "
            f"{exits} layers\n{self.table()}"
        )
