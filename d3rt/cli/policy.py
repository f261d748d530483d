"""d3rt policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d3rt.cli.app import command
from d3rt.policies import parse


@command
def policy(
    text: Annotated[
        str, typer.Argument(metavar="POLICY", help="e.g. d3:alpha=0.998,start=0.5, or a .json file")
    ],
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 30,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 256,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this PNG or SVG.")] = None,
) -> None:
    """Show a policy's schedule: which layers run at which token. Loads no model."""
    schedule = parse(text, num_layers=layers).schedule(layers, tokens)
    typer.echo(str(schedule))
    typer.echo(f"K,V of skipped layers: {schedule.fill_words}")
    if plot is not None:
        from d3rt.plots import plot_schedule

        typer.echo(f"wrote {plot_schedule(schedule, plot)}", err=True)
