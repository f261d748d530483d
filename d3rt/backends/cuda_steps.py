"""Steps: from recorded launches to a native Step that is known to do what they do, or else a slower one that does.

On first contact each step is run launch by launch, by Triton's own launcher, and once as the step that will be
replayed, from the same state; every buffer and K,V line that it writes must be equal bit for bit. A CUDA graph of our
own comes first; where the driver refuses it or it differs, torch's capture of the same launches; then our launches one
by one. Each step down is said, with its reason.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d3rt.backends.cuda_record import Recorded
from d3rt.errors import CudaError
from d3rt.kernels.cuda.eager import Eager
from d3rt.kernels.cuda.launch import COUNTERS, PARTIALS, Launch

logger = logging.getLogger("d3rt")

# An eager launcher: launch(launch, behind), see Recorded.
Launcher = Callable[[Launch, list[Tensor]], None]


def warn(message: str) -> None:
    logger.warning(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def triton_launcher(arch: int, device: torch.device, working: dict[str, Tensor]) -> Launcher:
    """Launches through Triton, with this working memory."""
    eager = Eager(arch, str(device))
    eager.partials, eager.counters = working[PARTIALS], working[COUNTERS]
    return lambda launch, behind: eager.launch(launch)


class State:
    """All that a step writes, as it stands now: the buffers, and of each cache the lines at pos."""

    def __init__(self, recorded: Recorded, pos: Tensor):
        self._slots = torch.arange(len(pos), device=pos.device)
        self._at = pos.long()
        self._buffers = dict(recorded.written)
        self._caches = recorded.caches
        self._before = self.now()

    def now(self) -> dict[str, Tensor]:
        """A copy of it, by name."""
        lines = {
            f"K,V line of cache {number}": cache[self._slots, :, self._at]
            for number, cache in enumerate(self._caches)
        }
        return {name: buffer.clone() for name, buffer in self._buffers.items()} | lines

    def restore(self) -> None:
        """Back to what it was when this was made."""
        before = list(self._before.values())
        for buffer, value in zip(self._buffers.values(), before, strict=False):
            buffer.copy_(value)
        for cache, value in zip(self._caches, before[len(self._buffers) :], strict=True):
            cache[self._slots, :, self._at] = value


def difference(expected: dict[str, Tensor], got: dict[str, Tensor]) -> str | None:
    """Which values are not equal bit for bit, in words; None when all are."""
    for name, value in expected.items():
        a, b = (tensor.contiguous().view(torch.uint8) for tensor in (value, got[name]))
        if not torch.equal(a, b):
            size = value.element_size()
            wrong = int((a != b).view(-1, size).any(1).sum())
            return f"{wrong} of {value.numel()} values of {name} differ from those of the same launches one by one"
    return None


@dataclass(frozen=True)
class BuiltStep:
    """A native Step and what must live as long as it does."""

    step: Any  # _C.cuda.Step
    keeps: tuple[Any, ...]


class StepBuilder:
    """native: _C.cuda. tape(recorded) gives a _C.cuda.Tape of it, and what that needs; launcher() an eager launcher;
    place: the stream and what captures it (cuda_device.TorchStream)."""

    def __init__(self, native: Any, context: Any, place: Any, tape, launcher: Callable[[], Launcher]):
        self._native, self._context, self._place = native, context, place
        self._tape, self._launcher = tape, launcher
        self._unchecked = False

    def build(self, recorded: Recorded, pos: Tensor, what: str) -> BuiltStep:
        """The best Step of these launches that works; the state is as before. CudaError when none does."""
        tape, keeps = self._tape(recorded)
        self._synchronize()
        with self._place.scope():
            state = State(recorded, pos)
            expected = self._expected(recorded, state, what)
            complaints = []
            for mode, made in self._candidates(recorded, tape):
                if complaints:
                    warn(f"{what}: {complaints[-1]}; falling back to {mode}.")
                try:
                    built = made()
                    built.step.launch(self._place.handle)
                    self._synchronize()
                    problem = None if expected is None else difference(expected, state.now())
                except RuntimeError as error:  # CudaError is one, and so is what torch raises
                    problem = f"{type(error).__name__}: {error}"
                complaint = f"as {mode}, {problem}"
                try:
                    state.restore()
                except RuntimeError as error:  # no slower way helps a context that is broken
                    raise CudaError(f"{what}, {complaint}; then the device failed: {error}") from error
                if problem is None:
                    return BuiltStep(built.step, (*built.keeps, keeps))
                complaints.append(complaint)
        raise CudaError(
            f"{what} cannot be replayed on this device: {'; '.join(complaints)}; use backend='cpu'."
        )

    def _candidates(self, recorded: Recorded, tape: Any) -> Iterator[tuple[str, Callable[[], BuiltStep]]]:
        step, stream = self._native.Step, self._place.handle

        def captured() -> BuiltStep:
            launcher = self._launcher()  # before the capture, which may allocate nothing
            graph, executable = self._place.capture(lambda: _launch(launcher, recorded))
            return BuiltStep(step.captured(self._context, executable, tape.ops), (graph,))

        yield "a graph", lambda: BuiltStep(step.graph(tape, stream), ())
        yield "a graph that torch captures", captured
        yield "launches one by one", lambda: BuiltStep(step.eager(tape), ())

    def _expected(self, recorded: Recorded, state: State, what: str) -> dict[str, Tensor] | None:
        """What the step leaves when it is launched one by one; None, once warned of, where that cannot be done.
        CudaError when the device fails at it: then the kernels themselves are wrong."""
        expected = None
        try:
            _launch(self._launcher(), recorded)
        except Exception as error:  # Triton's launcher needs a C compiler, among others
            if not self._unchecked:
                warn(
                    f"recorded steps are not checked: Triton cannot launch a kernel here ({type(error).__name__}: "
                    f"{error}); the graphs are used as they are."
                )
            self._unchecked = True
        else:
            try:
                self._synchronize()
            except CudaError as error:
                raise CudaError(f"{what}, launched one by one: {error}") from error
            expected = state.now()
        state.restore()
        return expected

    def _synchronize(self) -> None:
        self._native.synchronize(self._context, self._place.handle)


def _launch(launcher: Launcher, recorded: Recorded) -> None:
    for launch, behind in zip(recorded.launches, recorded.behind, strict=True):
        launcher(launch, behind)
