"""Traffic: what a launch moves between the chip and its memory, in sectors of 32 bytes, which are what memory moves.

Of the large tensors, the streams, hardly anything can be hoped to stay in a cache: a sector counts each time that a
block asks for it, unless the same block did so within its last few instructions, when it is in the L1 cache. (A thread
takes 32 bytes as two loads of 16; the scales of packed weights are asked for along with each of their words.) Of
everything else, some kilobytes that all blocks share, each distinct sector counts once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from ptx.memory import Memory

SECTOR = 32  # bytes
KEPT = 8  # instructions; of 128 threads with a sector each that is 32 KB, a quarter of the smallest L1 cache


def mark(memory: Memory, tensors: Iterable[Tensor]) -> np.ndarray:
    """bool [sectors]: those that hold anything of these tensors."""
    marked = np.zeros(memory.size // SECTOR, np.bool_)
    for tensor in tensors:
        for first, end in memory.numbers(tensor):
            marked[first // SECTOR : (end - 1) // SECTOR + 1] = True
    return marked


class Traffic:
    """Of one launch. streams: tensors registered in `memory`."""

    def __init__(self, memory: Memory, streams: Iterable[Tensor] = ()):
        self.of_streams = mark(memory, streams)
        self.touched = np.zeros(len(self.of_streams), np.bool_)
        self.asked = 0  # for sectors of streams
        self._block = np.full(len(self.of_streams), -1, np.int32)  # that last asked for each sector
        self._when = np.zeros(len(self.of_streams), np.int32)  # it did so: the how manieth instruction
        self._now = 0

    def count(self, numbers: np.ndarray, blocks: np.ndarray) -> None:
        """An instruction's access of up to 16 aligned bytes from each of Memory's numbers, each by a thread of that
        block."""
        sectors = numbers // SECTOR
        self.touched[sectors] = True
        streamed = self.of_streams[sectors]
        if not streamed.any():
            return
        self._now += 1
        if not streamed.all():
            sectors, blocks = sectors[streamed], blocks[streamed]
        new = (self._block[sectors] != blocks) | (self._when[sectors] < self._now - KEPT)
        self._block[sectors], self._when[sectors] = blocks, self._now
        if new.any():
            keys = (blocks * len(self.touched) + sectors)[new]
            if (keys[1:] < keys[:-1]).any():
                keys = np.sort(keys)
            self.asked += 1 + int(np.count_nonzero(keys[1:] != keys[:-1]))

    @property
    def bytes(self) -> int:
        return SECTOR * (self.asked + int((self.touched & ~self.of_streams).sum()))
