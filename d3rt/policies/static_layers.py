"""StaticLayers: one fixed set of layers or sublayers, the same at every step.

Any set found elsewhere runs through this: pruned models (ShortGPT, LayerDrop), drafts of self-speculative
decoding, a searched set. d3rt/search finds such sets; this file knows nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet
from d3rt.policies.base import (
    PROMPTS,
    Policy,
    check_choice,
    check_integer,
    check_layers,
    check_real,
    check_step,
)

# arXiv 2403.03853: the layers with the lowest Block Influence, as (pruned, num_layers).
_SHORTGPT = {"llama-2-7b": (range(21, 30), 32), "llama-2-13b": (range(26, 36), 40)}


@dataclass(frozen=True)
class StaticLayers(Policy):
    """The given layers, at every step: either whole layers, or attention and MLP sublayers apart.

    layers: the whole layers that run.
    attention, mlp: the sublayers that run; where one of the two is left out, all of its kind run.
    prompt: "full" runs the prompt through all layers, "skipped" through this set only, as a model does from
        which the other layers were deleted.
    """

    layers: tuple[int, ...] | None = None
    attention: tuple[int, ...] | None = None
    mlp: tuple[int, ...] | None = None
    prompt: str = "full"

    name = "static"
    makers = ("without", "every_other", "shortgpt")

    def __post_init__(self) -> None:
        check_choice("StaticLayers", "prompt", self.prompt, PROMPTS)
        for name in ("layers", "attention", "mlp"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_layers("StaticLayers", name, getattr(self, name)))
        sublayers = self.attention is not None or self.mlp is not None
        if sublayers == (self.layers is not None):
            raise PolicyError(
                f"StaticLayers({'layers=..., attention=... or mlp=...' if sublayers else ''}): give either "
                "layers (whole layers) or attention and mlp (sublayers apart); FullDepth() runs all."
            )
        if self.layers == () or (self.attention == () and self.mlp == ()):
            raise PolicyError("StaticLayers: the set is empty; at least one sublayer must run.")

    @classmethod
    def without(cls, dropped: Iterable[int], num_layers: int, prompt: str = "full") -> StaticLayers:
        """Every layer of a model of `num_layers` layers but those in `dropped`."""
        absent = check_layers("StaticLayers.without", "dropped", dropped)
        if absent and absent[-1] >= num_layers:
            raise PolicyError(
                f"StaticLayers.without(dropped=...): layer {absent[-1]} of a model of {num_layers} layers; "
                f"an index must be in 0..{num_layers - 1}."
            )
        return cls(layers=tuple(n for n in range(num_layers) if n not in absent), prompt=prompt)

    @classmethod
    def every_other(cls, num_layers: int, p: float, prompt: str = "full") -> StaticLayers:
        """LayerDrop's "every other" rule: drop the layers at depth d = 0 mod floor(1 / p).

        p: share of layers to drop, in (0, 0.5]. arXiv 1909.11556 does not say where d starts. Here d counts
            from 1, so that p = .5 keeps layers 0, 2, 4, ..., like the example for fairseq's option
            --decoder-layers-to-keep.
        prompt: a LayerDrop model runs its prompt through the pruned layers too, which is "skipped"; "full" is
            what arXiv 2404.06954 calls deep encoding, and finds better.
        """
        share = check_real("StaticLayers.every_other", "p", p)
        if not 0 < share <= 0.5:
            raise PolicyError(
                f"StaticLayers.every_other(p={p}): p is the share of layers to drop, one in floor(1 / p), so "
                "it must be in (0, 0.5]; to drop more, name the layers."
            )
        count = check_integer("StaticLayers.every_other", "num_layers", num_layers)
        period = math.floor(1 / share + 1e-9)
        return cls.without(range(period - 1, count, period), count, prompt)

    @classmethod
    def shortgpt(cls, model: str, prompt: str = "full") -> StaticLayers:
        """The published ShortGPT sets: "llama-2-7b" (21..29 of 32 pruned), "llama-2-13b" (26..35 of 40).

        arXiv 2403.03853. ShortGPT deletes the layers, which prompt="skipped" equals.
        """
        check_choice("StaticLayers.shortgpt", "model", model, _SHORTGPT)
        return cls.without(*_SHORTGPT[model], prompt=prompt)

    def validate(self, num_layers: int) -> None:
        """PolicyError when the set names a layer that the model does not have."""
        super().validate(num_layers)
        for name in ("layers", "attention", "mlp"):
            layers = getattr(self, name)
            if layers and layers[-1] >= num_layers:
                raise PolicyError(
                    f"StaticLayers({name}=...) on {num_layers} layers: there is no layer {layers[-1]}; an "
                    f"index must be in 0..{num_layers - 1}."
                )

    def layer_set(self, step: int, num_layers: int) -> LayerSet:
        """The same set at every step."""
        check_step(step)
        if self.layers is not None:
            return LayerSet.of(self.layers, num_layers)
        every = range(num_layers)
        return LayerSet.of_sublayers(
            every if self.attention is None else self.attention,
            every if self.mlp is None else self.mlp,
            num_layers,
        )
