"""What early exit costs: the confidence tests of a step that never ends early, and the fills of one that does.

On SmolLM2-135M's shape with random weights (test_decode.py): one step driven through the loop, so that the decision is
timed too, beside a step of recorded layers in the same round. "never" climbs to the top with a test at each exit,
beside full depth; "exit" ends after 15 layers at its first test and fills the other 15, beside those 15 layers alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
from test_decode import POSITION, plan, runtime

import d3rt
from d3rt.plan import LayerSet, Plan

ROUNDS, STEPS = 25, 5  # steps of each kind in a round
NEVER = {
    f"{measure}, every {interval}": d3rt.CALM(2.0, measure, exit_interval=interval)
    for measure in ("state", "softmax")
    for interval in (1, 2, 4)
}
EXIT = {measure: d3rt.CALM(0.0, measure, min_exit=15) for measure in ("state", "softmax")}


def stepper(fast: d3rt.Runtime, step) -> Callable[[], float]:
    """Seconds of one such step at POSITION, again and again."""
    rows = fast.engine.for_rows(1)
    number = rows.number(step)

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(STEPS):
            rows.loop.step(number)
        return (time.perf_counter() - begin) / STEPS

    return run


def compare(benchmark, say, width: str, policy: d3rt.CALM, beside: Plan) -> None:
    fast = runtime(width)
    rows = fast.engine.for_rows(1)
    for kept in (fast.engine.cache.k, fast.engine.cache.v):
        kept.fill_(0.1)
    rows.buffers.pos.fill_(POSITION)
    fast.engine.cache.filled.fill_(POSITION)
    rows.loop.begin()
    (climb,) = policy.schedule(30, 2).plans()[1:]
    ours, theirs = stepper(fast, climb), stepper(fast, beside)
    rounds: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: rounds.append((ours(), theirs())), rounds=ROUNDS, warmup_rounds=3)
    rounds = rounds[3:]
    outcome = rows.ladders.of(climb).outcomes[rows.loop.exits[0]]
    extra_bytes = rows.weight_bytes(outcome) / rows.weight_bytes(beside) - 1
    ratios = [a / b for a, b in rounds]
    ratio, quartiles = statistics.median(ratios), statistics.quantiles(ratios, n=4)
    micros = statistics.median(a for a, _ in rounds) * 1e6
    benchmark.extra_info.update(
        width=width,
        policy=str(policy),
        median_us=micros,
        beside_us=statistics.median(b for _, b in rounds) * 1e6,
        ratio=ratio,
        extra_bytes=extra_bytes,
    )
    say(
        f"{micros:.0f} us, {ratio - 1:+.1%} (quartiles {quartiles[0] - 1:+.1%} to {quartiles[2] - 1:+.1%}) over "
        f"{beside.layer_set.depth} layers without tests; weight bytes {extra_bytes:+.1%}"
    )


@pytest.mark.parametrize("policy", NEVER.values(), ids=NEVER.keys())
@pytest.mark.parametrize("width", ["float32", "bfloat16", "int4"])
def test_never(benchmark, say, width, policy):
    benchmark.group = f"early exit that never happens, {width}"
    compare(benchmark, say, width, policy, plan(30))


@pytest.mark.parametrize("policy", EXIT.values(), ids=EXIT.keys())
@pytest.mark.parametrize("width", ["float32", "bfloat16", "int4"])
def test_exit(benchmark, say, width, policy):
    benchmark.group = f"early exit after 15 of 30 layers, {width}"
    compare(benchmark, say, width, policy, Plan.of(LayerSet.of(range(15), 30)))
