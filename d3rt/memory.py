"""MemoryReport: the bytes a runtime holds and may come to hold."""

from __future__ import annotations

from dataclasses import dataclass

from d3rt.config import DecoderConfig


@dataclass(frozen=True)
class MemoryReport:
    """Bytes. The K,V cache and the buffers are counted in full, though untouched pages take no memory yet."""

    shared_weights: int  # storage of the Hugging Face model itself
    own_weights: int  # copies: norms and biases in float32, and everything when the dtype was converted
    kv_cache: int  # every slot at max_seq_len
    buffers: int  # activations, logits, RoPE tables, and scratch of the steps recorded so far
    prefill: int  # at most, while a prompt is read

    @property
    def weights(self) -> int:
        return self.shared_weights + self.own_weights

    @property
    def peak(self) -> int:
        """What the process holds at most because of this runtime, the shared weights included."""
        return self.weights + self.kv_cache + self.buffers + self.prefill

    def __str__(self) -> str:
        parts = [
            ("weights shared with the model", self.shared_weights),
            ("own weights", self.own_weights),
            ("K,V cache", self.kv_cache),
            ("buffers", self.buffers),
            ("prefill, at most", self.prefill),
            ("peak", self.peak),
        ]
        return "\n".join(f"{label:<30} {size / 2**20:9.1f} MiB" for label, size in parts)


def prefill_bytes(config: DecoderConfig, chunk_tokens: int, max_seq_len: int, weight_bytes: int) -> int:
    """Upper bound of what Decoder.prefill takes for one chunk of T tokens, beside cache and buffers.

    Per token: the residual stream, its norm and the sum that replaces it, gate, up and their product, Q, K, V with
    their rotated copies and the attended values, each float32 and, in bfloat16, once more in the weights' dtype; the
    score tile and the boolean mask of one row over max_seq_len positions, with the float mask SDPA makes of it.
    """
    c = config
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    wide = max(4 * c.intermediate_size, 4 * heads)
    floats = 5 * c.hidden_size + wide + 2 * max_seq_len
    element = 4 if weight_bytes == 4 else 4 + 2 * weight_bytes
    return chunk_tokens * (floats * element + 2 * max_seq_len)
