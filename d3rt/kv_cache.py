"""KVCache: keys and values of every layer, and how far each layer's are complete.

Plain memory plus bookkeeping. Who writes K,V: the prefill and the recorded steps. Who checks that no hole is read:
the dispatcher, before each step, from `filled`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from d3rt.config import DecoderConfig
from d3rt.errors import HoleError
from d3rt.kernels import kv_line


@dataclass(frozen=True)
class Line:
    """A copy of one slot's first T positions: k, v [L, G, T, d]; hidden: [T, D] of each gap; filled int32 [L]."""

    k: torch.Tensor
    v: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    filled: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in (self.k, self.v, *self.hidden))


class KVCache:
    """k, v: [L, B, G, S, d] of the dtype; as int8 [L, B, G, S, d + 4], in the lines of d3rt.kernels.kv_line. filled:
    int32 [L, B], K,V of positions 0 .. filled - 1 exist; always in host memory. hidden: of each gap of a layer set the
    hidden states [B, S, D] that were kept in it, from which the K,V of its layers are made when they are first read;
    of the dtype, bfloat16 beside an int8 cache.

    The memory is not touched before it is written, so a long max_seq_len costs address space, not memory.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ):
        shape = (
            config.num_hidden_layers,
            batch_size,
            config.num_key_value_heads,
            max_seq_len,
            kv_line.width(config.head_dim, dtype),
        )
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self._hidden_size = config.hidden_size
        self.hidden: list[torch.Tensor] = []
        self.filled = torch.zeros(config.num_hidden_layers, batch_size, dtype=torch.int32, device="cpu")

    @property
    def max_seq_len(self) -> int:
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of k and v when every position is used."""
        return 2 * self.k.numel() * self.k.element_size()

    def reset(self) -> None:
        """Forgets everything: no K,V exists in any slot."""
        self.filled.zero_()

    def gap(self, number: int) -> torch.Tensor:
        """hidden[number], made when it is first asked for."""
        while len(self.hidden) <= number:
            dtype = torch.bfloat16 if self.k.dtype == torch.int8 else self.k.dtype
            shape = (self.k.shape[1], self.max_seq_len, self._hidden_size)
            self.hidden.append(torch.empty(shape, dtype=dtype, device=self.k.device))
        return self.hidden[number]

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states when every position is used."""
        return sum(each.numel() * each.element_size() for each in self.hidden)

    def write(self, layer: int, slot: int, start: int, stop: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Puts float32 k and v [T, G, d] at positions start .. stop - 1 of one layer; `filled` is not its business."""
        for kept, made in ((self.k, k), (self.v, v)):
            kept[layer, slot, :, start:stop] = kv_line.kept_as(made.transpose(0, 1), kept.dtype)

    def take(self, slot: int, length: int, gaps: int) -> Line:
        """A copy of positions 0 .. length - 1, with the hidden states of the first `gaps` gaps."""
        return Line(
            *(kept[:, slot, :, :length].clone() for kept in (self.k, self.v)),
            tuple(self.gap(gap)[slot, :length].clone() for gap in range(gaps)),
            self.filled[:, slot].clone(),
        )

    def put(self, slot: int, line: Line) -> None:
        """Brings back what `take` took, to any slot."""
        length = line.k.shape[2]
        for kept, value in ((self.k, line.k), (self.v, line.v)):
            kept[:, slot, :, :length] = value
        for gap, value in enumerate(line.hidden):
            self.gap(gap)[slot, :length] = value
        self.filled[:, slot] = line.filled

    def truncate(self, slot: int, length: int) -> None:
        """Forgets positions from `length` on."""
        self.filled[:, slot].clamp_(max=length)

    def extend(self, slot: int, start: int, length: int, layers: Iterable[int]) -> None:
        """Notes that positions start .. length - 1 of these layers were written, and nothing of the others."""
        layers = list(layers)
        self.truncate(slot, start)
        if start and bool((self.filled[layers, slot] < start).any()):
            layer = next(layer for layer in layers if self.filled[layer, slot] < start)
            raise HoleError(
                f"layer {layer} of slot {slot} has K,V for {int(self.filled[layer, slot])} positions, but a prefill "
                f"was to go on from position {start}: start it where K,V ends"
            )
        self.filled[layers, slot] = length


def check_holes(filled: torch.Tensor, pos: torch.Tensor, reads: Iterable[int]) -> None:
    """Raises HoleError if a layer in `reads` lacks K,V of a position before pos [B]. filled: [L, B]."""
    for layer in reads:
        for slot, (complete, needed) in enumerate(zip(filled[layer].tolist(), pos.tolist(), strict=True)):
            if complete < needed:
                raise HoleError(
                    f"layer {layer} of slot {slot} has K,V for {complete} positions, but this step reads {needed}: "
                    "the steps before skipped this layer without filling its cache; use kv_fill='eager'"
                )


def mark_written(
    filled: torch.Tensor, pos: torch.Tensor, layers: Iterable[int], finished: torch.Tensor
) -> None:
    """After a step: K,V of position pos [B] exist in `layers`. A layer with an older hole stays where it is."""
    for layer in layers:
        filled[layer] += ((filled[layer] == pos) & ~finished).to(filled.dtype)
