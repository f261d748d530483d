"""Finds a GPU that the cuda backend can use, or says why there is none and what would help; and torch's side of it: the
stream that everything goes to. Needs no Triton, so that `backend="auto"` may ask."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from d3rt.backends.native import native
from d3rt.errors import BackendUnavailableError, CudaError
from d3rt.kernels.cuda.tiles import ARCHS

# CUDA 13 builds of torch begin with sm_75; of the CUDA 12 ones this index keeps Volta.
VOLTA_INDEX = "https://download.pytorch.org/whl/cu126"


@dataclass(frozen=True)
class Found:
    """A GPU. ordinal: CUDA's number of it; kernel_arch: what kernels are compiled for, a line of tiles.py."""

    context: Any  # _C.cuda.Context
    ordinal: int
    kernel_arch: int


def torch_runs_on(arch: int, built_for: list[str]) -> bool:
    """Whether a torch with this torch.cuda.get_arch_list() has code for sm_<arch>: of its generation and no newer, or
    PTX (compute_..) of any older one."""
    for entry in built_for:
        kind, _, digits = entry.rstrip("af").partition("_")
        number = int(digits)
        if number <= arch and (kind == "compute" or number // 10 == arch // 10):
            return True
    return False


def find(
    cuda: Any = torch.cuda,
    toolkit: str | None = torch.version.cuda,
    driver: Callable[[], Any] = lambda: native("cuda").cuda.Driver(),
    context: Callable[[Any, int], Any] = lambda driver, ordinal: native("cuda").cuda.Context(driver, ordinal),
    has_triton: Callable[[], bool] = lambda: importlib.util.find_spec("triton") is not None,
) -> Found:
    """The GPU that torch uses. BackendUnavailableError when there is none, or none that works. The arguments stand for
    torch.cuda, torch.version.cuda, the driver and Triton."""

    def refused(why: str) -> BackendUnavailableError:
        return BackendUnavailableError(f"backend 'cuda': {why}; available here: cpu, reference.")

    loaded = driver()
    if not loaded.devices():
        raise refused("no CUDA device found")
    if toolkit is None:
        raise refused(
            f"torch {torch.__version__} is built without CUDA: pip install torch, with --index-url {VOLTA_INDEX} for a "
            "V100"
        )
    if not cuda.is_available():
        major, minor = divmod(loaded.version // 10, 100)
        raise refused(
            f"torch {torch.__version__} finds no usable device: it needs a driver for CUDA {toolkit}, and this one is "
            f"for {major}.{minor}: update it, or install a torch for an older CUDA"
        )
    try:
        ordinal = cuda.current_device()
        name, (major, minor) = cuda.get_device_name(ordinal), cuda.get_device_capability(ordinal)
    except RuntimeError as error:  # the first call that starts CUDA in this process
        raise refused(
            f"torch {torch.__version__} cannot start CUDA: {' '.join(str(error).split())}"
        ) from error
    arch = 10 * major + minor
    if not torch_runs_on(arch, cuda.get_arch_list()):
        built_for = ", ".join(cuda.get_arch_list())
        way_out = f" --index-url {VOLTA_INDEX}" if arch < 75 else ", a version that has it"
        raise refused(
            f"torch {torch.__version__} has no code for {name} (sm_{arch}), only for {built_for}: pip install torch"
            + way_out
        )
    # What lies between those is in Tegra chips (sm_72, sm_87), on which machine code of other chips does not run (CUDA
    # C++ Programming Guide, "Binary Compatibility").
    if arch not in ARCHS:
        known = ", ".join(f"sm_{known}" for known in ARCHS)
        raise refused(f"{name} is sm_{arch}, and there are kernels for {known} only")
    if not has_triton():
        raise refused("Triton, which makes the kernels, is not installed: pip install 'triton>=3.7'")
    try:
        return Found(context(loaded, ordinal), ordinal, arch)
    except CudaError as error:
        raise refused(f"{name} cannot be used: {error}") from error


class TorchStream:
    """A stream of torch's, for the backend alone. handle: its CUstream."""

    def __init__(self, ordinal: int):
        self.device = torch.device("cuda", ordinal)
        self._stream = torch.cuda.Stream(self.device)
        self.handle = self._stream.cuda_stream

    @contextmanager
    def scope(self) -> Iterator[None]:
        """torch's current stream is this one inside; it waits for the one before, and that then waits for it."""
        before = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):  # it sets the device too
            yield
        before.wait_stream(self._stream)

    def reusable_bytes(self) -> int:
        """What torch holds of the device's memory without using it."""
        return torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def capture(self, run: Callable[[], None]) -> tuple[Any, int]:
        """What run() launches, as a graph of torch's, which must be kept, and its CUgraphExec."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            run()
        graph.instantiate()
        return graph, graph.raw_cuda_graph_exec()
