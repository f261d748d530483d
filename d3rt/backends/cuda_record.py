"""What a step is on a GPU: a list of launches, what they write, and the working memory and compiled kernels that they
share. Launches come from d3rt.kernels.cuda.plans; how they are replayed is up to cuda_steps.py."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from d3rt.errors import ForeignBufferError
from d3rt.kernels.cuda import plans
from d3rt.kernels.cuda.compiled import compile
from d3rt.kernels.cuda.launch import COUNTERS, PARTIALS, Launch
from d3rt.kernels.packing import PackedMatrix

# Of each op the arguments that it writes. Caches, which it writes one line of, are CACHES.
WRITTEN = {
    "embed": ("x",),
    "norm_qkv_rope": ("q",),
    "attention": ("out",),
    "proj_add": ("x",),
    "norm_gate_up": ("h",),
    "norm_logits": ("logits",),
    "sample": ("next_token", "seen"),
    "advance": ("token", "pos", "finished", "step", "ring"),
}
CACHES = ("k_cache", "v_cache", "hidden")  # hidden [B, S, D] counts as [B, 1, S, D]


@dataclass
class Recorded:
    """Launches in order. written: the buffers that they write, by name; caches [B, G, S, d], of which they write the
    line at pos. behind: of each launch the tensors that a table of addresses in it leads to."""

    launches: list[Launch] = field(default_factory=list)
    written: dict[str, Tensor] = field(default_factory=dict)
    caches: list[Tensor] = field(default_factory=list)
    behind: list[list[Tensor]] = field(default_factory=list)

    def __add__(self, other: Recorded) -> Recorded:
        caches = {cache.data_ptr(): cache for cache in (*self.caches, *other.caches)}
        return Recorded(
            self.launches + other.launches,
            other.written | self.written,
            list(caches.values()),
            self.behind + other.behind,
        )

    @property
    def partials(self) -> int:
        return max((launch.partials for launch in self.launches), default=0)

    @property
    def counters(self) -> int:
        return max((launch.counters for launch in self.launches), default=0)


class Recorder(plans.Ops):
    """The ops of d3rt.kernels.reference, and sample and advance of d3rt.kernels.cuda.plans: each notes its launches.

    owns: whether a tensor is static memory; ForeignBufferError for one that is not. Tables of addresses go to `device`.
    """

    def __init__(self, arch: int, device: torch.device, owns: Callable[[Tensor], bool]):
        self.recorded = Recorded()
        self._arch, self._device, self._owns = arch, device, owns

    def take(self, plan: Callable[..., list[Launch]], *arguments, **named) -> None:
        given = inspect.signature(plan).bind(self._arch, *arguments, **named).arguments
        tensors = dict(_tensors(given))
        for name, tensor in tensors.items():
            if not self._owns(tensor):
                raise ForeignBufferError(
                    f"{plan.__name__}: {name} is not the runtime's own memory: a recorded step would outlive it."
                )
        recorded = self.recorded
        for launch in plan(self._arch, *arguments, **named):
            tables = {name: launch.arguments[name].to(self._device) for name in launch.uploads}
            recorded.launches.append(replace(launch, arguments={**launch.arguments, **tables}, uploads=()))
            recorded.behind.append(list(tensors.values()) if tables else [])
        for name in WRITTEN.get(plan.__name__, ()):
            if given.get(name) is not None:
                recorded.written.setdefault(name, given[name])
        known = {cache.data_ptr() for cache in recorded.caches}
        if plan is not plans.attention:
            recorded.caches += [
                tensor if tensor.dim() == 4 else tensor.unsqueeze(1)
                for name, tensor in tensors.items()
                if name.endswith(CACHES) and tensor.data_ptr() not in known
            ]


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an op's arguments, by a name that ends as its parameter's or field's does."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, PackedMatrix):
        for part in ("data", "scales", "minima"):
            yield from _tensors(getattr(value, part), f"{name}.{part}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, key)
    elif hasattr(value, "_asdict"):
        for key, item in value._asdict().items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")


class Working:
    """Working memory that all launches share, since they follow each other: partials float32, and counters int32, which
    are 0 before each launch and after it. What has been handed out keeps its address; more is allocated anew."""

    def __init__(self, device: torch.device):
        self._device = device
        self.partials = torch.zeros(0, device=device)
        self.counters = torch.zeros(0, dtype=torch.int32, device=device)
        self._wanted = [0, 0]

    def reserve(self, recorded: Recorded) -> None:
        """To be allocated with the next `tensors`."""
        self._wanted = [
            max(self._wanted[0], recorded.partials),
            max(self._wanted[1], recorded.counters),
        ]

    def tensors(self) -> dict[str, Tensor]:
        """PARTIALS and COUNTERS; whoever uses their addresses keeps them."""
        if self._wanted[0] > len(self.partials):
            self.partials = torch.zeros(self._wanted[0], device=self._device)
        if self._wanted[1] > len(self.counters):
            self.counters = torch.zeros(self._wanted[1], dtype=torch.int32, device=self._device)
        return {PARTIALS: self.partials, COUNTERS: self.counters}

    @property
    def nbytes(self) -> int:
        return 4 * (len(self.partials) + len(self.counters))


class Kernels:
    """Compiled kernels by what they are made of, each loaded once. make(compiled) loads one."""

    def __init__(self, arch: int, make: Callable[[Any], Any]):
        self._arch, self._make = arch, make
        self._loaded: dict[tuple, Any] = {}

    def load(self, launches: Sequence[Launch]) -> list[Any]:
        """A loaded kernel for each launch."""
        missing = {_key(launch): launch for launch in launches if _key(launch) not in self._loaded}
        with progress() as show:
            for number, (key, launch) in enumerate(missing.items(), 1):
                show(f"compiling kernel {number} of {len(missing)} for sm_{self._arch}: {launch.op}")
                self._loaded[key] = self._make(compile(launch, self._arch))
        return [self._loaded[_key(launch)] for launch in launches]


def _key(launch: Launch) -> tuple:
    return (
        launch.kernel,
        tuple(launch.signature().items()),
        tuple(launch.constants.items()),
        launch.aligned(),
        launch.warps,
        launch.stages,
    )


class progress:
    """`with progress() as show`: show(text) replaces the line on stderr, where that is a terminal; it goes at last."""

    def __enter__(self) -> Callable[[str], None]:
        self._shown = 0
        return self._show if sys.stderr.isatty() else lambda text: None

    def _show(self, text: str) -> None:
        line = f"d3rt: {text}"
        sys.stderr.write(f"\r{line:<{self._shown}}")
        sys.stderr.flush()
        self._shown = len(line)

    def __exit__(self, *_) -> None:
        if self._shown:
            sys.stderr.write(f"\r{'':<{self._shown}}\r")
            sys.stderr.flush()
