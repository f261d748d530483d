"""MemoryReport: the bytes a runtime holds and may come to hold."""

from __future__ import annotations

from dataclasses import dataclass

from d3rt.config import DecoderConfig


@dataclass(frozen=True)
class MemoryReport:
    """Bytes. The K,V cache and the buffers are counted in full, though untouched pages take no memory yet."""

    shared_weights: int  # storage of the Hugging Face model itself
    own_weights: int  # copies: norms and biases in float32, and everything converted or read from files
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


def buffer_bytes(config: DecoderConfig, rows: int, max_seq_len: int, prefill_slots: int) -> int:
    """The buffers of `rows` slots, those of the slots of a prefill, which have a line but no logits, and the RoPE
    tables."""
    c = config
    slot = c.hidden_size + 2 * c.num_attention_heads * c.head_dim + c.intermediate_size + 2
    return 4 * (rows * (slot + c.vocab_size) + prefill_slots * (slot + 1) + max_seq_len * c.head_dim)


def prefill_bytes(
    config: DecoderConfig, chunk_tokens: int, max_seq_len: int, weight_bytes: int, cache_bytes: int
) -> int:
    """Upper bound of what Decoder.prefill takes for one chunk of T tokens, beside cache and buffers; `weight_bytes` is
    the size of one weight as products read it, 4 or 2, `cache_bytes` that of one value in the cache, 4, 2 or 1.

    A layer's two halves follow each other, so the larger one counts. Values of a token in float32, those included that
    live on as variables of the loop (the layer before's gate while attention runs; Q, K, V while the MLP does):
      attention: residual stream, its norm and the sum that replaces it; the old gate; Q five times and K and V five
        times (projected, half-rotated parts, rotated, attended, as SDPA returns it).
      MLP: the residual stream as above with the output and its bias; Q, attended, K, V; gate, up, their activation,
        and the old gate.
    In bfloat16 each product's input and output exist once more in two bytes. Attention's mask over the positions that
    a layer can see takes, for each pair of token and position, 8 bytes of distance, two booleans, and a value in the
    cache's dtype: SDPA adds masks, and turns boolean ones into -inf. Scores are never whole: SDPA works in tiles.
    An int8 cache is read as float32: K and V of one layer, as many positions as it can see.
    All of it a third more: the allocator keeps what is freed between such blocks (measured: up to a quarter more than
    what lives, over widths of 576..2048 and up to 8192 positions).
    """
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    seen = max_seq_len
    if all(c.sliding_windows):
        seen = min(seen, max(c.sliding_windows) + chunk_tokens)
    attended = 4 if cache_bytes == 1 else cache_bytes
    attention = 4 * (3 * c.hidden_size + c.intermediate_size + 5 * q + 5 * kv) + seen * (10 + attended)
    mlp = 4 * (5 * c.hidden_size + 2 * q + 2 * kv + 4 * c.intermediate_size)
    narrow = min(weight_bytes, attended)
    casts = 0 if narrow == 4 else narrow * (2 * c.hidden_size + 2 * c.intermediate_size)
    decoded = 2 * 4 * kv * seen if cache_bytes == 1 else 0
    return (chunk_tokens * (max(attention, mlp) + casts) + decoded) * 4 // 3
