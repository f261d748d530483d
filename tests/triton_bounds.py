"""How far the Triton kernels may be from kernels/reference.py: native_ops.bounds, and tensor cores' rounding on top."""

import native_ops
import torch

from d3rt.kernels.cases import Case
from d3rt.kernels.packing import PackedMatrix
from d3rt.kernels.reference import FillLayer


def allowed(case: Case, arch: int) -> dict[str, torch.Tensor]:
    """native_ops.bounds, or rounded_bounds where tensor cores multiply."""
    rounds = case.op == "attention" and arch >= 80 and case.dtype != torch.float32
    return native_ops.rounded_bounds(case, case.dtype) if rounds else native_ops.bounds(case)


def widened(arguments: dict) -> dict:
    """The arguments with float32 matrices in place of packed ones: what these kernels multiply by (weight-only)."""

    def plain(value):
        if isinstance(value, list):
            return [FillLayer(*map(plain, layer)) for layer in value]
        return value.dequantize() if isinstance(value, PackedMatrix) else value

    return {name: plain(value) for name, value in arguments.items()}
