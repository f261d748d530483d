"""Tiny random Hugging Face models, one or more for each supported family and for each of its switches.

Small enough to run hundreds of times; sizes are awkward on purpose (no multiple of any SIMD width), and weights,
biases and norms are all random and large, since a zero bias or a norm of ones would hide that it is ignored.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import d3rt

VOCAB_SIZE = 131
EOS, PAD = 2, 0
# Prompt tokens are drawn from here: special tokens stay out.
FIRST_TOKEN = 3

_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    intermediate_size=89,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=160,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

_LLAMA = (LlamaConfig, LlamaForCausalLM)
_MISTRAL = (MistralConfig, MistralForCausalLM)
_QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
_QWEN3 = (Qwen3Config, Qwen3ForCausalLM)

# name -> ((config class, model class), what differs from _COMMON)
MODELS: dict[str, tuple[tuple[type, type], dict]] = {
    "llama": (_LLAMA, dict(num_hidden_layers=6)),
    "llama-tied": (_LLAMA, dict(tie_word_embeddings=True)),
    "llama-mha": (_LLAMA, dict(num_key_value_heads=4)),
    "llama-mqa": (_LLAMA, dict(num_attention_heads=6, num_key_value_heads=1)),
    "llama-biases": (_LLAMA, dict(attention_bias=True, mlp_bias=True)),
    "llama-head-dim": (_LLAMA, dict(hidden_size=52, head_dim=22)),
    "llama-llama3-rope": (_LLAMA, dict(rope_parameters=_LLAMA3_ROPE)),
    "llama-yarn-rope": (_LLAMA, dict(rope_parameters=_YARN_ROPE)),
    "llama-linear-rope": (_LLAMA, dict(rope_parameters=_LINEAR_ROPE)),
    "mistral": (_MISTRAL, dict(sliding_window=None)),
    "mistral-window": (_MISTRAL, dict(sliding_window=6, head_dim=10)),
    "qwen2": (_QWEN2, dict()),
    "qwen2-window": (_QWEN2, dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen3": (_QWEN3, dict(head_dim=14)),
    "qwen3-window": (
        _QWEN3,
        dict(
            head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=7, max_window_layers=1
        ),
    ),
}
NAMES = tuple(MODELS)


# Sizes that can be packed: columns in whole groups of 32. The rows of the embedding still fill no last tile.
PACKABLE = dict(hidden_size=96, intermediate_size=64, head_dim=16)


def config(name: str, **changes):
    """A fresh config of that name, with changes."""
    (kind, _), differences = MODELS[name]
    return kind(**(_COMMON | {"rope_parameters": _DEFAULT_ROPE} | differences | changes))


@cache
def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of that name in eval mode. One object for all tests: change a `fresh` one instead."""
    return fresh(name, dtype)


def fresh(name: str, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A new copy of the model of that name, with changes of its config."""
    torch.manual_seed(11 + NAMES.index(name))
    model = MODELS[name][0][1](config(name, **changes)).eval()
    with torch.no_grad():
        for parameter_name, weight in model.named_parameters():
            if "norm" in parameter_name:
                weight.uniform_(0.5, 1.5)
            elif weight.dim() == 1:
                weight.normal_(0, 0.3)
            elif "embed" in parameter_name or "lm_head" in parameter_name:
                weight.normal_(0, 0.5)
            else:
                # Each sublayer adds about as much as there is, so that no layer could be left out unnoticed.
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)
    return model.to(dtype)


def upcast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of the model with the very same weights in a wider dtype."""
    return copy.deepcopy(model).to(dtype)


def prompt(length: int, seed: int = 0) -> list[int]:
    """`length` random tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(FIRST_TOKEN, VOCAB_SIZE, (length,), generator=generator).tolist()


def ragged(lengths: list[int] | tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """One random prompt for each length."""
    return [prompt(length, seed * 100 + row) for row, length in enumerate(lengths)]


def left_padded(prompts: list[list[int]], pad: int = PAD) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of the prompts, as `generate` takes them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def runtime(name: str, policy: d3rt.Policy | str | None = None, **options) -> d3rt.Runtime:
    """The model of that name, compiled. On one thread unless told otherwise: steps this small are all barrier."""
    model = make(name, options.get("dtype", torch.float32))
    return d3rt.compile(model, policy, **({"threads": 1, "batch_size": 4} | options))
