"""LayerDrop's "every other" rule (arXiv 1909.11556), which needs neither a model nor texts."""

from __future__ import annotations

from d3rt.policies import StaticLayers


def layerdrop(num_layers: int, p: float, prompt: str = "full") -> StaticLayers:
    """Drops the layers at depth d = 0 mod floor(1 / p), where d counts from 1: d is layer d - 1.

    p: share of layers to drop, in (0, 0.5]. The paper does not say where d starts. Counted from 1, p = .5 keeps layers
        0, 2, 4, ... like fairseq's example for --decoder-layers-to-keep, and the lowest layer, whose loss is always the
        dearest, is never dropped.
    """
    return StaticLayers.every_other(num_layers, p, prompt)
