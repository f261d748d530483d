"""d3rt plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from d3rt.cli.app import TABLE_WIDTH, command
from d3rt.policies import parse


@command
def plan(
    gpu: Annotated[str, typer.Option(help="v100, a100-40, a100-80 or h100.")] = "a100-80",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|ID",
            help="A config.json, a folder, a GGUF file or a hub id; no weights are read. [default: SmolLM2-135M]",
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help="Which layers run.")] = "d3:alpha=0.998,start=0.5",
    weights: Annotated[
        str | None, typer.Option(help="bf16, fp16, fp32, int8 or int4. [default: 16 bits, as the model's]")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Prompt tokens.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 256,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Hold the model against published figures instead.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the time of each step into this PNG or SVG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Model what a policy would gain on a GPU, from bytes and launches. Modelled, not measured; needs no GPU."""
    from d3rt.gpus import find_gpu

    chosen = find_gpu(gpu)
    parse(policy)

    from d3rt import planning
    from d3rt.models.loading import load_config

    if check:
        found = planning.check()
        shown, table = [each.as_dict() for each in found], planning.check_table(found)
    else:
        found = planning.forecast(load_config(model), chosen, policy, weights, prompt, tokens, batch)
        shown, table = found.as_dict(), planning.forecast_table(found)
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
    else:
        from rich.console import Console

        Console(highlight=False, width=TABLE_WIDTH).print(table)
    if plot is not None:
        if check:
            raise ValueError("--check with --plot: there is no picture of a check; leave one of them out.")
        from d3rt.plots import plot_times

        typer.echo(f"wrote {plot_times(found.step_seconds, plot, found.title)}", err=True)
