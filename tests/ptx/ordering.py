"""Which accesses to the same bytes are ordered, and Race for those that are not.

Within a block a barrier orders what came before it, in all warps, with what comes after. Between blocks only atomics
do: one with release says that everything before the block's last barrier is done, one with acquire on the same counter,
later, makes that known to its block from its next barrier on. A warp is in order with itself.

Each block counts its barriers: its epoch. For every 2 bytes stands here the last write and the last reads, each as warp
and epoch.
"""

from __future__ import annotations

import numpy as np

from ptx.errors import Race

GRANULE = 2  # bytes
_NOBODY = -1
_IN_FLIGHT = -2  # a writer: an asynchronous copy that was not waited for
_SEVERAL_BLOCKS = -3  # readers
_WARPS_OF_BLOCK = -4  # readers: several warps of block b are _WARPS_OF_BLOCK - b


class Clock:
    """What each block of a launch knows of the others' progress."""

    def __init__(self, blocks: int):
        self.epoch = np.zeros(blocks, np.int64)
        self.known = np.zeros(
            (blocks, blocks), np.int64
        )  # [b, o]: what o did before this epoch is done, says b
        self._heard = np.zeros((blocks, blocks), np.int64)  # the same, from the next barrier on
        self._told: dict[int, np.ndarray] = {}  # by counter: what has been released to it

    def barrier(self, blocks: np.ndarray) -> None:
        self.epoch[blocks] += 1
        self.known[blocks] = np.maximum(self.known[blocks], self._heard[blocks])

    def atomic(self, block: int, counter: int, acquire: bool, release: bool) -> None:
        told = self._told.setdefault(counter, np.zeros(len(self.epoch), np.int64))
        if acquire:
            self._heard[block] = np.maximum(self._heard[block], told)
        if release:
            np.maximum(told, self.known[block], out=told)
            told[block] = self.epoch[block]


class Accesses:
    """The last accesses to `size` bytes of memory."""

    def __init__(self, size: int, clock: Clock, warps: int, space: str):
        """warps: of a block."""
        granules = -(-size // GRANULE) + 16 // GRANULE
        self.clock, self.warps, self.space = clock, warps, space
        self.writer = np.full(granules, _NOBODY, np.int32)
        self.written = np.zeros(granules, np.int32)  # its epoch
        self.reader = np.full(granules, _NOBODY, np.int32)
        self.readed = np.zeros(granules, np.int32)

    def _ordered(self, warp, block, other, epoch) -> np.ndarray:
        """Whether what warp `other` did in `epoch` comes before what `warp` of `block` does now."""
        several = other <= _WARPS_OF_BLOCK
        its_block = np.where(several, _WARPS_OF_BLOCK - other, other // self.warps)
        clock = self.clock
        reached = np.where(
            its_block == block,
            clock.epoch[block],
            clock.known[block, np.clip(its_block, 0, len(clock.epoch) - 1)],
        )
        return (other == _NOBODY) | (other == warp) | (((other >= 0) | several) & (epoch < reached))

    def _at(self, offsets, size, warp):
        granules = offsets[:, None] // GRANULE + np.arange(-(-size // GRANULE))
        warps = np.broadcast_to(warp[:, None], granules.shape).reshape(-1)
        return granules.reshape(-1), warps, warps // self.warps

    def _refuse(self, ordered, warp, other, kind: str, what) -> None:
        if not ordered.all():
            at = int(np.argmin(ordered))
            who = "a copy in flight" if other[at] == _IN_FLIGHT else f"of warp {other[at]}"
            raise Race(f"{self.space} memory, {kind} by warp {warp[at]}, {who}: {what}")

    def read(self, offsets: np.ndarray, size: int, warp: np.ndarray, what) -> None:
        """Warp `warp` (counted through all blocks) reads `size` bytes from each offset."""
        at, warp, block = self._at(offsets, size, warp)
        writer = self.writer[at]
        if (writer != _NOBODY).any():
            ordered = self._ordered(warp, block, writer, self.written[at])
            self._refuse(ordered, warp, writer, "read after unordered write", what)
        epoch, before = self.clock.epoch[block], self.reader[at]
        of_block = np.where(before <= _WARPS_OF_BLOCK, _WARPS_OF_BLOCK - before, before // self.warps)
        alone = (before == _NOBODY) | (before == warp) | ((of_block == block) & (self.readed[at] < epoch))
        together = np.where(of_block == block, _WARPS_OF_BLOCK - block, _SEVERAL_BLOCKS)
        together = np.where(before == _SEVERAL_BLOCKS, _SEVERAL_BLOCKS, together)
        self.reader[at] = np.where(alone, warp, together)
        # Lanes of several warps at once: that leaves one of them here, so now the others are told, blocks last.
        now = self.reader[at]
        others = (now >= 0) & (now != warp)
        if others.any():
            same = now // self.warps == block
            within, beyond = others & same, others & ~same
            self.reader[at[within]] = _WARPS_OF_BLOCK - block[within]
            self.reader[at[beyond]] = _SEVERAL_BLOCKS
        self.readed[at] = epoch

    def write(self, offsets: np.ndarray, size: int, warp: np.ndarray, what, in_flight=False) -> None:
        """in_flight: the bytes are on their way and nobody may touch them until `arrive`."""
        at, warp, block = self._at(offsets, size, warp)
        for others, epochs, kind in (
            (self.writer[at], self.written[at], "write after unordered write"),
            (self.reader[at], self.readed[at], "write after unordered read"),
        ):
            self._refuse(self._ordered(warp, block, others, epochs), warp, others, kind, what)
        self.writer[at] = _IN_FLIGHT if in_flight else warp
        self.written[at] = self.clock.epoch[block]

    def arrive(self, offsets: np.ndarray, size: int, warp: np.ndarray) -> None:
        at, warp, block = self._at(offsets, size, warp)
        self.writer[at], self.written[at] = warp, self.clock.epoch[block]
