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
from itertools import product

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


# Shares of a group's range that are cut off at one end before int4's scale and minimum are fitted: clamping a few
# outliers often pays for all the others. Every pair of a lower and an upper cut is tried.
INT4_CUTS = (0.0, 0.05, 0.1)


# int8 codes that the largest value of a group may get, from the first on. A coarser scale costs little where values
# are spread evenly, and where they lie on a grid, as those of a 4-bit file do, one of these nearly hits it.
INT8_STEPS = range(127, 88, -2)


def pack(weight: Tensor, format: str) -> PackedMatrix:
    """Quantises weight [rows, cols], of any float dtype and finite, in groups of 32.

    int8: scale = max |w| / 127, as GGUF's Q8_0, unless one of max |w| / INT8_STEPS leaves a smaller squared error in
    the group: so what a Q8_0 file holds comes out as it was. int4: minimum = min w, scale = (max w - min w) / 15, as
    GGUF's Q4_1, unless another pair leaves a smaller squared error in the group: the least-squares pair of the codes
    that follow from a range cut as in INT4_CUTS. So 16 equally spaced values, which an int4 file may hold, come out as
    they were.
    Scales and minima are rounded to float16 before the codes are chosen, so that codes fit what is kept. A smaller
    error need not be a smaller perplexity: README, "Perplexity by width".

    This is float32 arithmetic, one rounding an operation, sums in the order of columns: csrc/pack.cpp gives the same
    bits.
    """
    rows, cols = weight.shape
    values = weight.float().reshape(rows, -1, GROUP).permute(2, 0, 1).contiguous()
    if format == "int8":
        codes, scales = _scaled(values)
        return pack_codes(format, codes.permute(1, 2, 0).reshape(rows, cols), scales)
    codes, scales, minima = _fitted(values)
    return pack_codes(format, codes.permute(1, 2, 0).reshape(rows, cols), scales, minima)


def _scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [32, rows, groups] of values of that shape, and scales [rows, groups]; all float32."""
    largest, best = values.abs().amax(0), None
    for steps in INT8_STEPS:
        scales = _half(largest / steps)
        codes = (values * _inverse(scales)).round().clamp(-127, 127)
        error = _sum((codes * scales - values).square())
        if best is None:
            best = codes, scales, error
        better = error < best[2]
        best = tuple(
            torch.where(better, ours, theirs)
            for ours, theirs in zip((codes, scales, error), best, strict=True)
        )
    return best[:2]


def _fitted(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int4 codes [32, rows, groups] of values of that shape, and scales and minima [rows, groups]; all float32."""
    low, high = (
        values.amin(0) + 0.0,
        values.amax(0),
    )  # + 0.0: no minimum is -0, which some would find and some not
    width, above = high - low, values - low
    scales, minima = _half(width / 15), _half(low)
    codes = _codes(values, scales, minima)
    best = codes, scales, minima, _error(values, codes, scales, minima)
    for lower, upper in product(INT4_CUTS, INT4_CUTS):
        bottom = low + width * lower
        codes = _codes(values, _half((high - width * upper - bottom) / 15), _half(bottom))
        # scale and minimum by least squares: the normal equations of above = code * scale + (minimum - low)
        n, nn, a, na = _sum(codes), _sum(codes * codes), _sum(above), _sum(codes * above)
        spread = GROUP * nn - n * n
        slope = torch.where(spread == 0, 0.0, (GROUP * na - n * a) / spread)
        scales, minima = _half(slope), _half(low + (a - slope * n) / GROUP)
        codes = _codes(values, scales, minima)
        error = _error(values, codes, scales, minima)
        better = error < best[3]
        best = tuple(
            torch.where(better, ours, theirs)
            for ours, theirs in zip((codes, scales, minima, error), best, strict=True)
        )
    return best[:3]


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).float()


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1.0 / scales)


def _codes(values: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    return ((values - minima) * _inverse(scales)).round().clamp(0, 15)


def _error(values: Tensor, codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    return _sum((codes * scales + minima - values).square())


def _sum(values: Tensor) -> Tensor:
    total = values[0]
    for column in values[1:]:
        total = total + column
    return total


def quantise_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] float32 to (codes float32 [..., K] with whole values in -127..127, scales [..., K / 32])."""
    groups = x.unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    scales = largest / 127
    inverse = torch.where(largest == 0, 0.0, 127 / largest)
    return torch.round(groups * inverse[..., None]).flatten(-2), scales
