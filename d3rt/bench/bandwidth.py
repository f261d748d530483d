"""The memory bandwidth that a speed is held against."""

from __future__ import annotations

import time

import torch

from d3rt.backends.native import native

BANDWIDTH_PROBE = "torch.sum over float32 in large pages, all threads"
BANDWIDTH_PROBE_BYTES = 512 * 2**20  # many times any cache


class Bandwidth:
    """Reads a large buffer with all of torch's threads. A call returns GB/s (1e9 bytes), the best of three reads."""

    def __init__(self, size: int = BANDWIDTH_PROBE_BYTES):
        self._buffer = torch.ones(size // 4)
        # As the weights are kept: in 4 KiB pages the same processor may read at half the speed.
        self._arena = native().Arena()
        self._arena.add(self._buffer)
        self._arena.use_large_pages()

    def __call__(self) -> float:
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            self._buffer.sum()
            seconds.append(time.perf_counter() - begin)
        return self._buffer.numel() * 4 / min(seconds) / 1e9
