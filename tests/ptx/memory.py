"""Global memory: the bytes of registered tensors at their own addresses, and nothing else.

Tensors lie in this process's memory, and a kernel gets their real addresses: tables of addresses work, results need
no copying back, alignment is what it is. Every access is held against what was registered before it is made, element
by element: the gap between two rows of a matrix is out of bounds.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
from torch import Tensor

from ptx.errors import OutOfBounds

_LOWEST = 4096  # the first page belongs to nobody


@cache
def _process_memory() -> np.ndarray:
    """All that can be addressed, as bytes from _LOWEST on. Touch only what is registered."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * (2**47 - 2 * _LOWEST)).from_address(_LOWEST))


@cache
def _typed(dtype: str) -> np.ndarray:
    return _process_memory().view(dtype)


def runs(tensor: Tensor) -> list[tuple[int, int]]:
    """(first address, end) of each stretch of bytes without a gap."""
    if tensor.numel() == 0:
        return []
    inner, dims = 1, tensor.dim()
    while dims and (tensor.shape[dims - 1] == 1 or tensor.stride(dims - 1) == inner):
        dims -= 1
        inner *= tensor.shape[dims]
    starts = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape[:dims], tensor.stride()[:dims], strict=True):
        starts = (starts[:, None] + np.arange(size) * stride).reshape(-1)
    item = tensor.element_size()
    return [
        (tensor.data_ptr() + item * int(at), tensor.data_ptr() + item * (int(at) + inner)) for at in starts
    ]


class Memory:
    """tensors: all that a launch may touch, by name. Those that lie side by side become one stretch."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors  # keeps them alive
        found = sorted(run for tensor in tensors.values() for run in runs(tensor))
        stretches: list[list[int]] = []
        for begin, end in found:
            if stretches and begin <= stretches[-1][1]:
                stretches[-1][1] = max(end, stretches[-1][1])
            else:
                stretches.append([begin, end])
        self.begins = np.array([begin for begin, _ in stretches], np.int64)
        self.ends = np.array([end for _, end in stretches], np.int64)
        # Stretches numbered through, each from a multiple of 64, so that sectors are those of the real addresses.
        sizes = (self.ends + 63) // 64 * 64 - self.begins // 64 * 64
        self.moved = np.concatenate([[0], np.cumsum(sizes)])[:-1] - self.begins // 64 * 64
        self.size = int(sizes.sum())  # of the numbering

    def locate(self, addresses: np.ndarray, size: int, what) -> np.ndarray:
        """For each address (int64, at least one) its number, 0 .. self.size - 1; OutOfBounds if `size` bytes from
        there are not all registered."""
        if len(self.begins):
            first, last = np.searchsorted(self.begins, (addresses.min(), addresses.max()), side="right") - 1
            if first == last and first >= 0 and addresses.max() + size <= self.ends[first]:
                return addresses + self.moved[first]
            each = np.searchsorted(self.begins, addresses, side="right") - 1
            bad = (each < 0) | (addresses + size > self.ends[each])
            if not bad.any():
                return addresses + self.moved[each]
            addresses = addresses[bad]
        raise OutOfBounds(f"{size} bytes at {self.describe(int(addresses[0]))}: {what}")

    def numbers(self, tensor: Tensor) -> list[tuple[int, int]]:
        """(first number, end) of each stretch of a registered tensor's bytes."""
        found = []
        for begin, end in runs(tensor):
            first = int(self.locate(np.array([begin]), end - begin, "a tensor")[0])
            found.append((first, first + end - begin))
        return found

    def describe(self, address: int) -> str:
        """The address in terms of the nearest tensor."""
        distance = {
            name: min(
                (max(begin - address, address - end + 1, 0) for begin, end in runs(tensor)), default=2**62
            )
            for name, tensor in self.tensors.items()
        }
        if not distance:
            return f"{address:#x}, with no tensor registered"
        name = min(distance, key=distance.get)
        return f"{address:#x}, {name} + {address - self.tensors[name].data_ptr()}"

    @staticmethod
    def read(addresses: np.ndarray, size: int) -> np.ndarray:
        """`size` bytes (1, 2, 4, 8 or 16, to which the addresses are aligned) from each, uint8 [len, size]. They must
        have been located."""
        values = _typed({1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}[size])[(addresses - _LOWEST) // size]
        return values.view(np.uint8).reshape(-1, size)

    @staticmethod
    def write(addresses: np.ndarray, values: np.ndarray) -> None:
        """values: uint8 [len, size], as `read` gives them."""
        size = values.shape[1]
        kind = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}[size]
        _typed(kind)[(addresses - _LOWEST) // size] = np.ascontiguousarray(values).view(kind)[:, 0]
