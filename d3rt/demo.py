"""The demo: one prompt, one table. Does skipping layers save the time that it promises, on this machine, now?

Streams a continuation, then times Hugging Face's generate, d3rt at full depth and d3rt with a policy in interleaved
rounds, together with the memory bandwidth; the tokens of the full-depth runs must equal Hugging Face's. Writes a
picture and every number with its setting. How each number is taken is up to bench.py, the picture to plots.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from d3rt import bench
from d3rt.compiling import compile
from d3rt.models.loading import DEMO_MODEL_NAME, load_model
from d3rt.plots import plot_run
from d3rt.policies import parse
from d3rt.result import GenerationStats
from d3rt.runtime import Runtime

# Seconds of timed rounds; a slow machine makes fewer rounds (but three). Together with loading, streaming and the
# rounds that do not count, the demo stays under three minutes.
FLOAT32_SECONDS, BFLOAT16_SECONDS = 60.0, 25.0
BFLOAT16_STARTS_BEFORE = 120.0  # seconds since the start
BANDWIDTH, HUGGING_FACE, FULL, SKIPPING = "bandwidth", "HF generate", "d3rt full depth", "d3rt skipping"


@dataclass(frozen=True)
class Settings:
    """What `d3rt demo` was asked for."""

    policy: str
    prompt: str
    model: str | None
    new_tokens: int
    rounds: int
    threads: int | None
    bf16: bool
    out: Path
    markdown: bool


@dataclass(frozen=True)
class Row:
    """One line of the table. speed in decode tokens/s; bytes are weight and K,V bytes read per token."""

    label: str
    dtype: str
    speed: bench.Spread
    mean_depth: float
    byte_share: float
    expected: float | None  # speed-up over d3rt at full depth, if bytes were all
    over_full: bench.Spread | None
    over_hugging_face: bench.Spread | None

    def cells(self, between: str) -> list[str]:
        """The texts of the line; `between` stands between a figure and its spread."""

        def ratio(spread: bench.Spread | None) -> str:
            return f"{spread.median:.2f}x{between}({spread.low:.2f}-{spread.high:.2f})" if spread else "-"

        return [
            self.label,
            SHORT[self.dtype],
            f"{self.speed.median:.1f}{between}({self.speed.low:.0f}-{self.speed.high:.0f})",
            f"{self.mean_depth:.1f}",
            f"{self.byte_share:.0%}",
            f"{self.expected:.2f}x" if self.expected else "-",
            ratio(self.over_full),
            ratio(self.over_hugging_face),
        ]


COLUMNS = (
    *("", "dtype", "tokens/s", "mean depth", "bytes read", "expected speed-up"),
    *("against full depth", "against HF"),
)
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Comparison:
    """The timed runs in one dtype."""

    rows: list[Row]
    bandwidth: bench.Spread  # GB/s
    used_share: bench.Spread  # share of the bandwidth that d3rt at full depth reaches
    same_tokens: int  # leading tokens in which full depth and Hugging Face agree
    full: GenerationStats  # step times are medians over the rounds
    skipping: GenerationStats


def run(settings: Settings) -> None:
    """Runs the demo; the table goes to stdout, all else to stderr where the table is to be markdown."""
    begin = time.perf_counter()
    screen = Console(stderr=settings.markdown, highlight=False, soft_wrap=True)
    machine = bench.machine()
    screen.print(f"[bold]d3rt[/] on {machine['cpu']}, {machine['cores']} cores")
    with screen.status("loading the model"):
        model, tokenizer = load_model(settings.model)
        model = model.float()
    name = settings.model or DEMO_MODEL_NAME
    ids = _encode(tokenizer, settings.prompt)
    length = ids.shape[1] + settings.new_tokens
    options = {"max_seq_len": length, "threads": settings.threads, "tokenizer": tokenizer}
    full = compile(model, **options)
    skipping = compile(model, policy=settings.policy, **options)

    _stream(screen, name, skipping, ids, settings)
    comparison = _compare(screen, model, full, skipping, ids, settings, FLOAT32_SECONDS)
    _say_whether_equal(screen, comparison.same_tokens, settings.new_tokens)
    rows, comparisons = list(comparison.rows), {"float32": comparison}
    spent = time.perf_counter() - begin
    if settings.bf16 and spent > BFLOAT16_STARTS_BEFORE:
        screen.print(
            f"bfloat16 is left out: {spent:.0f} s have passed on this busy or slow machine\n", style="dim"
        )
    elif settings.bf16:
        with screen.status("converting to bfloat16"):
            half = copy.deepcopy(model).to(torch.bfloat16)
            runtimes = [compile(half, policy=policy, **options) for policy in (None, settings.policy)]
        comparisons["bfloat16"] = _compare(screen, half, *runtimes, ids, settings, BFLOAT16_SECONDS)
        rows += comparisons["bfloat16"].rows

    stdout = Console(highlight=False)
    if settings.markdown:
        stdout.print(_markdown(rows, settings), markup=False, soft_wrap=True)
    else:
        stdout.print(_table(rows, settings))
    for line in _notes(name, settings, machine, ids, full, comparisons, len(rows[0].speed.values)):
        stdout.print(line, markup=False, soft_wrap=True)
    picture = plot_run(
        comparison.skipping,
        settings.out / "depth.png",
        baseline=comparison.full,
        title=f"{name}, float32, {settings.policy}",
    )
    result = settings.out / "result.json"
    result.write_text(json.dumps(_result(name, settings, machine, ids, full, comparisons), indent=2) + "\n")
    screen.print(f"wrote {picture} and {result}; {time.perf_counter() - begin:.0f} s in all")


def _encode(tokenizer: Any, prompt: str) -> Tensor:
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so the demo cannot read its prompt; choose another model."
        )
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt").input_ids
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def _stream(screen: Console, name: str, runtime: Runtime, ids: Tensor, settings: Settings) -> None:
    screen.print(f"\n[bold]{name}, {runtime.policy}[/]: {settings.prompt}\n", style="dim")
    for piece in runtime.stream(ids, max_new_tokens=settings.new_tokens, do_sample=False):
        screen.print(piece, end="", markup=False)
    screen.print(f"\n\n{runtime.last_run}\n", style="dim")


def _compare(
    screen: Console,
    model: nn.Module,
    full: Runtime,
    skipping: Runtime,
    ids: Tensor,
    settings: Settings,
    budget_seconds: float,
) -> Comparison:
    dtype = str(full.dtype).removeprefix("torch.")
    hugging_face = bench.HuggingFaceRun(model, ids, settings.new_tokens)
    full_run = bench.D3rtRun(model, full, ids, settings.new_tokens)
    skipping_run = bench.D3rtRun(model, skipping, ids, settings.new_tokens)
    measures = {
        HUGGING_FACE: hugging_face,
        BANDWIDTH: bench.Bandwidth(),  # beside the run that is held against it
        FULL: full_run,
        SKIPPING: skipping_run,
    }
    with screen.status(f"timing in {dtype}") as status:
        runs = 0

        def progress(name: str) -> None:
            nonlocal runs
            at, runs = divmod(runs, len(measures))[0], runs + 1
            status.update(f"timing in {dtype}: {f'round {at}' if at else 'warming up'}, {name}")

        speeds = bench.interleave(measures, settings.rounds, budget_seconds, progress)
    full_stats, skipping_stats = _median_steps(full_run.runs[1:]), _median_steps(skipping_run.runs[1:])
    before, after = bench.bytes_per_token(full_stats), bench.bytes_per_token(skipping_stats)
    layers = float(full_stats.num_layers)
    over_hf = {name: speeds[name].over(speeds[HUGGING_FACE]) for name in (FULL, SKIPPING)}
    rows = [
        Row(HUGGING_FACE, dtype, speeds[HUGGING_FACE], layers, 1.0, None, None, None),
        Row(FULL, dtype, speeds[FULL], full_stats.mean_depth, 1.0, None, None, over_hf[FULL]),
        Row(
            SKIPPING,
            dtype,
            speeds[SKIPPING],
            skipping_stats.mean_depth,
            after / before,
            before / after,
            speeds[SKIPPING].over(speeds[FULL]),
            over_hf[SKIPPING],
        ),
    ]
    reached = bench.Spread(tuple(speed * before / 1e9 for speed in speeds[FULL].values))
    return Comparison(
        rows=rows,
        bandwidth=speeds[BANDWIDTH],
        used_share=reached.over(speeds[BANDWIDTH]),
        same_tokens=_agreement(full_run.tokens, hugging_face.tokens),
        full=full_stats,
        skipping=skipping_stats,
    )


def _median_steps(runs: Sequence[GenerationStats]) -> GenerationStats:
    """The runs, which differ in their times only, as one with the median time of each step."""
    steps = zip(*(each.step_seconds for each in runs), strict=True)
    return dataclasses.replace(
        runs[0],
        step_seconds=tuple(statistics.median(step) for step in steps),
        prefill_seconds=statistics.median(each.prefill_seconds for each in runs),
    )


def _agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Leading tokens that are the same."""
    for at, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            return at
    return len(ours)


