"""Rows of different age in one batch: what is left of a policy's gain, and what keeping ages together brings.

A queue of requests with answers of different length is worked off with serve_batch, by some policy and by FullDepth,
and with several join_every: new rows join at once, or wait for each other. Decoding waits for weights, so a step takes
as long as its deepest row: where rows join one by one there is always a young one. Tokens per second count prefills
and all else; the runs are interleaved, and ratios are taken within a round.

    python bench/serve.py [--policy TEXT] [--rows N] [--requests N] [--join 1,16,64] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import d3rt
from d3rt import bench

TABLE_WIDTH = 120
FULL = "full"


def requests(count: int, vocab: int, prompt: int, longest: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """(prompt, new tokens) of each: half to three halves of `prompt`, a quarter to all of `longest`."""
    draw = random.Random(seed)
    return [
        (
            [draw.randrange(3, vocab) for _ in range(draw.randint(prompt // 2, prompt * 3 // 2))],
            draw.randint(longest // 4, longest),
        )
        for _ in range(count)
    ]


def work_off(fast: d3rt.Runtime, policy: str, queue: Sequence[Any], join_every: int) -> dict[str, float]:
    """Tokens per second, steps, and the mean depth of a step's deepest row."""
    batch = fast.serve_batch(join_every=join_every)
    for prompt, new in queue:
        batch.add(prompt, policy=policy, max_new_tokens=new, eos_token_id=None)
    begin, steps, deepest = time.perf_counter(), 0, 0.0
    while batch.active or batch.waiting:
        rows = batch.step()
        deepest += max(batch[row].depths[-1] for row in rows)
        steps += 1
    seconds = time.perf_counter() - begin
    return {
        "tokens_per_second": sum(new for _, new in queue) / seconds,
        "steps": steps,
        "deepest": deepest / steps,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="what d3rt.load_model takes; default: the embedded SmolLM2-135M")
    parser.add_argument("--weights", default="bfloat16")
    parser.add_argument("--policy", default="d3:alpha=0.99,start=0.3")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt, about")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer, at most")
    parser.add_argument("--join", default="1,16,128", help="values of join_every")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    fast = d3rt.compile(given.model, weights=given.weights, batch_size=given.rows, max_seq_len=512)
    queue = requests(given.requests, fast.config.vocab_size, given.prompt, given.new)
    settings = [(policy, int(every)) for policy in (FULL, given.policy) for every in given.join.split(",")]
    facts: dict[tuple[str, int], dict[str, float]] = {}

    def run(setting: tuple[str, int]) -> float:
        facts[setting] = work_off(fast, setting[0], queue, setting[1])
        return facts[setting]["tokens_per_second"]

    speeds = bench.interleave({s: lambda s=s: run(s) for s in settings}, given.rounds)
    base = speeds[settings[0]]
    shown = Table(
        *(
            "policy",
            "join_every",
            "tokens/s",
            "steps",
            "deepest row",
            f"to {FULL}, {settings[0][1]}",
            "low-high",
        ),
        box=box.MARKDOWN,
    )
    for setting, speed in speeds.items():
        ratio, fact = speed.over(base), facts[setting]
        shown.add_row(
            *(
                setting[0],
                str(setting[1]),
                f"{speed.median:.1f}",
                str(int(fact["steps"])),
                f"{fact['deepest']:.1f}",
            ),
            *(f"{ratio.median:.2f}", f"{ratio.low:.2f}-{ratio.high:.2f}"),
        )
    console = Console(width=TABLE_WIDTH, highlight=False)
    console.print(
        f"{given.model or 'embedded SmolLM2-135M-Instruct'}, {given.weights}, {fast.backend.threads} threads: "
        f"{len(queue)} requests of {sum(new for _, new in queue)} tokens on {given.rows} rows, {given.rounds} rounds",
        soft_wrap=True,
    )
    console.print(shown, soft_wrap=True)
    if given.json:
        rows = [
            {"policy": policy, "join_every": every, **facts[policy, every], **speeds[policy, every].as_dict()}
            for policy, every in settings
        ]
        report = {"rows": rows, "machine": bench.machine(), "versions": bench.versions()}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
