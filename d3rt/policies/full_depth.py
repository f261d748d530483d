"""FullDepth: every layer at every step.

The baseline, and the policy under which d3rt must equal the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from d3rt.plan import LayerSet
from d3rt.policies.base import Policy, check_step


@dataclass(frozen=True)
class FullDepth(Policy):
    """All layers, at every step."""

    name = "full"

    def layer_set(self, step: int, num_layers: int) -> LayerSet:
        """All of them."""
        check_step(step)
        return LayerSet.full(num_layers)
