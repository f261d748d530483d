"""A line of the K,V cache, which is one position of one head, as int8: d codes and the bytes of their float32 scale.

scale = max |x| / 127, code = round(x * 127 / max |x|), half to even. A NaN or an infinity in x makes the scale NaN and
every code 0, so that it shows wherever the line is read. The scale lies right behind the codes, at no alignment: one
stretch of memory a line, and a cache [B, G, S, d + 4] that is cut and strided like any other. A cache of floats has
lines [d] as they are; `kept_as` and `read` are for whoever takes both. csrc/cpu/kv_line.h does the same natively.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
# In every byte of a line: a scale that is NaN. What no step has written can be marked so.
POISON = -1
# Below this (so do numbers of 127 / x that float32 has not) a line is as good as zero, and its codes are.
SMALLEST = 1e-36


def width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a line of a cache of that dtype."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def encode(values: Tensor) -> Tensor:
    """values [..., d] to lines int8 [..., d + 4]."""
    largest = values.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    inverse = torch.where(finite & (largest >= SMALLEST), 127 / largest, 0.0)
    codes = torch.round(torch.where(finite, values, 0.0) * inverse).to(torch.int8)
    scales = torch.where(finite, largest / 127, torch.nan).to(torch.float32)
    return torch.cat([codes, scales.contiguous().view(torch.int8)], dim=-1)


def parts(lines: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., d], a view, and scales float32 [..., 1] of lines int8 [..., d + 4]."""
    # A copy even of what is contiguous: it may begin where no float32 may.
    scales = lines[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
    return lines[..., :-SCALE_BYTES], scales.view(torch.float32)


def decode(lines: Tensor) -> Tensor:
    """Lines int8 [..., d + 4] to float32 [..., d]."""
    codes, scales = parts(lines)
    return codes.float().mul_(scales)


def kept_as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values [..., d] as lines of a cache of that dtype."""
    return encode(values) if dtype == torch.int8 else values.to(dtype)


def read(lines: Tensor) -> Tensor:
    """What lines stand for: float32 [..., d]."""
    return decode(lines) if lines.dtype == torch.int8 else lines.float()
