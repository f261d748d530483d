"""What a token costs outside the kernels: barriers, the dispatcher, sampling, and all that Python does around a run.

The whole generate with kernels that do nothing (csrc/cpu/empty.cpp), beside the same generate with real ones, on
SmolLM2-135M's shape: microseconds a token, and their share of a real token at each weight width.
"""

from __future__ import annotations

import os
import statistics
import time
from contextlib import contextmanager

import pytest
import torch
from test_decode import DTYPES, model

import d3rt

PROMPT, NEW_TOKENS, ROUNDS = 8, 128, 15
FIRST = 5  # steps right after the prefill, whose threads may still hold the cores


@contextmanager
def empty_kernels():
    """The native core then takes them for whatever is made and run."""
    kept = os.environ.get("D3RT_CPU_ISA")
    os.environ["D3RT_CPU_ISA"] = "empty"
    try:
        yield
    finally:
        if kept is None:
            del os.environ["D3RT_CPU_ISA"]
        else:
            os.environ["D3RT_CPU_ISA"] = kept


def generate(runtime: d3rt.Runtime) -> float:
    """Microseconds a decode step, by the clock around the whole call, less the prefill."""
    ids = torch.ones(1, PROMPT, dtype=torch.int64)
    begin = time.perf_counter()
    runtime.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
    )
    seconds = time.perf_counter() - begin - runtime.last_run.prefill_seconds
    return seconds / (NEW_TOKENS - 1) * 1e6


@pytest.mark.parametrize("width", DTYPES)
def test_overhead(benchmark, width, say):
    benchmark.group = "outside the kernels"
    made = model(DTYPES[width])
    real = d3rt.compile(made, weights=width, max_seq_len=PROMPT + NEW_TOKENS)
    with empty_kernels():
        empty = d3rt.compile(made, weights=width, max_seq_len=PROMPT + NEW_TOKENS)
        generate(empty)
    generate(real)
    outside, whole, late = [], [], []

    def both():
        with empty_kernels():
            outside.append(generate(empty))
        whole.append(generate(real))
        steps = real.last_run.step_seconds[1:]
        late.append((sum(steps[:FIRST]) - FIRST * statistics.median(steps)) * 1e6)

    benchmark.pedantic(both, rounds=ROUNDS)
    outside_us, whole_us, late_us = map(statistics.median, (outside, whole, late))
    benchmark.extra_info.update(
        outside_us=outside_us, whole_us=whole_us, share=outside_us / whole_us, first_steps_us=late_us
    )
    say(
        f"{outside_us:.1f} us of {whole_us:.0f} us a token are outside the kernels ({outside_us / whole_us:.1%}); "
        f"the first {FIRST} steps take {late_us:.0f} us more than as many others"
    )
