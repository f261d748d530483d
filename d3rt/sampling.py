"""SamplingParams: how a token is chosen from logits. Standard library only; generation.py fills it in from Hugging
Face's arguments, kernels/reference.py says what the fields mean, csrc/sampler.cpp does it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Greedy unless do_sample. Applied in this order: repetition_penalty, temperature, top_k, top_p, min_p."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    seed: int = 0
