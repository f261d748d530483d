"""d3rt report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from d3rt.cli.app import command
from d3rt.cli.options import ModelOption, ThreadsOption, compiled
from d3rt.policies import parse


@command
def report(
    evaluated: Annotated[
        Path | None, typer.Option("--eval", metavar="DIR", help="The --out of d3rt eval.")
    ] = None,
    timed: Annotated[
        Path | None, typer.Option("--bench", metavar="FILE", help="The --json of d3rt bench.")
    ] = None,
    tuned: Annotated[
        Path | None, typer.Option("--tune", metavar="DIR", help="The --out of d3rt tune.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Run the first two, on a few items: a try-out, no figures to quote."),
    ] = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="With --quick: compared with full depth; several times for several."),
    ] = None,
    model: ModelOption = None,
    threads: ThreadsOption = None,
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("out/report.html"),
) -> None:
    """Put quality, speed and a policy for your task on one page: an HTML file that needs nothing else."""
    for each in policy or ():
        parse(each)
    if quick and (evaluated or timed or tuned):
        raise ValueError(
            "--quick with --eval, --bench or --tune: it makes its own figures; leave one of them out."
        )
    if not quick and (policy or model):
        raise ValueError("--policy and --model are for --quick; the files say what they were measured with.")
    from d3rt.reporting import page
    from d3rt.reporting.page import read_bench, read_eval, read_tune

    out.parent.mkdir(parents=True, exist_ok=True)
    if quick:
        evaluated, timed = _measure(model, threads, policy, out.parent / f"{out.stem}-figures")
    text = page(
        read_eval(evaluated) if evaluated is not None else None,
        read_bench(timed) if timed is not None else None,
        read_tune(tuned) if tuned is not None else None,
    )
    part = out.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(out)
    typer.echo(f"wrote {out}")


def _measure(
    model: str | None, threads: int | None, policies: list[str] | None, folder: Path
) -> tuple[Path, Path]:
    """Quick runs of eval and bench; where their figures are."""
    from rich.console import Console

    from d3rt.bench.comparison import Settings as BenchSettings
    from d3rt.bench.comparison import measure
    from d3rt.evaluation import evaluate
    from d3rt.evaluation.settings import QUICK_POLICY, Settings
    from d3rt.evaluation.tasks import ROWS

    chosen = tuple(policies or (QUICK_POLICY,))
    settings = Settings(tasks=("ppl", "agreement"), policies=chosen, out=folder / "eval").quick()
    runtime = compiled(model, {"threads": threads, "batch_size": ROWS}, {"weights": "bfloat16"})
    evaluate(runtime, replace(settings, restart=True))
    with Console(stderr=True).status("timing") as status:
        found = measure(
            BenchSettings(
                model=model,
                policies=chosen,
                prompt=32,
                new=64,
                rounds=3,
                threads=threads,
                progress=status.update,
            )
        )
    path = folder / "bench.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return folder / "eval", path
