"""The libcuda without a device (tests/fake_cuda/fake_cuda.h says what it does), for Python: built on first use."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(ROOT / "tests" / "fake_cuda" / name for name in ("fake_cuda.cpp", "fake_cuda.h")),
    ROOT / "csrc" / "cuda" / "api.h",
]
_RUNNER = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.c_int,
)


def compiler() -> str:
    """A C++ compiler, or the test is skipped."""
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler (c++, g++ or $CXX)")
    return found


@cache
def build() -> Path:
    """The library's path; it is compiled when its sources changed."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
    made = ROOT / "build" / "fake_cuda" / f"libfake_cuda-{digest}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"]
        subprocess.run(
            [compiler(), *flags, f"-I{ROOT / 'csrc'}", str(SOURCES[0]), "-o", str(unfinished)], check=True
        )
        unfinished.rename(made)  # at once whole: other processes may build it too
    return made


@dataclass(frozen=True)
class Ran:
    """A kernel that the fake device was to run. pointers: every argument, hidden ones too."""

    kernel: str
    cubin: bytes
    grid: tuple[int, int, int]
    threads: int
    shared: int
    pointers: tuple[int, ...]


class FakeCuda:
    """The library in this process, as new: reset."""

    def __init__(self):
        self.path = str(build())
        self._library = ctypes.CDLL(self.path)
        for name in ("log", "faults", "failed"):
            getattr(self._library, f"fakecuda_{name}").restype = ctypes.c_char_p
        self._library.fakecuda_count.restype = ctypes.c_longlong
        self._library.fakecuda_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
        self._library.fakecuda_set_runner.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._runner = None
        self.errors: list[BaseException] = []  # that a runner raised
        self._library.fakecuda_reset()

    def set(self, **settings: int) -> None:
        """version, devices, arch, memory"""
        for name, value in settings.items():
            self._library.fakecuda_set(name.encode(), value)

    def set_eager(self, eager: bool) -> None:
        self._library.fakecuda_set_eager(int(eager))

    def set_logging(self, on: bool) -> None:
        self._library.fakecuda_set_logging(int(on))

    def fail(self, spec: str) -> None:
        """ "cuGraphLaunch:3:700": the third such call from now on fails with that CUresult."""
        self._library.fakecuda_fail(spec.encode())

    def log(self, call: str | None = None) -> list[str]:
        """Lines of all calls, or of those named `call`."""
        lines = self._library.fakecuda_log().decode().splitlines()
        return [line for line in lines if call is None or line.split(" ")[0] == call]

    def faults(self) -> str:
        return self._library.fakecuda_faults().decode()

    def count(self, call: str = "*") -> int:
        return self._library.fakecuda_count(call.encode())

    def live(self, kind: str = "*") -> int:
        return self._library.fakecuda_live(kind.encode())

    def run_by(self, run: Callable[[Ran], None] | None) -> None:
        """Has kernels run by `run`. What that raises is kept in `errors`: ctypes would only print it."""

        def runner(_user, kernel, cubin, size, grid, threads, shared, pointers, n):
            try:
                run(
                    Ran(
                        kernel.decode(),
                        ctypes.string_at(cubin, size),
                        (grid[0], grid[1], grid[2]),
                        threads,
                        shared,
                        tuple(pointers[:n]),
                    )
                )
            except BaseException as error:
                self.errors.append(error)

        before = self._runner  # kept until the library has the new one
        self._runner = _RUNNER(runner) if run else None
        self._library.fakecuda_set_runner(ctypes.cast(self._runner, ctypes.c_void_p) if run else None, None)
        del before
