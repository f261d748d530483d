"""Unified Layer Skipping: a static set of evenly spread layers for a target speed-up.

arXiv 2404.06954; code: Adaxry/Unified_Layer_Skipping. The released code, not the paper's Algorithm 1, gives
the paper's own tables: the algorithm as printed overshoots the number of layers and need not end. The paper
fine-tunes with the skipping, so its scores do not carry over to a model that was not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet
from d3rt.policies.base import Policy, check_choice, check_real, check_step

VARIANTS = ("auto", "released", "balanced")


@dataclass(frozen=True)
class UnifiedSkip(Policy):
    """M = int(N / ratio) of N layers, the first and the last among them, the same at every decode step.

    ratio: target speed-up r >= 1, any real number; 1 is full depth.
    variant: "released" takes every int(N / (M - 1))-th layer until there are M. Two traps: the last gap is
        uneven (30 layers, r = 2: ... 24, 26, 29), and for 1 < r < 2 the interval is 1, so that the first M -
        1 layers and the last one stay: one contiguous skip, the opposite of what the method is for.
        "balanced" takes layer j * (N - 1) / (M - 1), rounded half up, for j = 0..M-1: even for every r.
        "auto" is "released", but "balanced" for 1 < r < 2.
    """

    ratio: float
    variant: str = "auto"

    name = "unified"

    def __post_init__(self) -> None:
        ratio = check_real("UnifiedSkip", "ratio", self.ratio)
        if ratio < 1:
            raise PolicyError(
                f"UnifiedSkip(ratio={self.ratio}): ratio is the target speed-up, so it must be at least 1; 2 "
                "keeps half of the layers."
            )
        check_choice("UnifiedSkip", "variant", self.variant, VARIANTS)
        object.__setattr__(self, "ratio", ratio)

    def kept(self, num_layers: int) -> int:
        """M = int(N / r), the number of retained layers; 33 / 1.1 must not become 29."""
        return math.floor(num_layers / self.ratio + 1e-9)

    def validate(self, num_layers: int) -> None:
        """PolicyError when fewer than two layers would be retained (the released code divides by M - 1)."""
        super().validate(num_layers)
        kept = self.kept(num_layers)
        if kept < 2 and self.ratio != 1:
            limit = num_layers / 2
            way_out = f"choose a ratio of at most {limit:g}" if limit >= 1 else "use FullDepth()"
            raise PolicyError(
                f"UnifiedSkip(ratio={self.ratio:g}) on {num_layers} layers: it would retain int({num_layers} "
                f"/ {self.ratio:g}) = {kept}, but the first and the last layer are always retained, so it "
                f"must be at least 2; {way_out}."
            )

    def layer_set(self, step: int, num_layers: int) -> LayerSet:
        """The same set at every step."""
        check_step(step)
        if self.ratio == 1:
            return LayerSet.full(num_layers)
        self.validate(num_layers)
        balanced = self.variant == "balanced" or (self.variant == "auto" and self.ratio < 2)
        layers = (_balanced if balanced else _released)(num_layers, self.kept(num_layers))
        return LayerSet.of(layers, num_layers)


def _released(num_layers: int, kept: int) -> list[int]:
    """The rule of codes/run_clm_llms.py in Adaxry/Unified_Layer_Skipping, for kept >= 2."""
    interval = num_layers // (kept - 1)
    multiples = range(interval, num_layers - 1, interval)
    return [0, *multiples[: kept - 2], num_layers - 1]


def _balanced(num_layers: int, kept: int) -> list[int]:
    """round(j * (N - 1) / (M - 1)), half up and in integers, for kept >= 2."""
    gaps = kept - 1
    return [(2 * j * (num_layers - 1) + gaps) // (2 * gaps) for j in range(kept)]
