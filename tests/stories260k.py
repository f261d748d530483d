"""Reads the llama2.c checkpoint in tests/data/stories260k as a Hugging Face model, and decodes its tokens.

A real, trained Llama of 260,032 parameters: small enough for exactness tests to run it hundreds of times, and
its text tells at a glance whether the arithmetic is right. Needs nothing but the files beside it.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent / "data" / "stories260k"
BOS, EOS = 1, 2


def load(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return the checkpoint as a LlamaForCausalLM in eval mode."""
    blob = (FOLDER / "stories260K.bin").read_bytes()
    # llama2.c, legacy export ("version 0"): seven int32, then float32 weights tensor by tensor, all layers of
    # one kind together. A positive vocab_size says that the classifier is the embedding.
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", blob)
    head_dim = dim // heads
    values = np.frombuffer(blob, dtype="<f4", offset=7 * 4)
    used = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal used
        count = int(np.prod(shape))
        part = torch.tensor(values[used : used + count]).reshape(shape)
        used += count
        return part

    weights = {"model.embed_tokens.weight": take(vocab, dim)}
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": _half_split(take(layers, dim, dim), heads),
        "self_attn.k_proj": _half_split(take(layers, kv_heads * head_dim, dim), kv_heads),
        "self_attn.v_proj": take(layers, kv_heads * head_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    for name, per_layer in stacked.items():
        for layer in range(layers):
            weights[f"model.layers.{layer}.{name}.weight"] = per_layer[layer]
    weights["model.norm.weight"] = take(dim)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    take(2, context, head_dim // 2)  # cos and sin tables, which every reader computes itself
    assert used == len(values), f"stories260K.bin holds {len(values)} floats, its header asks for {used}"

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model.to(dtype).eval()


def _half_split(stacked: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [layers, rows, columns] from interleaved RoPE pairs to Hugging Face's two halves per head."""
    layers, rows, columns = stacked.shape
    pairs = stacked.reshape(layers, heads, rows // heads // 2, 2, columns)
    return pairs.transpose(2, 3).reshape(layers, rows, columns)


@lru_cache(maxsize=1)
def vocabulary() -> tuple[bytes, ...]:
    """Each token's bytes, by id."""
    blob = (FOLDER / "tok512.bin").read_bytes()
    tokens, position = [], 4  # after the int32 with the longest token's length
    while position < len(blob):
        _score, length = struct.unpack_from("<fi", blob, position)
        position += 8
        tokens.append(blob[position : position + length])
        position += length
    return tuple(tokens)


def decode(ids: list[int] | torch.Tensor) -> str:
    """Text of a sequence of token ids; BOS and EOS are left out, and with them the blank that follows BOS."""
    pieces: list[bytes] = []
    previous = None
    for token in (int(id) for id in ids):
        if token not in (BOS, EOS):
            piece = vocabulary()[token]
            if previous == BOS:
                piece = piece.removeprefix(b" ")
            # <0x0A> and its like are single bytes
            raw = piece.startswith(b"<0x") and piece.endswith(b">") and len(piece) == 6
            pieces.append(bytes([int(piece[3:5], 16)]) if raw else piece)
        previous = token
    return b"".join(pieces).decode("utf-8", errors="replace")
