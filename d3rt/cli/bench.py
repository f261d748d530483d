"""d3rt bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from d3rt.cli.app import command
from d3rt.cli.options import ModelOption, ThreadsOption
from d3rt.policies import parse

QUICK = {"prompt": 32, "new": 32, "rounds": 2}


@command
def bench(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Beside full depth; several times for several. [default: d3:alpha=0.998,start=0.5]"
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="A dtype, int8 or int4; several times for several. [default: bfloat16]"),
    ] = None,
    model: ModelOption = None,
    backend: Annotated[str, typer.Option(help="auto, cpu, cuda or reference.")] = "auto",
    threads: ThreadsOption = None,
    prompt: Annotated[int | None, typer.Option(help="Prompt tokens. [default: 128]")] = None,
    new: Annotated[int | None, typer.Option(help="New tokens. [default: 128]")] = None,
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds. [default: 5]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="32 + 32 tokens, 2 rounds: a try-out.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every round's figures there.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The tables as markdown.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this PNG or SVG.")] = None,
) -> None:
    """Time policies and weight widths beside Hugging Face's generate, and llama.cpp where it is installed.

    Everyone gets the same token ids and threads, in interleaved rounds, with the memory bandwidth read in between."""
    for each in policy or ():
        parse(each)
    for path in (json_file, plot):  # found out before, not after, minutes of work
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab"):
                pass
    from d3rt.bench.comparison import Settings, measure
    from d3rt.bench.pictures import draw
    from d3rt.bench.tables import about, depth_table, markdown, part_table, run_table

    sizes = {"prompt": prompt, "new": new, "rounds": rounds}
    given = (QUICK if quick else {}) | {name: value for name, value in sizes.items() if value is not None}
    if policy:
        given["policies"] = tuple(policy)
    if weights:
        given["weights"] = tuple(weights)
    from rich.console import Console

    screen = Console(stderr=True, highlight=False)
    with screen.status("starting") as status:
        settings = Settings(model=model, backend=backend, threads=threads, progress=status.update, **given)
        found = measure(settings)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if as_markdown:
        typer.echo(markdown(found), nl=False)
    else:
        _show(run_table(found))
        if found["depths"]:
            _show(depth_table(found))
            _show(part_table(found))
        for line in about(found):
            typer.echo(line)
    if plot is not None:
        typer.echo(f"wrote {draw(found, plot)}", err=True)


def _show(table: tuple[list[str], list[list[str]]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from d3rt.cli.app import TABLE_WIDTH

    header, rows = table
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for at, column in enumerate(header):
        shown.add_column(column, justify="left" if at < 3 else "right")
    for row in rows:
        shown.add_row(*row)
    Console(highlight=False, width=TABLE_WIDTH).print(shown)
    typer.echo()
