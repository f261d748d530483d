"""Packing matrices to int8 and int4 with the native packer, for every backend whose source lies in host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d3rt.backends.native import native
from d3rt.kernels.packing import PackedMatrix
from d3rt.quantize import empty_packed, pack_in_slabs

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def native_pack(pool: Any, weight: Tensor, format: str) -> PackedMatrix:
    """weight [rows, cols] as int8 or int4, on the threads of a _C.ThreadPool. What the native packer does not read
    (other dtypes, strides, devices) is packed by the definition; the bits are the same."""
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or weight.stride(1) != 1:
        return pack_in_slabs(weight, format)
    packed = empty_packed(format, *weight.shape)
    native().pack(pool, packed, weight)
    return packed
