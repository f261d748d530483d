"""A GPU that is none: the cuda backend on CPU tensors, over a libcuda that keeps the books (fake_libcuda.py) and has
each kernel's PTX executed by the interpreter (tests/ptx). Everything from `compile` to the last token is as on a GPU,
but for torch's own part and what only a real driver and real hardware can say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from fake_libcuda import ROOT, FakeCuda, Ran
from torch import Tensor

os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))


class Place:
    """cuda_device.TorchStream without torch.cuda: the CPU, the driver's default stream, and nothing to capture with."""

    device = torch.device("cpu")
    handle = 0
    scope = nullcontext

    def reusable_bytes(self) -> int:
        return 0

    def capture(self, run):
        raise RuntimeError("there is no torch.cuda to capture with")


class FakeGpu:
    """The driver, and what stands for the device. It runs kernels of sm_<arch> on the tensors that it has been shown.

    damage(op, tensors), if set, is called after each kernel of the driver's (not after those of a self-check).
    """

    def __init__(self, arch: int, monkeypatch):
        from d3rt.backends import cuda_record
        from d3rt.backends.cuda import CudaBackend
        from d3rt.kernels.cuda.compiled import compile

        self.arch = arch
        self.damage: Callable[[str, Sequence[Tensor]], None] | None = None
        self._tensors: dict[int, Tensor] = {}  # by address: all that a kernel may be given
        self._behind: dict[int, Sequence[Tensor]] = {}  # by address of a table, what it leads to
        self._made: dict[bytes, tuple[str, object]] = {}  # by cubin: op, Compiled

        def noting(launch, arch):
            made = compile(launch, arch)
            self._made[made.cubin] = launch.op, made
            return made

        def owning(backend, tensors, own=CudaBackend.own):
            self._tensors |= {tensor.data_ptr(): tensor for tensor in tensors}
            own(backend, tensors)

        monkeypatch.setattr(cuda_record, "compile", noting)
        monkeypatch.setattr(CudaBackend, "own", owning)
        monkeypatch.setattr(CudaBackend, "own_weights", owning)
        self.driver = FakeCuda()
        self.driver.set(arch=arch, memory=1 << 36)
        self.driver.run_by(self._run)

    def backend(self):
        """A new cuda backend on it. Its self-checks run each kernel as this class's `launch`."""
        from d3rt import _C
        from d3rt.backends.cuda import CudaBackend
        from d3rt.backends.cuda_device import Found

        context = _C.cuda.Context(_C.cuda.Driver(self.driver.path), 0)
        backend = CudaBackend(Found(context, 0, self.arch), Place(), self.launch)
        self._working = backend._working
        return backend

    def launch(self, launch, behind: Sequence[Tensor]) -> None:
        """Runs one launch at once, as Triton's launcher would. Working memory is exactly what it asked for."""
        from d3rt.kernels.cuda.compiled import compile
        from d3rt.kernels.cuda.launch import COUNTERS, PARTIALS

        working = {
            PARTIALS: torch.full((launch.partials,), float("nan")),
            COUNTERS: torch.zeros(launch.counters, dtype=torch.int32),
        }
        arguments = [working[at] if isinstance(at, str) else at for at in launch.arguments.values()]
        if behind:
            table = launch.arguments["table"]
            self._tensors[table.data_ptr()], self._behind[table.data_ptr()] = table, behind
        _execute(compile(launch, self.arch), arguments, behind, launch.grid)

    def _run(self, ran: Ran) -> None:
        """A kernel of the driver's."""
        op, made = self._made[ran.cubin]
        assert (ran.kernel, ran.threads, ran.shared) == (made.name, 32 * made.warps, made.shared), op
        working = {tensor.data_ptr(): tensor for tensor in self._working.tensors().values()}
        given, hidden = ran.pointers[: len(made.parameters)], ran.pointers[len(made.parameters) :]
        assert not any(hidden), op
        arguments = [(self._tensors | working)[pointer] for pointer in given]
        behind = [tensor for pointer in given for tensor in self._behind.get(pointer, ())]
        _execute(made, arguments, behind, ran.grid)
        if self.damage is not None:
            self.damage(op, arguments)

    def check(self) -> None:
        """Raises what went wrong in a kernel, or against the rules of the driver."""
        if self.driver.errors:
            raise self.driver.errors[0]
        assert self.driver.faults() == ""


def _execute(made, arguments: Sequence[Tensor], behind: Sequence[Tensor], grid) -> None:
    """Races are not looked for, which would take most of the time: tests/gpu/test_ptx_ops.py does that."""
    from ptx.machine import Machine
    from ptx.memory import Memory
    from ptx.program import parse

    program = parse(made.ptx)
    memory = Memory({f"tensor {i}": tensor for i, tensor in enumerate((*behind, *arguments))})
    addresses = [tensor.data_ptr() for tensor in arguments]
    addresses += [0] * (len(program.parameters) - len(arguments))  # Triton's scratch
    Machine(program, memory, addresses, grid, made.shared, ordered=False).run()
