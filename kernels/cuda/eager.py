"""Eager: the ops of kernels/reference.py, run launch by launch through their plans. The plainest use of a plan, the one
that graphs are compared with, and with Triton's interpreter the one that runs without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from d3rt.kernels.cuda.launch import COUNTERS, PARTIALS, Launch
from d3rt.kernels.cuda.plans import Ops


class Eager(Ops):
    """Working memory, and each op as a method. Tensors must lie on `device`."""

    def __init__(self, arch: int, device: str = "cuda"):
        self.arch, self.device = arch, device
        self.partials = torch.empty(0, device=device)
        self.counters = torch.zeros(0, dtype=torch.int32, device=device)

    def launch(self, launch: Launch) -> None:
        if launch.partials > len(self.partials):
            self.partials = torch.full((launch.partials,), float("nan"), device=self.device)
        if launch.counters > len(self.counters):
            self.counters = torch.zeros(launch.counters, dtype=torch.int32, device=self.device)
        working = {PARTIALS: self.partials, COUNTERS: self.counters}
        arguments = {
            name: working[at] if isinstance(at, str) else at.to(self.device) if name in launch.uploads else at
            for name, at in launch.arguments.items()
        }
        launch.kernel[launch.grid](
            **arguments,
            **launch.constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )

    def take(self, plan: Callable[..., list[Launch]], *arguments, **named) -> None:
        for launch in plan(self.arch, *arguments, **named):
            self.launch(launch)
