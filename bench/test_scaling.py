"""How a step's time follows what it does: layers left out, rows of a batch, length of the context.

Each test times its cases in turn, round after round, and compares within a round: a ratio between two cases timed
minutes apart would say more of the machine than of d3rt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
from test_decode import DTYPES, POSITION, model, plan

import d3rt
from d3rt import bench

ROUNDS, CALLS = 15, 20  # a figure of a round is the median of so many calls


def median_us(step: Callable[[], None]) -> float:
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def interleaved(benchmark, steps: dict) -> dict:
    """Median microseconds of each step, round by round; the benchmarked call is one round of all."""
    rounds: dict = {name: [] for name in steps}

    def one_round():
        for name, step in steps.items():
            rounds[name].append(median_us(step))

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    return {name: bench.Spread(tuple(values[1:] or values)) for name, values in rounds.items()}


@pytest.mark.parametrize("width", DTYPES)
def test_layers_left_out(benchmark, say, width):
    """Conversion: the measured speed-up over the ratio of bytes; 1 is one to one."""
    benchmark.group = "layers left out"
    runtime = d3rt.compile(model(DTYPES[width]), weights=width, max_seq_len=2 * POSITION)
    depths = (30, 27, 22, 15)
    steps = {depth: bench.step_replay(runtime, plan(depth), POSITION) for depth in depths}
    moved = {depth: bench.step_bytes(runtime, plan(depth), POSITION) for depth in depths}
    taken = interleaved(benchmark, steps)
    for depth in depths[1:]:
        faster, fewer = taken[30].over(taken[depth]).median, moved[30] / moved[depth]
        say(
            f"{depth} of 30 layers: {taken[depth].median:.0f} us, {faster:.2f}x faster with {fewer:.2f}x fewer "
            f"bytes, conversion {faster / fewer:.2f}"
        )
        benchmark.extra_info[f"conversion_{depth}"] = faster / fewer


@pytest.mark.parametrize("width", DTYPES)
def test_rows_of_a_batch(benchmark, say, width):
    benchmark.group = "rows of a batch"
    runtime = d3rt.compile(model(DTYPES[width]), weights=width, max_seq_len=2 * POSITION, batch_size=8)
    steps = {rows: bench.step_replay(runtime, plan(30), POSITION, rows) for rows in (1, 2, 4, 8)}
    taken = interleaved(benchmark, steps)
    for rows, spread in taken.items():
        growth = rows * taken[1].over(spread).median
        say(f"batch {rows}: {spread.median:.0f} us a step, {growth:.2f}x the tokens/s of batch 1")
        benchmark.extra_info[f"growth_{rows}"] = growth


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "int8"])
def test_long_context(benchmark, say, read_bandwidth, kv_cache_dtype):
    """What the K,V bytes of 4096 tokens cost, against reading as many bytes at the machine's bandwidth."""
    benchmark.group = "long context"
    long = 4096
    made = model(DTYPES["bfloat16"])
    steps, moved = {}, {}
    for at in (
        POSITION,
        long,
    ):  # a runtime each: its replays share one position. The weights are the model's own.
        runtime = d3rt.compile(made, weights="bfloat16", kv_cache_dtype=kv_cache_dtype, max_seq_len=long + 1)
        steps[at], moved[at] = (
            bench.step_replay(runtime, plan(30), at),
            bench.step_bytes(runtime, plan(30), at),
        )
    before = read_bandwidth()
    taken = interleaved(benchmark, steps)
    bandwidth = (before + read_bandwidth()) / 2
    extra_us, extra_bytes = taken[long].median - taken[POSITION].median, moved[long] - moved[POSITION]
    cost_us = extra_bytes / bandwidth / 1e3
    say(
        f"{long} tokens: {taken[long].median:.0f} us after {taken[POSITION].median:.0f}; {extra_bytes / 1e6:.0f} MB of "
        f"K,V more take {extra_us:.0f} us, {extra_us / cost_us:.2f}x of reading them at {bandwidth:.1f} GB/s"
    )
    benchmark.extra_info.update(extra_us=extra_us, extra_bytes=extra_bytes, over_bandwidth=extra_us / cost_us)
