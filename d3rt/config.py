"""DecoderConfig: what d3rt needs to know of a decoder, in Hugging Face's field names. Standard library only.

models/<family>.py fills it in from a Hugging Face config and refuses what it cannot say here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a Llama-like decoder (RMSNorm, RoPE, grouped-query attention, gated SiLU MLP)."""

    model_type: str
    hidden_size: int  # D
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # d
    intermediate_size: int  # F
    vocab_size: int  # V
    max_position_embeddings: int
    rms_norm_eps: float
    # Positions each layer's attention may look back, itself included; 0 is all of them. One entry a layer.
    sliding_windows: tuple[int, ...]

    @property
    def attention_scale(self) -> float:
        """1 / sqrt(head_dim)"""
        return self.head_dim**-0.5
