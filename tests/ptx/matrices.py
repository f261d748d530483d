"""What the threads of a warp do together with 8x8 matrices: ldmatrix, stmatrix, mma.

Thread t of a warp holds, of each 8x8 matrix of 16-bit elements, row t / 4, columns 2 (t % 4) and the next, in one
register (PTX ISA, "Matrix Fragments for mma.m16n8k16"). `lanes` below are [warps, 32].
"""

from __future__ import annotations

import numpy as np

from ptx.arithmetic import widen_bfloat16, widen_float16

_ROW, _COLUMN = np.arange(32) // 4, 2 * (np.arange(32) % 4)


def fragments(matrices: np.ndarray) -> np.ndarray:
    """uint16 [warps, 8, 8] to one register of each lane, uint32 [warps, 32]."""
    low, high = matrices[:, _ROW, _COLUMN], matrices[:, _ROW, _COLUMN + 1]
    return low.astype(np.uint32) | (high.astype(np.uint32) << 16)


def matrices(lanes: np.ndarray) -> np.ndarray:
    """The inverse of fragments."""
    out = np.zeros((len(lanes), 8, 8), np.uint16)
    out[:, _ROW, _COLUMN], out[:, _ROW, _COLUMN + 1] = lanes & 0xFFFF, lanes >> 16
    return out


def multiply_add(a: list, b: list, c: list, kind: str) -> list[np.ndarray]:
    """mma.m16n8k16: D = A B + C. a: 4 registers [warps, 32] of A's quarters, upper left, lower left, upper right, lower
    right; b: 2 of B's upper and lower half (its rows are their columns); c: 4 registers of float32, two columns of the
    upper half, then of the lower. kind: "f16" or "bf16". Summed in float64, rounded once."""

    def values(register):
        widened = (widen_float16 if kind == "f16" else widen_bfloat16)(matrices(register).reshape(-1))
        return widened.reshape(-1, 8, 8).astype(np.float64)

    upper_left, lower_left, upper_right, lower_right = map(values, a)
    left = np.concatenate(
        [np.concatenate([upper_left, lower_left], 1), np.concatenate([upper_right, lower_right], 1)], 2
    )
    right = np.concatenate([values(register) for register in b], 2).transpose(0, 2, 1)
    total = np.matmul(left, right)
    places = [(_ROW, _COLUMN), (_ROW, _COLUMN + 1), (_ROW + 8, _COLUMN), (_ROW + 8, _COLUMN + 1)]
    return [
        (total[:, row, column] + register.view(np.float32)).astype(np.float32)
        for register, (row, column) in zip(c, places, strict=True)
    ]
