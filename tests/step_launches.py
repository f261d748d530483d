"""The launches of a whole decode step: Decoder.decode_step, driven with ops that collect instead of run, on models of
published shapes whose weights hold anything. What a graph of that step will be made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import budgets
import torch
from torch import Tensor

from d3rt.config import DecoderConfig
from d3rt.kernels.cases import EPS, ModelShape
from d3rt.kv_cache import KVCache
from d3rt.models.decoder import Decoder, DecoderWeights, LayerWeights, StepBuffers
from d3rt.plan import Plan


@dataclass
class Collector:
    """The ops of kernels/reference.py, each noting its launches for `arch`, with all that they can reach."""

    arch: int
    launches: list = field(default_factory=list)
    reachable: list[dict[str, Tensor]] = field(default_factory=list)

    def __getattr__(self, op: str):
        from ptx.device import tensors_in

        from d3rt.kernels.cuda import plans

        def collect(*arguments, **named):
            made = getattr(plans, op)(self.arch, *arguments, **named)
            self.launches += made
            self.reachable += [dict(tensors_in([*arguments, *named.values()]))] * len(made)

        return collect


def _layer(m: ModelShape, width: str, device: str) -> LayerWeights:
    norms = {name: torch.ones(m.D, device=device) for name in ("attention_norm", "mlp_norm")}
    sizes = {
        **{"wq": (m.H * m.d, m.D), "wk": (m.G * m.d, m.D), "wv": (m.G * m.d, m.D), "wo": (m.D, m.H * m.d)},
        **{"w_gate": (m.F, m.D), "w_up": (m.F, m.D), "w_down": (m.D, m.F)},
    }
    matrices = {name: budgets.matrix(width, *size, device) for name, size in sizes.items()}
    absent = ("bq", "bk", "bv", "q_norm", "k_norm", "bo", "b_gate", "b_up", "b_down")
    return LayerWeights(**norms, **matrices, **dict.fromkeys(absent))


def collect(
    arch: int, m: ModelShape, plan: Plan, width: str, length: int, *, draw=False, device: str = "meta"
) -> Collector:
    """One sequence, at the last position of a cache of `length`, from the token to the next token."""
    from d3rt.backends.cuda_slots import EOS_PLACES, Kind, SlotBuffers

    layers = plan.num_layers
    config = DecoderConfig("llama", m.D, layers, m.H, m.G, m.d, m.F, m.V, length, EPS, (0,) * layers)
    kept = budgets.FLOATS.get(width, torch.float16)
    with torch.device(device):
        weights = DecoderWeights(
            embed=budgets.matrix(width, m.V, m.D, device),
            layers=tuple(_layer(m, width, device) for _ in range(layers)),
            norm=torch.ones(m.D),
            lm_head=budgets.matrix(width, m.V, m.D, device),
        )
        rope = torch.ones(length, m.d // 2), torch.zeros(length, m.d // 2)
        buffers = StepBuffers(config, KVCache(config, 1, length, kept), *rope, 1)
        buffers.keep(plan.num_gaps)
        buffers.pos.fill_(length - 1)
    ops = Collector(arch)
    Decoder(config, weights).decode_step(ops, plan, buffers)
    kind, slots = Kind(draw, False, EOS_PLACES), SlotBuffers(1, m.V, torch.device(device))
    slots.provide(kind)
    slots.record(ops, kind, buffers.token, buffers.pos, buffers.logits)
    return ops
