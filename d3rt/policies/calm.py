"""CALM, "Confident Adaptive Language Modeling": a step ends at the first layer that is confident enough.

arXiv 2207.07061 (google-research/t5x, contrib/calm). Of its measures the two that need no training are here. The paper
fine-tunes its T5 so that every layer can feed the head; a model that was not may need thresholds close to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from d3rt.errors import PolicyError
from d3rt.policies.base import check_choice, check_integer, check_real, check_step
from d3rt.policies.early_exit import MEASURES, EarlyExit


@dataclass(frozen=True)
class CALM(EarlyExit):
    """Exits after min_exit, min_exit + exit_interval, ... layers, below L; the first whose confidence reaches the
    threshold ends the step.

    threshold: lambda. Above 1 no step ends early, at 0 or below every step ends at the first exit.
    measure: "state", the cosine between the hidden states before and after the last layer that ran: it reads no
        weights. "softmax", the largest probability less the second largest: a whole lm_head for each exit that is
        tested, 2.4 layers' worth of bytes on Llama-3-8B and 8 on SmolLM2-135M, so that testing every layer costs more
        than any exit saves. Where it exits, those logits are the answer. Penalties and temperature are not in it.
    min_exit: the least number of layers.
    exit_interval: layers from one exit to the next.
    decay: tau of the threshold's decay with the position, 0 (or None) for none:
        thr(t) = .9 lambda + .1 lambda exp(-tau t / N) at step t  # arXiv 2207.07061; it takes 4
    horizon: N of the same, the number of tokens at which exp(-tau) is left; needed where decay is above 0.
    """

    threshold: float
    measure: str = "state"
    min_exit: int = 1
    exit_interval: int = 1
    decay: float = 0.0
    horizon: int = 0

    name = "calm"

    def __post_init__(self) -> None:
        check_real("CALM", "threshold", self.threshold)
        check_choice("CALM", "measure", self.measure, MEASURES)
        for name in ("min_exit", "exit_interval", "horizon"):
            object.__setattr__(self, name, check_integer("CALM", name, getattr(self, name)))
        if self.min_exit < 1:
            raise PolicyError(
                f"CALM(min_exit={self.min_exit}): min_exit counts the layers that always run, so it must be >= 1."
            )
        if self.exit_interval < 1:
            raise PolicyError(
                f"CALM(exit_interval={self.exit_interval}): exit_interval counts layers from one exit to the next, so "
                "it must be >= 1."
            )
        if self.decay is None:
            object.__setattr__(self, "decay", 0.0)
        if check_real("CALM", "decay", self.decay) < 0:
            raise PolicyError(
                f"CALM(decay={self.decay}): the threshold falls with the position, so decay must be >= 0; 0 is off."
            )
        if self.horizon < 0 or (self.decay > 0 and self.horizon == 0):
            raise PolicyError(
                f"CALM(decay={self.decay}, horizon={self.horizon}): horizon is the number of tokens that the decay is "
                "spread over, so it must be at least 1 where decay is above 0; give the longest answer, such as 256."
            )

    def validate(self, num_layers: int) -> None:
        """PolicyError when there is no exit below the top."""
        super().validate(num_layers)
        if self.min_exit >= num_layers:
            raise PolicyError(
                f"CALM(min_exit={self.min_exit}) on {num_layers} layers: no exit is left below the top; min_exit must "
                f"be below {num_layers}, or use FullDepth()."
            )

    def exits(self, num_layers: int) -> tuple[int, ...]:
        """min_exit, min_exit + exit_interval, ... below num_layers."""
        return tuple(range(self.min_exit, num_layers, self.exit_interval))

    def threshold_at(self, step: int) -> float:
        """thr(step), in float64."""
        check_step(step)
        if not self.decay:
            return float(self.threshold)
        return self.threshold * (0.9 + 0.1 * math.exp(-self.decay * step / self.horizon))
