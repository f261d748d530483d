"""Device: runs the launches of d3rt.kernels.cuda for an architecture, compiled, through the interpreter. It is to
Emitted what eager.py's launch is to Eager, and needs no GPU.

Emitted has the ops of kernels/reference.py as methods, on CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from d3rt.kernels.packing import PackedMatrix
from ptx.machine import Machine
from ptx.memory import Memory
from ptx.program import parse
from ptx.traffic import Traffic

CACHE = Path(__file__).parents[2] / "build" / "triton"
Waves = Sequence[Sequence[int]]


def compiled(launch, arch: int):
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    from d3rt.kernels.cuda.compiled import compile

    return compile(launch, arch)


def tensors_in(value, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an argument of an op, with a name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, PackedMatrix):
        for part in ("data", "scales", "minima"):
            yield from tensors_in(getattr(value, part), f"{name}.{part}")
    elif hasattr(value, "_asdict"):
        for part, item in value._asdict().items():
            yield from tensors_in(item, f"{name}.{part}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors_in(item, f"{name}[{i}]")


@dataclass
class Device:
    """mutate: what to do to the PTX before it runs. waves: for a number of blocks, which run together and in which
    order; ordered, last_wins: see Machine; streams: to count traffic, which of a launch's tensors, by name, are
    streams, see Traffic. Keeps what it ran in `machines`."""

    arch: int
    mutate: Callable[[str], str] = str
    waves: Callable[[int], Waves | None] = lambda blocks: None
    ordered: bool = True
    last_wins: bool = True
    streams: Callable[[str], bool] | None = None
    machines: list[Machine] = field(default_factory=list)
    partials: Tensor = field(default_factory=lambda: torch.empty(0))
    counters: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))

    def launch(self, launch, reachable: dict[str, Tensor] | None = None) -> Machine:
        """reachable: tensors behind the launch's tables of addresses."""
        from d3rt.kernels.cuda.launch import COUNTERS, PARTIALS

        # Exactly what the launch asked for, so that more would be out of bounds; NaN where nothing is written.
        self.partials = torch.full((launch.partials,), float("nan"))
        if launch.counters > len(self.counters):
            self.counters = torch.zeros(launch.counters, dtype=torch.int32)
        working = {PARTIALS: self.partials, COUNTERS: self.counters[: launch.counters]}
        arguments = {
            name: working[at] if isinstance(at, str) else at for name, at in launch.arguments.items()
        }
        made = compiled(launch, self.arch)
        memory = Memory({**(reachable or {} if launch.uploads else {}), **arguments})
        program = parse(self.mutate(made.ptx))
        hidden = len(program.parameters) - len(arguments)  # Triton's scratch, see compiled.py
        traffic = None
        if self.streams is not None:
            traffic = Traffic(memory, [at for name, at in memory.tensors.items() if self.streams(name)])
        machine = Machine(
            program,
            memory,
            [tensor.data_ptr() for tensor in arguments.values()] + [0] * hidden,
            launch.grid,
            made.shared,
            ordered=self.ordered,
            last_wins=self.last_wins,
            traffic=traffic,
        )
        self.machines.append(machine)
        return machine.run(self.waves(machine.blocks))


class Emitted:
    """The ops of d3rt.kernels.cuda on a Device."""

    def __init__(self, device: Device):
        self.device = device

    def __getattr__(self, op: str):
        from d3rt.kernels.cuda import plans

        def run(*arguments, **named):
            reachable = dict(tensors_in([*arguments, *named.values()]))
            for launch in getattr(plans, op)(self.device.arch, *arguments, **named):
                self.device.launch(launch, reachable)

        return run
