"""LayerSchedule: the retained layers written out, step by step.

For experiments and tests: any sequence of sets, nested or not. The rules that compute such a sequence are the
other files here.
"""

from __future__ import annotations

from dataclasses import dataclass

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet
from d3rt.policies.base import PROMPTS, Policy, check_choice, check_layers, check_step


@dataclass(frozen=True)
class LayerSchedule(Policy):
    """sets[i] are the layers of step i; the last entry stands for every step after it.

    sets: whole layers, one tuple for each step. sets[0] belongs to the prefill, which runs it only if
        prompt is "skipped".
    cycle: after the last entry, start over at sets[0].
    prompt: "full" runs the prompt through all layers, "skipped" through sets[0] only.
    """

    sets: tuple[tuple[int, ...], ...]
    cycle: bool = False
    prompt: str = "full"

    name = "schedule"

    def __post_init__(self) -> None:
        check_choice("LayerSchedule", "prompt", self.prompt, PROMPTS)
        if not isinstance(self.cycle, bool):
            raise PolicyError(f"LayerSchedule(cycle={self.cycle!r}): cycle must be True or False.")
        if not isinstance(self.sets, list | tuple):
            raise PolicyError(
                f"LayerSchedule(sets={self.sets!r}): sets must be a sequence of layer sequences."
            )
        sets = tuple(check_layers("LayerSchedule", f"sets[{i}]", each) for i, each in enumerate(self.sets))
        if not sets:
            raise PolicyError("LayerSchedule(sets=()): there must be at least one set of layers.")
        if () in sets:
            raise PolicyError(f"LayerSchedule: sets[{sets.index(())}] is empty; at least one layer must run.")
        object.__setattr__(self, "sets", sets)

    def validate(self, num_layers: int) -> None:
        """PolicyError when a set names a layer that the model does not have."""
        super().validate(num_layers)
        for index, layers in enumerate(self.sets):
            if layers[-1] >= num_layers:
                raise PolicyError(
                    f"LayerSchedule(sets=...) on {num_layers} layers: sets[{index}] has layer {layers[-1]}; "
                    f"an index must be in 0..{num_layers - 1}."
                )

    def layer_set(self, step: int, num_layers: int) -> LayerSet:
        """The entry of that step."""
        check_step(step)
        index = step % len(self.sets) if self.cycle else min(step, len(self.sets) - 1)
        return LayerSet.of(self.sets[index], num_layers)
