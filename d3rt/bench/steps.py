"""Single recorded steps, without all that is around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from d3rt.kernels import kv_line
from d3rt.models.decoder import StepBuffers
from d3rt.plan import Plan
from d3rt.runtime import Runtime


def step_replay(runtime: Runtime, plan: Plan, position: int, rows: int = 1) -> Callable[[], None]:
    """One recorded decode step of `plan` for `rows` rows at `position`, to be called over and over: without the
    dispatcher and all else that is not the step. The runtime's cache is overwritten, and all its replays for as many
    rows are at the position given last."""
    cache = runtime.engine.cache
    for tensor in (cache.k, cache.v):
        tensor[:, :, :, : position + 1] = kv_line.kept_as(
            torch.full((runtime.config.head_dim,), 0.1), tensor.dtype
        )
    buffers: StepBuffers = runtime.engine.for_rows(rows).buffers
    program = runtime.backend.record(lambda ops: runtime.engine.decoder.decode_step(ops, plan, buffers))
    buffers.pos.fill_(position)
    return program.replay


def step_bytes(runtime: Runtime, plan: Plan, position: int) -> int:
    """Weight and K,V bytes that the step of `step_replay` reads."""
    (kv_bytes,) = runtime.engine.kv_bytes([plan], lengths=[position], ends=[position])
    return runtime.engine.decoder.step_bytes(plan) + kv_bytes


def teacher_forced(runtime: Runtime, tokens: Tensor, progress: Callable[[], None] = lambda: None) -> Tensor:
    """Negative log-likelihoods in nats, float64 [B, T - 1]: of each token of tokens [B, T] after those before it.

    By the recorded decode steps that `generate` replays, the policy's layers at each, with the given token in the place
    of the chosen one: quantised activations exist only there. A row's first token goes through the prefill.
    progress: called after each step.
    """
    losses = []
    for logits, target in zip(
        runtime.forced_logits(list(tokens[:, :1]), tokens[:, 1:]), tokens[:, 1:].T, strict=True
    ):
        losses.append(F.cross_entropy(logits, target, reduction="none").double())
        progress()
    return torch.stack(losses, dim=1)
