"""Weight widths: how `compile(weights=...)` turns a model's matrices into what the kernels stream.

A width is a dtype (float32, bfloat16, float16: shared with the model where it already has it) or a packed format
(int8, int4: groups of 32, d3rt.kernels.packing); that of the K,V cache is a dtype, or int8 (d3rt.kernels.kv_line).
Matrices are converted one by one, and packed some rows at a time, so that no second full copy ever exists beside the
model's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d3rt.errors import UnsupportedModelError, UnsupportedOptionError
from d3rt.kernels.packing import FORMATS, GROUP, TILE_ROWS, PackedMatrix, pack

Matrix = Tensor | PackedMatrix
Width = str | torch.dtype  # a dtype, "int8" or "int4"
Pack = Callable[
    [Tensor, str], PackedMatrix
]  # a matrix and the format: what d3rt.kernels.packing.pack makes of it

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


WIDTHS = (*DTYPES, *FORMATS)
KV_CACHE_WIDTHS = (*DTYPES, "int8")

# Packing works on float copies of what it packs: so many values at once, a few MB whatever the matrix.
SLAB_VALUES = 1 << 18


def parse_width(name: str, width: Width, choices: Sequence[str] = WIDTHS) -> str | torch.dtype:
    """A dtype, or a format among the choices; UnsupportedOptionError names the argument and the choices."""
    if width in FORMATS and width in choices:
        return width
    dtype = DTYPES.get(width) if isinstance(width, str) else width
    if dtype not in DTYPES.values():
        instead = f"; for weights, pass weights={width!r}" if name == "dtype" and width in FORMATS else ""
        raise UnsupportedOptionError(f"{name}={width!r}: choose one of {', '.join(choices)}{instead}.")
    return dtype


@dataclass(frozen=True)
class Widths:
    """The width of each kind of memory; None where it is yet to follow from the model."""

    weights: Width | None
    lm_head: Width | None
    kv_cache: Width | None
    load_dtype: torch.dtype | None  # to load a checkpoint in

    @classmethod
    def parse(cls, dtype, weights, lm_head, kv_cache_dtype) -> Widths:
        """From compile's arguments; UnsupportedOptionError names the one that is wrong."""
        given = {"dtype": dtype, "weights": weights, "lm_head": lm_head, "kv_cache_dtype": kv_cache_dtype}
        choices = {"dtype": tuple(DTYPES), "kv_cache_dtype": KV_CACHE_WIDTHS}
        parsed = {
            name: None if value is None else parse_width(name, value, choices.get(name, WIDTHS))
            for name, value in given.items()
        }
        width = parsed["weights"] or parsed["dtype"]
        return cls(
            weights=width,
            lm_head=parsed["lm_head"] or ("int8" if width == "int4" else width),
            kv_cache=parsed["kv_cache_dtype"]
            or parsed["dtype"]
            or (torch.bfloat16 if width in FORMATS else width),
            load_dtype=width if isinstance(width, torch.dtype) else None,
        )

    def of_model(self, dtype: torch.dtype) -> Widths:
        """What is still open is as the model has it; UnsupportedOptionError if that is no dtype of ours."""
        if None in (self.weights, self.lm_head, self.kv_cache):
            dtype = parse_width("the model's dtype", dtype)
        return Widths(self.weights or dtype, self.lm_head or dtype, self.kv_cache or dtype, self.load_dtype)

    @property
    def kv_cache_dtype(self) -> torch.dtype:
        """What the cache's tensors are made of."""
        return torch.int8 if self.kv_cache == "int8" else self.kv_cache

    @property
    def any_packed(self) -> bool:
        return self.weights in FORMATS or self.lm_head in FORMATS

    def __str__(self) -> str:
        names = [str(width).removeprefix("torch.") for width in (self.weights, self.lm_head, self.kv_cache)]
        return f"{names[0]} (lm_head {names[1]}, K,V {names[2]})"


def pack_in_slabs(weight: Tensor, format: str) -> PackedMatrix:
    """`pack`, some tiles of rows at a time: the same bits, without float copies of the whole matrix."""
    rows, cols = weight.shape
    whole = empty_packed(format, rows, cols)
    step = max(SLAB_VALUES // cols // TILE_ROWS, 1) * TILE_ROWS
    for start in range(0, rows, step):
        slab = pack(weight[start : start + step], format)
        at = slice(start // TILE_ROWS, start // TILE_ROWS + len(slab.data))
        for part, made in zip(tensors_of(whole), tensors_of(slab), strict=True):
            part[at] = made
    return whole


def convert(name: str, weight: Matrix, width: Width, pack: Pack = pack_in_slabs) -> Matrix:
    """The matrix `weight` [rows, cols] in this width: the very same where it has it already. A backend may `pack`
    faster.

    UnsupportedModelError, with its name, for a matrix that cannot be packed.
    """
    if isinstance(weight, PackedMatrix):
        return weight if weight.format == width else convert(name, weight.dequantize(), width, pack)
    if isinstance(width, torch.dtype):
        return weight.detach().to(width).contiguous()
    check_columns(name, weight.shape, width)
    return pack(weight.detach(), width)


def check_columns(name: str, shape: Sequence[int], width: Width) -> None:
    """UnsupportedModelError for a matrix of that shape [rows, cols] which cannot have this width."""
    if width in FORMATS and shape[1] % GROUP:
        raise UnsupportedModelError(
            f"weights={width!r}: {name} has {shape[1]} columns, and packed weights need a multiple of {GROUP}; "
            "choose bf16."
        )


def packed_parts(format: str, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a PackedMatrix of this size has, or may have: minima."""
    groups = (-(-rows // TILE_ROWS), cols // GROUP)
    words, code = (GROUP // 4, torch.int8) if format == "int8" else (GROUP // 8, torch.uint8)
    return {
        "data": ((*groups, words, TILE_ROWS, 4), code),
        "scales": ((*groups, TILE_ROWS), torch.float16),
        "minima": ((*groups, TILE_ROWS), torch.float16),
    }


def empty_packed(format: str, rows: int, cols: int) -> PackedMatrix:
    """Memory for what `pack` makes of a matrix of this size. What stays is allocated before what goes: made while a
    matrix is packed, it would keep the memory of what goes from being given back."""
    parts = {
        name: torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in packed_parts(format, rows, cols).items()
        if name != "minima" or format == "int4"
    }
    return PackedMatrix(format, rows, cols, **parts)


def width_bytes(shape: Sequence[int], width: Width) -> int:
    """Bytes of a parameter of that shape in that width; of an int4 one with minima, which it may have."""
    if isinstance(width, torch.dtype):
        return math.prod(shape) * width.itemsize
    parts = packed_parts(width, *shape)
    return sum(
        math.prod(size) * dtype.itemsize
        for name, (size, dtype) in parts.items()
        if name != "minima" or width == "int4"
    )


def on_device(matrix: Matrix, device: torch.device) -> Matrix:
    """The matrix there: the very same where it is there already."""
    if not isinstance(matrix, PackedMatrix):
        return matrix.to(device)
    if matrix.data.device == device:
        return matrix
    parts = {name: getattr(matrix, name) for name in ("data", "scales", "minima")}
    return replace(matrix, **{name: part.to(device) for name, part in parts.items() if part is not None})


def tensors_of(matrix: Matrix) -> list[Tensor]:
    """The tensors that hold it."""
    if not isinstance(matrix, PackedMatrix):
        return [matrix]
    return [part for part in (matrix.data, matrix.scales, matrix.minima) if part is not None]
