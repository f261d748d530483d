"""d3rt tune."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from d3rt.cli.app import command
from d3rt.cli.options import ModelOption, ThreadsOption, compiled


@command
def tune(
    task: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt, question, text or input; or a plain text.")
    ] = None,
    metric: Annotated[str, typer.Option(help="agreement, nll or exact_match.")] = "agreement",
    max_drop: Annotated[
        str, typer.Option(help="Of tokens (agreement), relative (nll), of answers (exact_match).")
    ] = "1%",
    policies: Annotated[
        str, typer.Option(help="Families, by commas.")
    ] = "d3,skipdecode,unified,shortgpt,calm",
    quick: Annotated[
        bool, typer.Option("--quick", help="A few texts that come with d3rt: a try-out, no policy to use.")
    ] = False,
    model: ModelOption = None,
    weights: Annotated[str | None, typer.Option(help="Of the weights: a dtype, int8 or int4.")] = None,
    threads: ThreadsOption = None,
    limit: Annotated[int, typer.Option(help="Items at most.")] = 160,
    prompt_tokens: Annotated[int, typer.Option(help="Of a text, at full depth.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Of an item, after these.")] = 96,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    out: Annotated[Path, typer.Option(help="Where policy.json and the report go.")] = Path("out/tune"),
    transfer: Annotated[
        Path | None, typer.Option(help="Instead of tuning: a policy file, for a model of another depth.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With --transfer: layers of its own model.")] = None,
    to_layers: Annotated[int | None, typer.Option(help="With --transfer: layers of the other model.")] = None,
) -> None:
    """Find the policy that saves the most bytes within a drop: searched, chosen and told on three parts of the items.

    Where none is within the drop, policy.json is full depth, and the exit code 0 all the same."""
    if transfer is not None:
        _transfer(transfer, layers, to_layers, out)
        return
    from d3rt.tuning.budget import Budget
    from d3rt.tuning.candidates import check_families

    budget, families = Budget.of(metric, max_drop), tuple(policies.split(","))
    check_families(families)
    if task is None and not quick:
        raise ValueError("--task is missing: give a file, or --quick for the texts that come with d3rt.")

    from d3rt.evaluation.tasks import ROWS
    from d3rt.tuning.report import markdown
    from d3rt.tuning.run import QUICK_TEXT, Settings
    from d3rt.tuning.run import tune as run

    settings = Settings(task or QUICK_TEXT, budget, families, out, limit, prompt_tokens, new_tokens, seed)
    if quick:
        settings = replace(settings, limit=min(limit, 16), prompt_tokens=32, new_tokens=16, finalists=1)
    runtime = compiled(model, {"batch_size": ROWS, "threads": threads}, {"weights": weights})
    typer.echo(markdown(run(runtime, model, settings)))
    typer.echo(f"wrote {out / 'policy.json'}, tune.json, tune.md and front.png beside it", err=True)


def _transfer(path: Path, layers: int | None, to_layers: int | None, out: Path) -> None:
    from d3rt.policies import Policy
    from d3rt.tuning.transfer import transferred

    if layers is None or to_layers is None:
        raise ValueError(
            "--transfer needs --layers, of the model it was tuned on, and --to-layers, of the other."
        )
    moved = transferred(Policy.load(path), layers, to_layers)
    out.mkdir(parents=True, exist_ok=True)
    moved.save(out / "policy.json")
    typer.echo(f"{moved}\nuntested on this model: nothing was measured on {to_layers} layers")
    typer.echo(f"wrote {out / 'policy.json'}", err=True)
