"""What the widths cost: perplexity of a text at each width of weights and of the K,V cache.

Through the decode steps themselves, token by token (d3rt.bench.teacher_forced): int8 and int4 weights meet quantised
activations there, and quantised K,V is read. The text is cut into sequences of --context tokens, read side by side.
A width's ratio to float32 is paired: both are taken on the same tokens, so that what makes a passage hard cancels.
The interval is a bootstrap over windows of 256 tokens (95%, percentiles of 10,000 resamples).

    python bench/perplexity.py [--model FOLDER|FILE.gguf|HUB-ID] [--text FILE] [--tokens N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import d3rt
from d3rt import bench

TEXT = Path(__file__).parents[1] / "tests" / "data" / "wikitext2.txt"
WINDOW = 256  # tokens; what the bootstrap draws
ROWS = 8  # sequences that are read side by side
RESAMPLES = 10_000
TABLE_WIDTH = 140  # columns, also where the output is no terminal
BASE = "float32"
FROM_DENSE = "int4, from dense float32"
FROM_FILE = "int4, the file's own blocks"


@dataclass(frozen=True)
class Width:
    """One line of the table: its name and compile's arguments."""

    name: str
    options: dict[str, str]
    from_file: bool = False  # from the path itself, not from the dense model


WIDTHS = (
    Width(BASE, {"weights": "float32"}),
    Width("bfloat16", {"weights": "bfloat16"}),
    Width("float16", {"weights": "float16"}),
    Width("int8", {"weights": "int8"}),
    Width(FROM_DENSE, {"weights": "int4"}),
    Width(FROM_FILE, {"weights": "int4"}, from_file=True),
    Width("float32, int8 K,V", {"weights": "float32", "kv_cache_dtype": "int8"}),
)


@dataclass(frozen=True)
class Row:
    """What one width gave. nll in nats a token; ratio of perplexities to float32, low and high of its interval."""

    width: str
    lm_head: str
    kv_cache: str
    step_megabytes: float  # weights that one decode step reads
    nll: float
    perplexity: float
    ratio: float
    low: float
    high: float


@dataclass
class Report:
    """All lines, and what they were taken on."""

    model: str
    text: str
    tokens: int
    context: int
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sequences(ids: Tensor, tokens: int, context: int) -> Tensor:
    """ids [T] as [R, context + 1]: R sequences that predict `tokens` tokens at most; each begins with the last token of
    the one before, so that every token but the very first is predicted once."""
    tokens = min(tokens, len(ids) - 1)
    context = min(context, tokens)
    if context < 1:
        raise SystemExit(f"a text of {len(ids)} tokens: at least 2 are needed.")
    return ids[: tokens // context * context + 1].unfold(0, context + 1, context)


def losses(runtime: d3rt.Runtime, rows: Tensor, progress: Callable[[], None]) -> Tensor:
    """Negative log-likelihoods [R, context]."""
    return torch.cat([bench.teacher_forced(runtime, some, progress) for some in rows.split(ROWS)])


def paired_interval(width: Tensor, base: Tensor) -> tuple[float, float, float]:
    """Ratio of the perplexities of two sets of losses [R, context], and its interval over windows."""
    windows = [part.flatten(1) for part in (width - base).split(WINDOW, dim=1)]
    sums = torch.cat([part.sum(1) for part in windows])
    counts = torch.cat([torch.full((len(part),), part.shape[1]) for part in windows]).double()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    return math.exp(sums.sum() / counts.sum()), low, high


def measure(report: Report, model: str | None, threads: int | None, ids: Callable[[Any], Tensor]) -> Report:
    """Fills the report, one width after the other."""
    dense, tokenizer = d3rt.load_model(model, torch.float32)
    rows = sequences(ids(tokenizer), report.tokens, report.context)
    report.context = rows.shape[1] - 1
    report.tokens = len(rows) * report.context
    is_gguf = model is None or str(model).endswith(".gguf")
    widths = [width for width in WIDTHS if is_gguf or not width.from_file]
    base = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        steps = len(rows.split(ROWS)) * report.context
        task = bar.add_task("", total=steps * len(widths))
        for at, width in enumerate(widths):
            bar.update(task, description=width.name, completed=at * steps)
            options = dict(width.options, threads=threads, batch_size=min(ROWS, len(rows)))
            try:
                runtime = d3rt.compile(
                    model if width.from_file else dense, max_seq_len=report.context + 1, **options
                )
            except d3rt.UnsupportedModelError as error:
                report.notes.append(f"{width.name}: {error}")
                continue
            found = losses(runtime, rows, lambda: bar.advance(task))
            base = found if width.name == BASE else base
            ratio, low, high = paired_interval(found, base)
            nll = float(found.mean())
            names = (
                str(name).removeprefix("torch.") for name in (runtime.widths.lm_head, runtime.widths.kv_cache)
            )
            bytes_read = runtime.programs()[0].weight_bytes
            report.rows.append(
                Row(width.name, *names, bytes_read / 1e6, nll, math.exp(nll), ratio, low, high)
            )
            del runtime
    if is_gguf:
        report.notes.append(
            f"A GGUF file's float32 weights are its blocks, widened. Where those have 4 bits already, {FROM_DENSE!r} "
            f"quantises for the second time: blocks of Q4_1 come out as they were, so it can be no worse than "
            f"{FROM_FILE!r}, and says little of weights that never were quantised."
        )
    return report


def table(report: Report) -> Table:
    """The report as a table."""
    shown = Table(
        *("weights", "lm_head", "K,V", "MB a step", "NLL", "perplexity", "to float32", "95%"),
        box=box.MARKDOWN,
    )
    for row in report.rows:
        ratio, interval = (
            ("-", "-") if row.width == BASE else (f"{row.ratio:.4f}", f"{row.low:.4f}-{row.high:.4f}")
        )
        shown.add_row(
            *(row.width, row.lm_head, row.kv_cache, f"{row.step_megabytes:.0f}"),
            *(f"{row.nll:.4f}", f"{row.perplexity:.3f}", ratio, interval),
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="what d3rt.load_model takes; default: the embedded SmolLM2-135M")
    parser.add_argument(
        "--text", type=Path, default=TEXT, help="default: five articles of WikiText-2's test set"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="how many are predicted at each width")
    parser.add_argument("--context", type=int, default=1024, help="tokens of one sequence")
    parser.add_argument("--threads", type=int, help="default: every core")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    given = parser.parse_args(arguments)

    def ids(tokenizer: Any) -> Tensor:
        text = given.text.read_text(encoding="utf-8")
        return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]

    report = Report(
        given.model or "embedded SmolLM2-135M-Instruct", given.text.name, given.tokens, given.context
    )
    measure(report, given.model, given.threads, ids)
    console = Console(width=TABLE_WIDTH, highlight=False)
    console.print(
        f"{report.model} on {report.text}: {report.tokens} tokens, sequences of {report.context}",
        soft_wrap=True,
    )
    console.print(table(report), soft_wrap=True)
    for note in report.notes:
        console.print(f"- {note}", soft_wrap=True, markup=False)
    if given.json:
        facts = {"machine": bench.machine(), "versions": bench.versions(), "window": WINDOW}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(asdict(report) | facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
