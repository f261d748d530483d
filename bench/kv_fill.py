"""What becomes of the K,V of skipped layers, and what that costs: kv_fill "eager", "deferred" and "recompute" side by
side, in the first two turns of real conversations (MT-Bench).

Each turn is taken in each mode in turn, so that drift of the machine hits all alike; times are medians over
conversations, and ratios are taken within one. Quality is the second turn's: the tokens that an exact session
(recompute: equal to reading the whole conversation afresh) answers are forced on the others, and their next-token
distributions are compared, KL(exact || mode) in nats a token. What is filled from a hidden state is an approximation;
how good a one depends on the model and on the policy.

    python bench/kv_fill.py [--policy TEXT ..] [--model ..] [--weights ..] [--conversations N] [--new N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LogitsProcessor

import d3rt
from d3rt import bench
from d3rt.models.decoder import nbytes

QUESTIONS = Path(__file__).parents[1] / "tests" / "data" / "mt_bench.jsonl"
MODES = ("recompute", "eager", "deferred")
POLICIES = (
    "d3:alpha=0.99,start=0.5",
    "static:layers=0-19+28-29",
    "unified:ratio=1.25,variant=balanced",
)
TABLE_WIDTH = 140  # columns, also where the output is no terminal


@dataclass(frozen=True)
class Row:
    """One mode of one policy; medians. Ratios to "recompute" are taken within a conversation."""

    policy: str
    mode: str
    mean_depth: float
    step_ms: float
    step_ratio: float
    filled_megabytes: float  # weight bytes read more in a step, to fill
    kept_bytes: float  # hidden states kept, a token
    second_turn_ms: float  # from the second prompt to its first token
    second_turn_ratio: float
    reused: float  # positions taken over
    kl: float  # nats a token
    kl_low: float  # 95% interval of the mean, bootstrap over conversations
    kl_high: float
    agreement: float  # share of tokens whose likeliest one is the exact session's


@dataclass
class Report:
    model: str
    weights: str
    conversations: int
    new_tokens: int
    rows: list[Row] = field(default_factory=list)


class Forced(LogitsProcessor):
    """Makes each step choose a given token, and keeps what it would have chosen from."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens = iter(tokens)
        self.log_probabilities: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.log_probabilities.append(scores[0].double().log_softmax(-1))
        forced = torch.full_like(scores, -torch.inf)
        forced[0, next(self._tokens)] = 0
        return forced


def interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """95% of the mean, percentiles of a bootstrap."""
    sample = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(sample), (resamples, len(sample)), generator=torch.Generator().manual_seed(0))
    low, high = sample[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def of_conversation(
    fast: d3rt.Runtime, policy: d3rt.Policy, turns: Sequence[Any], new_tokens: int, answer_tokens: int
) -> dict[str, dict[str, float]]:
    """Figures of each mode in one conversation of two turns."""
    options = {"eos_token_id": None, "do_sample": False, "repetition_penalty": 1.0}
    found: dict[str, dict[str, float]] = {}
    sessions: dict[str, d3rt.Session] = {}
    for mode in MODES:
        sessions[mode] = fast.session(policy, kv_fill=mode)
        stats = sessions[mode].send(turns[0], max_new_tokens=new_tokens, **options).stats
        plans = policy.schedule(stats.num_layers, new_tokens).plans(mode)
        hidden = (
            fast.config.hidden_size * fast.engine.cache.gap(0).element_size() if mode == "deferred" else 0
        )
        found[mode] = {
            "depth": stats.mean_depth,
            "step": statistics.median(stats.step_seconds[1:]),
            "weights": statistics.mean(stats.weight_bytes[1:]),
            "kept": statistics.mean(plan.num_gaps for plan in plans[1:]) * hidden,
        }
    exact = None
    for mode in MODES:
        untouched = sessions[mode].fork()
        reply = sessions[mode].send(turns[1], max_new_tokens=answer_tokens, **options)
        found[mode] |= {"turn": reply.stats.prefill_seconds, "reused": reply.reused}
        tokens = reply.tokens if exact is None else exact["tokens"]
        forced = Forced(tokens)
        untouched.send(turns[1], max_new_tokens=answer_tokens, logits_processor=[forced], **options)
        seen = torch.stack(forced.log_probabilities)
        exact = exact or {"tokens": tokens, "seen": seen}
        divergence = (exact["seen"].exp() * (exact["seen"] - seen)).nan_to_num(0.0).sum(-1)
        found[mode] |= {
            "kl": float(divergence.mean()),
            "agreement": float((seen.argmax(-1) == exact["seen"].argmax(-1)).double().mean()),
        }
    return found


def rows_of(policy: str, found: Sequence[dict[str, dict[str, float]]]) -> Iterator[Row]:
    def median(mode: str, name: str, over: str | None = None) -> float:
        return statistics.median(each[mode][name] / (each[over][name] if over else 1.0) for each in found)

    for mode in MODES:
        kl = [each[mode]["kl"] for each in found]
        yield Row(
            policy=policy,
            mode=mode,
            mean_depth=median(mode, "depth"),
            step_ms=median(mode, "step") * 1e3,
            step_ratio=median(mode, "step", "recompute"),
            filled_megabytes=(median(mode, "weights") - median("recompute", "weights")) / 1e6,
            kept_bytes=median(mode, "kept"),
            second_turn_ms=median(mode, "turn") * 1e3,
            second_turn_ratio=median(mode, "turn", "recompute"),
            reused=median(mode, "reused"),
            kl=statistics.mean(kl),
            kl_low=interval(kl)[0],
            kl_high=interval(kl)[1],
            agreement=statistics.mean(each[mode]["agreement"] for each in found),
        )


def measure(
    report: Report, fast: d3rt.Runtime, policies: Sequence[str], talks: Sequence[Sequence[Any]], answer: int
):
    """Fills the report. talks: two turns each, as Session.send takes them."""
    for text in policies:
        policy = d3rt.parse(text, num_layers=fast.config.num_hidden_layers)
        found = []
        for number, turns in enumerate(track(talks, description=text, console=Console(stderr=True))):
            if number == 0:
                of_conversation(fast, policy, turns, report.new_tokens, answer)  # records what it needs
            found.append(of_conversation(fast, policy, turns, report.new_tokens, answer))
        report.rows += rows_of(text, found)
    return report


def table(report: Report) -> Table:
    shown = Table(
        *("policy", "kv_fill", "step ms", "to recompute", "fill MB a step", "kept B a token", "2nd turn ms"),
        *("to recompute", "KL, nats", "95%", "top-1"),
        box=box.MARKDOWN,
    )
    for row in report.rows:
        shown.add_row(
            *(
                row.policy,
                row.mode,
                f"{row.step_ms:.2f}",
                f"{row.step_ratio:.3f}",
                f"{row.filled_megabytes:.1f}",
            ),
            *(f"{row.kept_bytes:.0f}", f"{row.second_turn_ms:.0f}", f"{row.second_turn_ratio:.2f}"),
            *(f"{row.kl:.4f}", f"{row.kl_low:.4f}-{row.kl_high:.4f}", f"{row.agreement:.1%}"),
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="what d3rt.load_model takes; default: the embedded SmolLM2-135M")
    parser.add_argument("--policy", action="append", help="may be given several times")
    parser.add_argument("--weights", default="bfloat16", help="compile's weights")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--new", type=int, default=128, help="tokens of the first answer")
    parser.add_argument(
        "--answer", type=int, default=32, help="tokens of the second, on which they are compared"
    )
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="JSON lines with two `turns` each")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    given = parser.parse_args(arguments)
    lines = given.questions.read_text(encoding="utf-8").splitlines()
    talks = [json.loads(line)["turns"][:2] for line in lines][: given.conversations]
    fast = d3rt.compile(given.model, weights=given.weights, max_seq_len=2048)
    kept = nbytes([fast.engine.cache.k, fast.engine.cache.v]) // fast.max_seq_len
    report = Report(given.model or "embedded SmolLM2-135M-Instruct", given.weights, len(talks), given.new)
    measure(report, fast, given.policy or POLICIES, talks, given.answer)
    console = Console(width=TABLE_WIDTH, highlight=False)
    console.print(
        f"{report.model}, {report.weights}, {fast.backend.threads} threads: {report.conversations} conversations, "
        f"{report.new_tokens} tokens in the first turn; K,V of a token is {kept} bytes in all layers",
        soft_wrap=True,
    )
    console.print(table(report), soft_wrap=True)
    if given.json:
        facts = {"machine": bench.machine(), "versions": bench.versions(), "kv_bytes_a_token": kept}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(asdict(report) | facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
