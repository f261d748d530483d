"""KVCache: keys and values of every layer, and how far each layer's are complete.

Plain memory plus bookkeeping. Who writes K,V: the prefill and the recorded steps. Who checks that no hole is read:
the dispatcher, before each step, from `filled`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from d3rt.config import DecoderConfig
from d3rt.errors import HoleError
from d3rt.kernels import kv_line


class KVCache:
    """k, v: [L, B, G, S, d] of the dtype; as int8 [L, B, G, S, d + 4], in the lines of d3rt.kernels.kv_line. filled:
    int32 [L, B], K,V of positions 0 .. filled - 1 exist; always in host memory.

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

    def set_prompt(self, slot: int, length: int, layers: Iterable[int]) -> None:
        """Notes that a prefill wrote positions 0 .. length - 1 of these layers, and nothing of the others."""
        self.filled[:, slot] = 0
        self.filled[list(layers), slot] = length


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