def _say_whether_equal(screen: Console, same: int, asked: int) -> None:
    if same == asked:
        screen.print(
            f"[green]full depth equals Hugging Face's generate: all {asked} tokens (greedy, float32)[/]\n"
        )
    else:
        screen.print(
            f"[red]full depth differs from Hugging Face's generate from token {same} on (float32)[/]\n"
        )


def _table(rows: Sequence[Row], settings: Settings) -> Table:
    title = f"decode speed, prefill left out: median (lowest-highest round)\nskipping is {settings.policy}"
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,  # 80 columns are just enough
    )
    for at, column in enumerate(COLUMNS):
        table.add_column(column.replace(" ", "\n", 1), justify="left" if at < 2 else "right", no_wrap=True)
    for at, row in enumerate(rows):
        cells = row.cells(between="\n")
        cells[0] = cells[0].replace(" ", "\n", 1)
        table.add_row(*cells, end_section=at % 3 == 2, style="bold" if row.expected else "")
    return table


def _markdown(rows: Sequence[Row], settings: Settings) -> str:
    cells = [row.cells(between=" ") for row in rows]
    cells = [[line[0].replace(SKIPPING, f"d3rt `{settings.policy}`"), *line[1:]] for line in cells]
    lines = [COLUMNS, ["---", "---"] + ["---:"] * (len(COLUMNS) - 2), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _notes(name, settings, machine, ids, full, comparisons: dict[str, Comparison], rounds: int) -> list[str]:
    found, backend = bench.versions(), full.backend
    lines = [
        f"{name}, greedy, one sequence, {ids.shape[1]} prompt tokens, {settings.new_tokens} new tokens, {rounds} "
        f"interleaved round{'' if rounds == 1 else 's'}; d3rt: {backend.describe()['runs']}, {backend.threads} "
        f"threads; torch {found['torch']} with {torch.get_num_threads()} threads, transformers "
        f"{found['transformers']}.",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}.",
    ]
    for dtype, each in comparisons.items():
        lines.append(
            f"Read bandwidth in the same rounds ({bench.BANDWIDTH_PROBE}): {each.bandwidth.median:.0f} GB/s "
            f"({each.bandwidth.low:.0f}-{each.bandwidth.high:.0f}); d3rt at full depth in {dtype} reaches "
            f"{each.used_share.median:.0%} of it ({each.used_share.low:.0%}-{each.used_share.high:.0%})."
        )
    return lines


