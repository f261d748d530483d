"""SkipDecode: a depth that falls linearly over a preset generation length, skipping the lower-middle layers.

arXiv 2307.02628. What the paper leaves open (how the budget is rounded, whether it counts the warm-up layers)
is decided here and said below. The paper fine-tunes its models to this schedule; a model that was not may
well fall apart under it.
"""

from __future__ import annotations

from dataclasses import dataclass

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet
from d3rt.policies.base import Policy, check_integer, check_step


@dataclass(frozen=True)
class SkipDecode(Policy):
    """budget(t) layers run at step t: the first `warmup` ones and the top budget(t) - warmup ones. Nested.

    max_layers, min_layers: the budget at step 0 and from step length - 1 on; it counts the warm-up layers.
    length: steps (T) over which it falls; the paper takes the median output length.
    warmup: layers at the bottom that always run; the paper found 1 best.

    The prompt runs all layers, so max_layers is what decode steps start from.
    """

    max_layers: int
    min_layers: int
    length: int
    warmup: int = 1

    name = "skipdecode"
    short_names = {"max": "max_layers", "min": "min_layers"}

    def __post_init__(self) -> None:
        for name in ("max_layers", "min_layers", "length", "warmup"):
            object.__setattr__(self, name, check_integer("SkipDecode", name, getattr(self, name)))
        if self.warmup < 0:
            raise PolicyError(
                f"SkipDecode(warmup={self.warmup}): warmup counts layers at the bottom, so it must be >= 0."
            )
        if self.min_layers <= self.warmup:
            raise PolicyError(
                f"SkipDecode(min_layers={self.min_layers}, warmup={self.warmup}): the budget counts the "
                "warm-up layers and must leave a top layer, so min_layers must be at least "
                f"{self.warmup + 1}."
            )
        if self.max_layers < self.min_layers:
            raise PolicyError(
                f"SkipDecode(max_layers={self.max_layers}, min_layers={self.min_layers}): the budget falls "
                "from max_layers to min_layers, so max_layers must not be the smaller one."
            )
        if self.length < 2:
            raise PolicyError(
                f"SkipDecode(length={self.length}): the budget falls over length - 1 steps, so length must "
                "be >= 2."
            )

    def validate(self, num_layers: int) -> None:
        """PolicyError when max_layers exceeds the model."""
        super().validate(num_layers)
        if self.max_layers > num_layers:
            raise PolicyError(
                f"SkipDecode(max_layers={self.max_layers}) on {num_layers} layers: the budget cannot exceed "
                f"the model; max_layers must be at most {num_layers}."
            )

    def budget(self, step: int) -> int:
        """Layers that run at `step`: linear from max_layers to min_layers over T - 1 steps, rounded half up.

        budget(t) = max - (max - min) * t / (T - 1)  # arXiv 2307.02628. The paper does not say how it rounds
        or whether it divides by T or T - 1: half up on T - 1, which reaches min_layers at the last step, is
        this project's convention. In integers, so exact.
        """
        check_step(step)
        span = self.length - 1
        fallen = (self.max_layers - self.min_layers) * min(step, span)
        return (2 * (self.max_layers * span - fallen) + span) // (2 * span)

    def layer_set(self, step: int, num_layers: int) -> LayerSet:
        """{0..w-1} and {L-(e-w)..L-1} for a budget of e layers."""
        return LayerSet.except_window(self.warmup, num_layers - (self.budget(step) - self.warmup), num_layers)
