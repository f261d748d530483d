"""The cuda backend: the Triton kernels of d3rt.kernels.cuda, recorded into lists of launches that become CUDA graphs,
and the C++ dispatcher that replays them (csrc/cuda). Tensors are torch's, on torch's primary context; everything goes
to one stream of the backend's own.

Around it: cuda_device.py finds the GPU, cuda_record.py says what a recording is, cuda_steps.py makes a checked step of
it, cuda_loop.py is the decode loop, cuda_prefill.py the prompt's products and attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from d3rt.backends.base import Needs
from d3rt.backends.cores import usable_cores
from d3rt.backends.cuda_device import Found, TorchStream
from d3rt.backends.cuda_loop import CudaLoop, refuse_early_exit
from d3rt.backends.cuda_prefill import UNPACKED_BYTES, CudaPrefill, flash_attention
from d3rt.backends.cuda_record import Kernels, Recorded, Recorder, Working
from d3rt.backends.cuda_steps import Launcher, StepBuilder, triton_launcher
from d3rt.backends.native import native
from d3rt.backends.packer import native_pack
from d3rt.errors import BackendUnavailableError, UnsupportedModelError, UnsupportedOptionError
from d3rt.kernels.cuda.tiles import attention_tile
from d3rt.kernels.packing import PackedMatrix

# Set aside for what a driver takes for modules and graphs, which is known only once they are there. A guess, on the
# safe side of the 150 kernel nodes of a 30-layer step.
GRAPH_RESERVE = 256 << 20


class CudaProgram:
    """A recorded step. Its launches, one by one, can be replayed; the loop makes better steps of it."""

    def __init__(self, backend: CudaBackend, recorded: Recorded):
        self.recorded = recorded
        self._backend, self._tape = backend, None

    def replay(self) -> None:
        """Enqueues it on the backend's stream."""
        if self._tape is None:
            self._tape = self._backend.tape(self.recorded)
        tape, _ = self._tape
        tape.launch(self._backend.stream)

    replay_after_torch = replay