def _result(name, settings, machine, ids, full, comparisons: dict[str, Comparison]) -> dict[str, Any]:
    """Every number and setting, for result.json."""
    return {
        "machine": machine,
        "versions": bench.versions(),
        "backend": full.backend.describe(),
        "torch_threads": torch.get_num_threads(),
        "settings": {**dataclasses.asdict(settings), "model": name, "out": str(settings.out)},
        "policy": parse(settings.policy, full.config.num_hidden_layers).to_dict(),
        "prompt_tokens": ids.shape[1],
        "bandwidth_probe": f"{bench.BANDWIDTH_PROBE}, {bench.BANDWIDTH_PROBE_BYTES} bytes, best of 3",
        "units": {"speed": "decode tokens/s", "bandwidth": "1e9 bytes/s", "expected": "speed-up from bytes"},
        "results": {dtype: _as_dict(each) for dtype, each in comparisons.items()},
    }


def _as_dict(comparison: Comparison) -> dict[str, Any]:
    def plain(row: Row) -> dict[str, Any]:
        values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
        return {
            key: value.as_dict() if isinstance(value, bench.Spread) else value
            for key, value in values.items()
        }

    return {
        "rows": [plain(row) for row in comparison.rows],
        "bandwidth": comparison.bandwidth.as_dict(),
        "share_of_bandwidth_at_full_depth": comparison.used_share.as_dict(),
        "leading_tokens_equal_to_hugging_face": comparison.same_tokens,
        "bytes_per_token": {
            "full_depth": bench.bytes_per_token(comparison.full),
            "policy": bench.bytes_per_token(comparison.skipping),
        },
        "median_step_seconds": {
            "full_depth": list(comparison.full.step_seconds),
            "policy": list(comparison.skipping.step_seconds),
        },
        "depths": list(comparison.skipping.depths),
        "prefill_seconds": {
            "full_depth": comparison.full.prefill_seconds,
            "policy": comparison.skipping.prefill_seconds,
        },
    }
