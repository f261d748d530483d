"""PackedMatrix: a weight matrix kept as int8 or int4 in groups of 32, in the layout that the kernels stream.

The layout is one for all processors. Rows are cut into tiles of 16, columns into groups of 32 with a float16 scale a
row. Inside a group, four neighbouring columns of a row make a 32-bit word, and the words of a tile's rows lie side by
side; so a kernel multiplies the same columns of 16 (8, 4) rows at once and never sums across lanes.

int8: w = q * scale, q in -127..127.             data int8  [tiles, groups, 8, 16, 4]
int4: w = (q - 8) * scale, q in 0..15, or         data uint8 [tiles, groups, 4, 16, 4]; low nibbles hold words 0..3 of
      w = q * scale + minimum.                    a row's group, high nibbles words 4..7

Products with a packed matrix quantise the activations too (`quantise_activations`); reference.py's `linear` says how.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 16
GROUP = 32
FORMATS = ("int8", "int4")


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A weight [rows, cols]. scales and minima: float16 [tiles, groups, 16]; minima None means symmetric."""

    format: str
    rows: int
    cols: int
    data: Tensor
    scales: Tensor
    minima: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.cols)

    @property
    def nbytes(self) -> int:
        """Bytes of data, scales and minima."""
        parts = (self.data, self.scales, self.minima)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def codes(self) -> Tensor:
        """The integers [rows, cols], as int16: int4 codes with their 8 taken off where there are no minima."""
        if self.format == "int8":
            words = self.data.to(torch.int16)
        else:
            words = torch.cat([self.data & 15, self.data >> 4], dim=2).to(torch.int16)
            words = words if self.minima is not None else words - 8
        tiles, groups = words.shape[:2]
        return words.permute(0, 3, 1, 2, 4).reshape(tiles * TILE_ROWS, groups * GROUP)[: self.rows]

    def group_scales(self) -> Tensor:
        """float32 [rows, groups]"""
        return _by_row(self.scales)[: self.rows]

    def group_minima(self) -> Tensor | None:
        """float32 [rows, groups], or None"""
        return None if self.minima is None else _by_row(self.minima)[: self.rows]

    def take(self, rows: Tensor) -> Tensor:
        """Some rows [N, cols] as float32, without unpacking the others; rows int64 [N]."""
        tile, lane = rows // TILE_ROWS, rows % TILE_ROWS
        codes = self.data[tile, :, :, lane]  # [N, groups, words, 4]; no shape depends on what `rows` holds
        if self.format == "int4":
            codes = torch.cat([codes & 15, codes >> 4], dim=2)
        groups = codes.flatten(2).float()  # [N, groups, 32]
        if self.minima is not None:
            return (
                groups.mul_(self.scales[tile, :, lane, None])
                .add_(self.minima[tile, :, lane, None])
                .flatten(1)
            )
        if self.format == "int4":
            groups -= 8
        return groups.mul_(self.scales[tile, :, lane, None]).flatten(1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [rows, cols] as floats."""
        groups = self.codes().view(self.rows, -1, GROUP).float() * self.group_scales()[..., None]
        if self.minima is not None:
            groups += self.group_minima()[..., None]
        return groups.view(self.rows, self.cols).to(dtype)


def _by_row(values: Tensor) -> Tensor:
    return values.float().transpose(1, 2).reshape(-1, values.shape[1])


def _tiled(values: Tensor) -> Tensor:
    """[rows, groups] to float16 [tiles, groups, 16], zero in the rows that fill the last tile up."""
    padded = _pad_rows(values.to(torch.float16))
    return padded.view(-1, TILE_ROWS, padded.shape[1]).transpose(1, 2).contiguous()


def _pad_rows(values: Tensor) -> Tensor:
    missing = -len(values) % TILE_ROWS
    return torch.nn.functional.pad(values, (0, 0) * (values.dim() - 1) + (0, missing)) if missing else values


def pack_codes(format: str, codes: Tensor, scales: Tensor, minima: Tensor | None = None) -> PackedMatrix:
    """Packs given integers without changing them. codes [rows, cols]: int8 in -127..127, or int4 as 0..15; scales and
    minima [rows, cols / 32]."""
    rows, cols = codes.shape
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: choose one of {', '.join(FORMATS)}.")
    if cols % GROUP:
        raise ValueError(f"a matrix of {cols} columns cannot be packed: they must be a multiple of {GROUP}.")
    kept = torch.int8 if format == "int8" else torch.uint8
    words = _pad_rows(codes.to(kept)).view(-1, TILE_ROWS, cols // GROUP, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if format == "int4":
        words = words[:, :, :4] | words[:, :, 4:] << 4
    return PackedMatrix(
        format,
        rows,
        cols,
        words.contiguous(),
        _tiled(scales),
        None if minima is None else _tiled(minima),
    )


# Shares of the plain int4 scale that are tried: cutting the largest weight a little often pays for all the others.
INT4_SCALE_SHARES = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75)


def pack(weight: Tensor, format: str) -> PackedMatrix:
    """Quantises weight [rows, cols] symmetrically in groups of 32.

    int8: scale = max |w| / 127, as GGUF's Q8_0. int4: the value of largest magnitude takes code 0, scale = w / -8, as
    in GGUF's Q4_0, times that share of INT4_SCALE_SHARES which leaves the least squared error in the group. The scale
    is rounded to float16 before the codes are, so that codes fit the kept scale.
    """
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    if format == "int8":
        codes, scales = _rounded(groups, groups.abs().amax(-1) / 127, 0, -127, 127)
        return pack_codes(format, codes.view(weight.shape), scales)
    plain = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
    best = None
    for share in INT4_SCALE_SHARES:
        codes, scales = _rounded(groups, plain * share, 8, 0, 15)
        error = ((codes - 8) * scales.float()[..., None] - groups).square().sum(-1)
        if best is None:
            best = codes, scales, error
            continue
        better = error < best[2]
        best = (
            torch.where(better[..., None], codes, best[0]),
            torch.where(better, scales, best[1]),
            torch.where(better, error, best[2]),
        )
    return pack_codes(format, best[0].view(weight.shape), best[1])


def _rounded(groups: Tensor, scales: Tensor, zero: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes float32 of groups [rows, groups, 32] at these scales, and the scales as they are kept."""
    kept = scales.to(torch.float16)
    inverse = torch.where(kept == 0, 0.0, 1.0 / kept.float())
    return torch.round(groups * inverse[..., None] + zero).clamp(low, high), kept


def quantise_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] float32 to (codes float32 [..., K] with whole values in -127..127, scales [..., K / 32])."""
    groups = x.unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    scales = largest / 127
    inverse = torch.where(largest == 0, 0.0, 127 / largest)
    return torch.round(groups * inverse[..., None]).flatten(-2), scales
