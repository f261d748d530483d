"""The whole generate, from the first generated token to the last, beside Hugging Face's in the same rounds: what a user
waits for, Python and dispatch included. The model is test_decode's: SmolLM2-135M's shape, random weights.
"""

from __future__ import annotations

import pytest
import torch
from test_decode import DTYPES, model

import d3rt
from d3rt import bench

PROMPT, NEW_TOKENS, ROUNDS = 32, 64, 5
POLICIES = {"full depth": "full", "D3": "d3:alpha=0.99,start=0.5"}


@pytest.mark.parametrize("width", DTYPES)
def test_generate(benchmark, say, read_bandwidth, width):
    """Tokens/s, the speed-up over Hugging Face at the same dtype (bfloat16 for int8 and int4), and D3's over full
    depth, beside the one that its bytes promise."""
    benchmark.group = "generate"
    made = model(DTYPES[width])
    ids = torch.randint(0, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    runtime = d3rt.compile(made, weights=width, max_seq_len=PROMPT + NEW_TOKENS)
    runs = {
        name: bench.D3rtRun(made, runtime, ids, NEW_TOKENS, d3rt.parse(text, num_layers=30))
        for name, text in POLICIES.items()
    }
    measures = {"Hugging Face": bench.HuggingFaceRun(made, ids, NEW_TOKENS), **runs}
    figures: dict[str, list[float]] = {name: [] for name in ["bandwidth", *measures]}

    def one_round():
        for name, measure in {"bandwidth": read_bandwidth, **measures}.items():
            figures[name].append(measure())

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    spreads = {name: bench.Spread(tuple(values[1:] or values)) for name, values in figures.items()}
    full, d3 = spreads["full depth"], spreads["D3"]
    moved = {name: bench.bytes_per_token(run.runs[-1]) for name, run in runs.items()}
    over_hf = full.over(spreads["Hugging Face"]).median
    share = full.median * moved["full depth"] / 1e9 / spreads["bandwidth"].median
    faster, fewer = d3.over(full).median, moved["full depth"] / moved["D3"]
    say(
        f"Hugging Face {spreads['Hugging Face'].median:.1f} tokens/s, full depth {full.median:.1f} ({over_hf:.2f}x, "
        f"{share:.0%} of {spreads['bandwidth'].median:.1f} GB/s), D3 {d3.median:.1f} ({faster:.2f}x full depth, with "
        f"{fewer:.2f}x fewer bytes)"
    )
    benchmark.extra_info.update(
        tokens_per_second={name: spread.as_dict() for name, spread in spreads.items()},
        bytes_per_token=moved,
        over_hugging_face=over_hf,
        share_of_bandwidth=share,
        d3_over_full_depth=faster,
        d3_byte_ratio=fewer,
    )
