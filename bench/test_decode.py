"""One decode step by weight width and depth, and Hugging Face's step beside it: does the time follow the bytes?

A model of SmolLM2-135M's shape with random weights, so that nothing has to be loaded; the time of a step does not
depend on the values. d3rt's step is a replay of the recorded step, Hugging Face's a call of the model on one token with
its cache: both without the loop around them (`d3rt demo` compares the whole generate).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import d3rt
from d3rt import bench
from d3rt.plan import LayerSet, Plan

POSITION = 128  # tokens that the K,V cache holds
DEPTHS = {"full": 30, "three-quarters": 22, "half": 15}  # retained layers
# What Hugging Face runs beside each width: it has no int8 or int4 of its own.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}


@lru_cache(maxsize=1)
def model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@lru_cache(maxsize=1)
def runtime(width: str) -> d3rt.Runtime:
    return d3rt.compile(model(DTYPES[width]), weights=width, max_seq_len=2 * POSITION)


def plan(depth: int) -> Plan:
    """The bottom half of 30 layers and as many of the top as make `depth`, as D3(start=0.5) leaves them."""
    return Plan.of(LayerSet.except_window(15, 45 - depth, 30))


# width outside, so that what is compared runs side by side
@pytest.mark.parametrize("runner", ["transformers", *DEPTHS])
@pytest.mark.parametrize("width", DTYPES)
def test_decode_step(benchmark, held_against_bandwidth, width, runner):
    benchmark.group = f"decode step, {width}"
    depth = DEPTHS.get(runner, 30)
    if runner == "transformers":
        width = str(DTYPES[width]).removeprefix("torch.")
        benchmark.pedantic(transformers_step(DTYPES[width]), rounds=40, warmup_rounds=5)
    moved = bench.step_bytes(runtime(width), plan(depth), POSITION)
    if runner != "transformers":
        step = bench.step_replay(runtime(width), plan(depth), POSITION)
        benchmark.pedantic(step, rounds=150, warmup_rounds=10)
    peer = "transformers" if runner == "transformers" else "d3rt"
    held_against_bandwidth(moved, peer=peer, width=width, layers=depth, batch=1)


def transformers_step(dtype: torch.dtype) -> Callable[[], None]:
    """One token through the Hugging Face model, whose cache is cut back to POSITION tokens after each call."""
    with torch.inference_mode():
        cache, token = DynamicCache(config=model(dtype).config), torch.ones(1, 1, dtype=torch.int64)
        model(dtype)(torch.ones(1, POSITION, dtype=torch.int64), past_key_values=cache)

    def step():
        with torch.inference_mode():
            model(dtype)(token, past_key_values=cache)
            cache.crop(-1)

    return step
