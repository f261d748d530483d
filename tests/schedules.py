"""Policies to try everything with, and helpers to run d3rt and the oracle on the same steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import oracle
import tiny_models
import torch
from transformers import LogitsProcessor

import d3rt
from d3rt.plan import LayerSet
from d3rt.policies.base import Policy, check_step


@dataclass(frozen=True)
class AnySets(Policy):
    """One LayerSet for each step, sublayers apart and nested or not; the last one stands for all after it."""

    sets: tuple[LayerSet, ...]
    prompt: str = "full"

    def layer_set(self, step: int, num_layers: int) -> LayerSet:
        check_step(step)
        return self.sets[min(step, len(self.sets) - 1)]


def random_sets(seed: int, num_layers: int, steps: int) -> AnySets:
    """A new random set of sublayers at every step; some empty of attention, some of MLPs, some full."""
    draw = random.Random(seed)
    sets = []
    while len(sets) < steps:
        share = draw.choice((0.1, 0.5, 0.9))
        masks = [sum((draw.random() < share) << layer for layer in range(num_layers)) for _ in range(2)]
        if any(masks):
            sets.append(LayerSet(num_layers, *masks))
    return AnySets(tuple(sets))


# For 6 layers; each skips something within 20 steps, except "full".
NESTED: dict[str, Policy] = {
    "full": d3rt.FullDepth(),
    "d3-window-tail-0": d3rt.D3(alpha=0.9, start=0.4, tail=0),
    "d3-window-tail-1": d3rt.D3(alpha=0.93, start=0.34, tail=1),
    "d3-slide": d3rt.D3(alpha=0.9, start=0.5, tail=1, variant="slide"),
    "skipdecode": d3rt.SkipDecode(max_layers=5, min_layers=2, length=12),
    "unified-released": d3rt.UnifiedSkip(2, variant="released"),
    "unified-balanced": d3rt.UnifiedSkip(1.5, variant="balanced"),
    "static-layers": d3rt.StaticLayers(layers=(0, 2, 5)),
    "static-without-first-and-last": d3rt.StaticLayers(layers=(1, 2, 3, 4)),
    "static-sublayers": d3rt.StaticLayers(attention=(0, 1, 3, 5), mlp=(0, 2, 3, 4)),
    "static-no-attention": d3rt.StaticLayers(attention=(), mlp=(1, 4)),
    "static-prompt-skipped": d3rt.StaticLayers(layers=(0, 2, 3, 5), prompt="skipped"),
    "static-sublayers-prompt-skipped": d3rt.StaticLayers(attention=(1, 4), mlp=(0, 4, 5), prompt="skipped"),
    "schedule-nested": d3rt.LayerSchedule(sets=((0, 1, 2, 3, 4, 5), (0, 1, 3, 5), (0, 1, 5), (0, 5))),
}
NOT_NESTED: dict[str, Policy] = {
    "schedule-cycle": d3rt.LayerSchedule(
        sets=((0, 1, 2, 3, 4, 5), (0, 5), (1, 2, 5), (0, 3, 4), (2,)), cycle=True
    ),
    "schedule-up-again": d3rt.LayerSchedule(sets=((0,), (0, 5), (0, 5), (0, 1, 2, 5), (0, 1, 2, 3, 4, 5))),
    "schedule-prompt-skipped": d3rt.LayerSchedule(
        sets=((0, 1, 3, 5), (0, 5), (0, 1, 5), (3,)), cycle=True, prompt="skipped"
    ),
    "random-sublayers-0": random_sets(0, 6, 20),
    "random-sublayers-1": random_sets(1, 6, 20),
    "random-sublayers-2": random_sets(2, 6, 20),
}
POLICIES = NESTED | NOT_NESTED


class Forced(LogitsProcessor):
    """Makes step i of row b choose tokens[b][i], whatever the logits say."""

    def __init__(self, prompt_width: int, tokens: Sequence[Sequence[int]]):
        self.prompt_width = prompt_width
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_width
        forced = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(self.tokens):
            forced[row, tokens[step]] = 0
        return forced


def plans_of(runtime: d3rt.Runtime, steps: int):
    """The plans the runtime would use."""
    return runtime.policy.schedule(runtime.config.num_hidden_layers, steps).plans(runtime.kv_fill)


# The model in which the error of a run in a dtype is measured: the same weights, wider arithmetic.
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}


@cache
def wider(name: str, dtype: torch.dtype):
    return tiny_models.upcast(tiny_models.make(name, dtype), WIDER[dtype])


@cache
def truth(
    name: str, dtype: torch.dtype, plans: tuple, prompt: tuple[int, ...]
) -> tuple[oracle.Run, oracle.Run]:
    """The oracle's runs of a prompt in the dtype and, on the tokens of the first, in wider arithmetic."""
    same = oracle.generate(tiny_models.make(name, dtype), prompt, plans)
    return same, oracle.generate(wider(name, dtype), prompt, plans, forced=same.tokens)


def new_tokens(out: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """The generated part of `generate`'s answer."""
    return out[:, inputs["input_ids"].shape[1] :].tolist()
