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
        str, typer.Option(help="Families, by commas: also greedy, which searches longer.")
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
    out: Annotated[Path, typer.Option(help="Where scores, policy.json and the report go.")] = Path(
        "out/tune"
    ),
    restart: Annotated[bool, typer.Option("--restart", help="Throw away the scores in --out.")] = False,
    transfer: Annotated[
        Path | None,
        typer.Option(
            help="Instead of tuning: the --out of an earlier run, or a policy file, for another model."
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="PATH|ID", help="With --transfer: that model; a config.json is enough."),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="With --transfer of a policy file: layers of the model it was found on."),
    ] = None,
) -> None:
    """Find the policy that saves the most bytes within a drop: searched, chosen and told on three parts of the items.

    Every score is kept at once: the same command continues what was stopped. Where no policy is within the drop,
    policy.json is full depth, and the exit code 0 all the same."""
    if transfer is not None:
        _transfer(transfer, layers, to, out)
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
    settings = replace(settings, restart=restart)
    if quick:
        settings = replace(settings, limit=min(limit, 16), prompt_tokens=32, new_tokens=16, finalists=1)
    runtime = compiled(model, {"batch_size": ROWS, "threads": threads}, {"weights": weights})
    try:
        figures = run(runtime, model, settings)
    except KeyboardInterrupt:
        typer.echo(f"\nwhat is done is in {out}; the same command continues", err=True)
        raise
    typer.echo(markdown(figures))
    typer.echo(f"wrote {out / 'policy.json'}, tune.json, tune.md and front.png beside it", err=True)


def _transfer(source: Path, layers: int | None, to: str | None, out: Path) -> None:
    from d3rt.models.loading import load_config
    from d3rt.policies import Policy
    from d3rt.tuning.transfer import transferred, tuned_layers

    if to is None:
        raise ValueError(
            "--transfer needs --to, the other model: a folder, a config.json, a GGUF file or a hub id."
        )
    if source.is_dir():
        layers, source = layers or tuned_layers(source), source / "policy.json"
    if layers is None:
        raise ValueError(
            f"--transfer {str(source)!r}: a policy file does not say how many layers its model had; give --layers, or "
            "the folder that d3rt tune wrote."
        )
    there = load_config(to).num_hidden_layers
    moved = transferred(Policy.load(source), layers, there)
    out.mkdir(parents=True, exist_ok=True)
    moved.save(out / "policy.json")
    typer.echo(f"{moved}\nuntested on this model: nothing was measured on its {there} layers")
    typer.echo(f"wrote {out / 'policy.json'}", err=True)
