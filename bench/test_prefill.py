"""Prompts of 1 to 512 tokens: the way that d3rt chooses, its products, and Hugging Face's forward pass, in the same
rounds. The model is test_decode's: SmolLM2-135M's shape, random weights."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from test_decode import DTYPES, model

import d3rt
from d3rt.plan import LayerSet

TOKENS, ROUNDS = (1, 8, 32, 128, 512), 5


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", DTYPES)
def test_prefill(benchmark, say, width, tokens):
    """Milliseconds until the logits of the next token are there (Hugging Face at bfloat16 for int8 and int4)."""
    benchmark.group = "prefill"
    made = model(DTYPES[width])
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    runtime = d3rt.compile(made, weights=width, max_seq_len=tokens + 1)
    engine, rows = runtime.engine, runtime.engine.for_rows(1)
    chosen = engine.prefiller.short

    def ours(short: int) -> None:
        engine.prefiller.short = short
        engine.prefill([ids[0]], LayerSet.full(30), rows)

    def theirs() -> None:
        with torch.inference_mode():
            made(ids, use_cache=True, logits_to_keep=1)

    ways = {"d3rt": lambda: ours(chosen), "products": lambda: ours(0), "Hugging Face": theirs}
    figures: dict[str, list[float]] = {name: [] for name in ways}

    def one_round() -> None:
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            figures[name].append((time.perf_counter() - begin) * 1e3)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    rounds = {name: values[1:] or values for name, values in figures.items()}
    middle = {name: statistics.median(values) for name, values in rounds.items()}
    faster = {
        name: statistics.median(theirs / ours for theirs, ours in zip(values, rounds["d3rt"], strict=True))
        for name, values in rounds.items()
    }
    benchmark.extra_info.update(milliseconds=rounds, d3rt_is_faster=faster)
    by = "decode ops" if tokens <= chosen else "products"
    say(
        f"{middle['d3rt']:.1f} ms (by {by}), by products {middle['products']:.1f} ({faster['products']:.2f}x), "
        f"Hugging Face {middle['Hugging Face']:.1f} ({faster['Hugging Face']:.2f}x)"
    )
