"""How far the Triton kernels may be from kernels/reference.py: native_ops.bounds, and tensor cores' rounding on top."""

import native_ops
import torch

from d3rt.kernels import cases
from d3rt.kernels.cases import Case
from d3rt.kernels.packing import PackedMatrix
from d3rt.kernels.reference import FillLayer


def rounded_attention(case: Case, arguments: dict) -> torch.Tensor:
    """Attention by its definition in float64, but for q and the softmax's weights, which a tensor core wants in 16
    bits."""
    q, out = arguments["q"].to(case.dtype).double(), torch.zeros_like(arguments["q"]).double()
    group = case.H // case.G
    for slot, last in enumerate(case.pos):
        first = max(0, last + 1 - case.window) if case.window else 0
        k, v = (
            arguments[name][slot, :, first : last + 1].double().repeat_interleave(group, dim=0)
            for name in ("k_cache", "v_cache")
        )
        scores = torch.einsum("hd,htd->ht", q[slot], k) * arguments["scale"]
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        sums = torch.einsum("ht,htd->hd", weights.to(case.dtype).double(), v)
        out[slot] = sums / weights.sum(-1, keepdim=True)
    return out


def allowed(case: Case, arch: int) -> dict[str, torch.Tensor]:
    """native_ops.bounds; on tensor cores twice the error that their rounding alone makes on the same numbers comes on
    top, and one rounding of the largest value, where that is 0 by luck."""
    bounds = native_ops.bounds(case)
    if case.op != "attention" or arch < 80 or case.dtype == torch.float32:
        return bounds
    right = native_ops.exact(case)["out"]
    error = (rounded_attention(case, cases.make(case)) - right).abs().max()
    rounding = native_ops.ROUNDING[case.dtype] * right.abs().max()
    return {"out": bounds["out"] + 2 * error + rounding}


def widened(arguments: dict) -> dict:
    """The arguments with float32 matrices in place of packed ones: what these kernels multiply by (weight-only)."""

    def plain(value):
        if isinstance(value, list):
            return [FillLayer(*map(plain, layer)) for layer in value]
        return value.dequantize() if isinstance(value, PackedMatrix) else value

    return {name: plain(value) for name, value in arguments.items()}
