"""d3rt demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d3rt.cli.app import command
from d3rt.cli.options import ModelOption, ThreadsOption
from d3rt.policies import parse


@command
def demo(
    policy: Annotated[str, typer.Option(help="The policy that is compared with full depth.")] = (
        "d3:alpha=0.998,start=0.5"
    ),
    prompt: Annotated[str, typer.Option(help="The user's message.")] = "What is photosynthesis?",
    model: ModelOption = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each timed run.")] = 128,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed rounds, at most; a slow machine makes fewer.")
    ] = 7,
    threads: ThreadsOption = None,
    bf16: Annotated[bool, typer.Option("--bf16/--no-bf16", help="Also measure bfloat16.")] = True,
    out: Annotated[Path, typer.Option(help="Where the picture and result.json go.")] = Path("out/demo"),
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as markdown.")] = False,
) -> None:
    """Generate with and without skipping, and compare with Hugging Face: text, tokens, time. Some two minutes."""
    parse(policy)

    from d3rt.demo import Settings, run

    run(Settings(policy, prompt, model, new_tokens, rounds, threads, bf16, out, markdown))