class CudaBackend:
    """CUDA graphs of Triton kernels on one GPU. place: its stream (TorchStream); launcher: how the self-check launches
    a kernel, None for Triton's own. The tests stand in for both where there is no GPU."""

    name = "cuda"
    line_tables = False

    def __init__(
        self,
        found: Found,
        place: Any = None,
        launcher: Launcher | None = None,
        threads: int | None = None,
    ):
        self.threads = threads or 1  # the dispatcher's
        self.native = native("cuda").cuda
        self.context, self.arch = found.context, found.kernel_arch
        self._place = place or TorchStream(found.ordinal)
        self.device, self.stream, self.scope = self._place.device, self._place.handle, self._place.scope
        prefill = CudaPrefill(self.arch, flash_attention(self.arch))
        self.linear, self.linear_bytes, self.attend = prefill.linear, prefill.linear_bytes, prefill.attend
        self._working = Working(self.device)
        self._kernels = Kernels(self.arch, partial(_load, self.native, self.context))
        self._owned: set[int] = set()
        self._loops: WeakSet[CudaLoop] = WeakSet()
        self._launcher = launcher

    @property
    def scratch_bytes(self) -> int:
        return self._working.nbytes + sum(step.bytes for loop in self._loops for step in loop.steps)

    def admit(self, needs: Needs) -> None:
        if needs.early_exit is not None:
            refuse_early_exit(f"policy {needs.early_exit!r}")
        if needs.cache_dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UnsupportedOptionError(
                "kv_cache_dtype='int8': the CUDA kernels have no int8 K,V cache; choose float16 or bfloat16, or "
                "backend='cpu'."
            )
        if self.arch < 75 and torch.bfloat16 in (needs.cache_dtype, *needs.weight_dtypes):
            what = "kv_cache_dtype" if needs.cache_dtype is torch.bfloat16 else "dtype"
            raise UnsupportedOptionError(
                f"{what}='bfloat16': {self.context.name} (sm_{self.context.arch}) has no bfloat16; pass "
                f"{what}='float16', or backend='cpu'."
            )
        try:
            attention_tile(self.arch, needs.group, needs.head_dim, needs.cache_dtype.itemsize == 2)
        except ValueError as error:
            raise UnsupportedModelError(f"backend 'cuda': {error}") from None
        free, _ = self.context.memory()
        free += self._place.reusable_bytes()
        parts = {
            "weights": needs.weights,
            "K,V cache": needs.kv_cache,
            "buffers": needs.buffers,
            "prefill": needs.prefill + UNPACKED_BYTES * needs.unpacked,
            "set aside for graphs": GRAPH_RESERVE,
        }
        if sum(parts.values()) > free:
            listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
            raise BackendUnavailableError(
                f"backend 'cuda': {self.context.name} has {free / 1e9:.2f} GB free, and this takes "
                f"{sum(parts.values()) / 1e9:.2f} GB ({listed}); choose narrower weights ('int8', 'int4'), a lower "
                "max_seq_len or batch_size, or backend='cpu'."
            )

    def own(self, tensors: Sequence[Tensor]) -> None:
        self._owned |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    own_weights = own

    def pack(self, weight: Tensor, format: str) -> PackedMatrix:
        return native_pack(native("cuda").ThreadPool(usable_cores()), weight, format)

    def recorder(self) -> Recorder:
        """Of what a step launches; all of it on tensors that are owned."""
        return Recorder(
            self.arch, self.device, lambda tensor: tensor.untyped_storage().data_ptr() in self._owned
        )

    def record(self, step: Callable[[Any], None]) -> CudaProgram:
        ops = self.recorder()
        with self.scope():
            step(ops)
        self.reserve(ops.recorded)
        return CudaProgram(self, ops.recorded)

    def reserve(self, recorded: Recorded) -> None:
        """Sees to it that working memory which is yet to be allocated will do for this too."""
        self._working.reserve(recorded)

    def tape(self, recorded: Recorded) -> tuple[Any, tuple]:
        """A _C.cuda.Tape of it, and what must live as long as that."""
        with self.scope():
            working = self._working.tensors()
        tape = self.native.Tape(self.context)
        for launch, kernel in zip(recorded.launches, self._kernels.load(recorded.launches), strict=True):
            pointers = [
                (working[at] if isinstance(at, str) else at).data_ptr() for at in launch.arguments.values()
            ]
            tape.add(launch.op, kernel, launch.grid, pointers)
        return tape, (recorded, working)

    def builder(self) -> StepBuilder:
        """What makes checked steps. Not kept: it knows the backend, which a dropped runtime is to free at once."""
        return StepBuilder(
            self.native,
            self.context,
            self._place,
            self.tape,
            lambda: self._launcher or triton_launcher(self.arch, self.device, self._working.tensors()),
        )

    def synchronize(self) -> None:
        """Waits for all that has been enqueued."""
        self.native.synchronize(self.context, self.stream)

    def loop(self, token: Tensor, pos: Tensor, logits: Tensor, filled: Tensor) -> CudaLoop:
        loop = CudaLoop(self, token, pos, logits, filled)
        self._loops.add(loop)
        return loop

    def describe(self) -> dict[str, str]:
        modes = Counter(step.mode for loop in self._loops for step in loop.steps)
        built = {"steps": ", ".join(f"{count} as {mode}" for mode, count in modes.items())} if modes else {}
        return {
            "runs": f"CUDA graphs of Triton kernels for sm_{self.arch}",
            "device": f"{self.context.name} (sm_{self.context.arch})",
            **built,
        }


def _load(native: Any, context: Any, compiled: Any) -> Any:
    """The kernel on the device. Its name may be that of others, of other shapes: each is a module of its own."""
    return native.Kernel(context, compiled.cubin, compiled.name, compiled.shared, 32 * compiled.warps)
