"""d3rt eval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from d3rt.cli.app import command
from d3rt.cli.options import ModelOption, ThreadsOption, compiled
from d3rt.policies import parse


@command
def eval_(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Of gsm8k, bbh, ppl, agreement. [default: all]")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Compared with full depth; give it several times for several."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few items that come with d3rt: a try-out, no figures to quote.")
    ] = False,
    model: ModelOption = None,
    backend: Annotated[str, typer.Option(help="auto, cpu, cuda or reference.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of weights and K,V. [default: the model's]")] = None,
    weights: Annotated[str | None, typer.Option(help="Of the weights alone: a dtype, int8 or int4.")] = None,
    threads: ThreadsOption = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Longest sequence, prompt included.")] = None,
    kv_fill: Annotated[str | None, typer.Option(help="auto or eager.")] = None,
    gsm8k: Annotated[Path | None, typer.Option(help="Folder with test.jsonl and train.jsonl.")] = None,
    bbh: Annotated[
        Path | None, typer.Option(help="Folder with a JSON file for each of the 27 tasks.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text file of ppl and agreement.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Of agreement, instead of the text: JSON lines with prompt, question or text."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompts are messages to a chat model.")] = False,
    shots: Annotated[
        int | None, typer.Option(help="Worked examples before a GSM8K problem. [default: 5]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="GSM8K problems; 0 is all. [default: 100]")] = None,
    bbh_task: Annotated[
        list[str] | None, typer.Option(help="Of BBH; several times for several. [default: all]")
    ] = None,
    bbh_limit: Annotated[int | None, typer.Option(help="Of each BBH task; 0 is all. [default: 10]")] = None,
    texts: Annotated[int | None, typer.Option(help="Passages of ppl and agreement. [default: 32]")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer. [default: 256]")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Of a passage, at full depth. [default: 128]")
    ] = None,
    continued_tokens: Annotated[
        int | None, typer.Option(help="Of a passage, after these. [default: 256]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where results, report and pictures go.")] = Path("out/eval"),
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what is in --out.")] = False,
) -> None:
    """Measure what skipped layers cost: tasks at full depth and with policies, on the same items, in pairs.

    Greedy. Every result is kept at once: the same command continues an evaluation that was stopped. Without --gsm8k,
    --bbh and --text, the library `datasets` loads the items, where it is installed."""
    for each in policy or ():
        parse(each)
    from d3rt.evaluation.settings import TASKS, Settings

    files = {"gsm8k": gsm8k, "bbh": bbh, "text": text, "prompts": prompts}
    sizes = {
        "shots": shots,
        "limit": limit,
        "bbh_limit": bbh_limit,
        "texts": texts,
        "max_new_tokens": max_new_tokens,
        "prompt_tokens": prompt_tokens,
        "continued_tokens": continued_tokens,
    }
    sizes["bbh_tasks"] = tuple(bbh_task) if bbh_task else None
    given = {name: value for name, value in (files | sizes).items() if value is not None}
    for name in ("limit", "bbh_limit"):
        if given.get(name) == 0:
            given[name] = None
    settings = Settings(tasks=tuple(tasks or TASKS), out=out, chat=chat, restart=restart)
    if policy:
        settings = replace(settings, policies=tuple(policy))
    settings = settings.quick(**given) if quick else replace(settings, **given)

    from d3rt.evaluation import evaluate
    from d3rt.evaluation.tasks import ROWS

    compiling = {"backend": backend, "max_seq_len": max_seq_len, "threads": threads, "kv_fill": kv_fill}
    runtime = compiled(model, compiling | {"batch_size": ROWS}, {"dtype": dtype, "weights": weights})
    try:
        report = evaluate(runtime, settings)
    except KeyboardInterrupt:
        typer.echo(f"\nwhat is done is in {out}; the same command continues", err=True)
        raise
    typer.echo(report.markdown())
    typer.echo(f"wrote {out / 'report.json'}, report.md and pictures beside it", err=True)
