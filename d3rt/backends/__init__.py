"""Backends by name. Each is imported when it is asked for, so that `import d3rt` needs neither Triton nor CUDA."""

from __future__ import annotations

import logging
from collections.abc import Callable

from d3rt.backends.base import Backend
from d3rt.errors import BackendUnavailableError

logger = logging.getLogger("d3rt")


def _cpu(threads: int | None) -> Backend:
    from d3rt.backends.cpu import CpuBackend

    return CpuBackend(threads)


def _reference(threads: int | None) -> Backend:
    from d3rt.backends.reference import ReferenceBackend

    return ReferenceBackend(threads)


def _cuda(threads: int | None) -> Backend:
    from d3rt.backends.cuda_device import find

    found = find()
    from d3rt.backends.cuda import CudaBackend  # needs Triton

    return CudaBackend(found, threads=threads)


_MAKERS: dict[str, Callable[[int | None], Backend]] = {"cpu": _cpu, "cuda": _cuda, "reference": _reference}


def make_backend(name: str, threads: int | None = None) -> Backend:
    """The backend called `name`; "auto" takes cuda where it can be had, else cpu. BackendUnavailableError says why one
    cannot be had here."""
    if name == "auto":
        try:
            return _MAKERS["cuda"](threads)
        except BackendUnavailableError as error:
            logger.info("backend 'auto' takes cpu: %s", error)
            name = "cpu"
    if name not in _MAKERS:
        raise BackendUnavailableError(f"backend {name!r}: unknown; choose one of auto, {', '.join(_MAKERS)}.")
    return _MAKERS[name](threads)


def availability() -> dict[str, dict[str, str]]:
    """For each backend what it runs on, or {"unavailable": why}."""
    report = {}
    for name in _MAKERS:
        try:
            report[name] = make_backend(name).describe()
        except (BackendUnavailableError, ValueError) as error:  # ValueError: D3RT_CPU_ISA forces one it lacks
            report[name] = {"unavailable": str(error)}
    return report
