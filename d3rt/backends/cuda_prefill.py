"""The prefill's products and attention on a GPU: torch's and flash-attn's. It runs on any device that torch has, so the
tests can do without a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from d3rt.backends.base import causal_attention, typed_linear
from d3rt.kernels.packing import TILE_ROWS, PackedMatrix

# A packed matrix is unpacked some rows at a time: so many values at once, a few tens of MB on the way.
SLAB_VALUES = 1 << 22
UNPACKED_BYTES = 2  # of each value of it
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
FLASH_MOST_HEAD_DIM = 256  # longer heads flash-attn 2 refuses


def flash_attention(arch: int) -> Callable | None:
    """flash-attn's function, where it is installed, loads, and has code for the architecture."""
    if arch < 80:
        return None
    try:
        from flash_attn import flash_attn_func
    except (
        ImportError,
        OSError,
        RuntimeError,
    ):  # it is built for one torch, and does not load beside another
        return None
    return flash_attn_func


class CudaPrefill:
    """Of an architecture. flash: flash_attn_func or None."""

    def __init__(self, arch: int, flash: Callable | None):
        self._flash = flash
        # Of 16-bit products, only those in bfloat16 cannot overflow; sm_70 and sm_75 have no such units.
        self._unpacked = torch.bfloat16 if arch >= 80 else torch.float16
        self._bytes: Tensor | None = None

    def linear(self, x: Tensor, w: Tensor | PackedMatrix) -> Tensor:
        """x [T, K] float32 times w [N, K]^T in w's dtype; a packed w is unpacked on the device. float32 [T, N]."""
        return typed_linear(x, self._dense(w) if isinstance(w, PackedMatrix) else w)

    def linear_bytes(self, w: Tensor | PackedMatrix) -> int:
        return UNPACKED_BYTES * w.rows * w.cols if isinstance(w, PackedMatrix) else 0

    def _dense(self, w: PackedMatrix) -> Tensor:
        """w as floats, in memory that the next call takes again."""
        size = math.prod(w.shape) * self._unpacked.itemsize
        if self._bytes is None or self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8, device=w.data.device)
        dense = self._bytes[:size].view(self._unpacked).view(w.shape)
        at = 0
        for slab in _slabs(w):
            dense[at : at + slab.rows] = slab.dequantize()
            at += slab.rows
        return dense

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
        """base.causal_attention, by flash-attn where it is there and takes the cache's type and the heads."""
        fits = keys.dtype in SIXTEEN_BITS and keys.shape[2] <= FLASH_MOST_HEAD_DIM
        if self._flash is not None and fits:
            lines = (kept.transpose(0, 1).unsqueeze(0) for kept in (keys, values))  # [1, T', G, d]
            out = self._flash(
                q.unsqueeze(0).to(keys.dtype),
                *lines,
                softmax_scale=scale,
                causal=True,
                window_size=(window - 1, 0) if window else (-1, -1),
            )
            return out.squeeze(0).float()
        # Of SDPA's kernels the memory-efficient one, the only one for masks and for sm_70 that keeps no scores, wants
        # as many heads of K,V as of queries.
        shared_by = q.shape[1] // keys.shape[0]
        return causal_attention(
            q, *(kept.repeat_interleave(shared_by, dim=0) for kept in (keys, values)), scale, window
        )


def _slabs(w: PackedMatrix) -> Iterator[PackedMatrix]:
    """w as matrices of fewer rows."""
    step = max(SLAB_VALUES // w.cols // TILE_ROWS, 1)
    for tile in range(0, len(w.data), step):
        part = slice(tile, tile + step)
        rows = min(w.rows - tile * TILE_ROWS, step * TILE_ROWS)
        minima = None if w.minima is None else w.minima[part]
        yield PackedMatrix(w.format, rows, w.cols, w.data[part], w.scales[part], minima)
