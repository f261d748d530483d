"""d3rt generate."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated, Any

import typer

from d3rt.cli.app import command
from d3rt.cli.options import ModelOption, ThreadsOption, compiled
from d3rt.policies import parse


@command
def generate(
    prompt: Annotated[str, typer.Argument(help='The text to continue; "-" reads it from stdin.')],
    policy: Annotated[
        str | None,
        typer.Option(help="Which layers run, e.g. d3:alpha=0.998,start=0.5 [default: full, or as saved]"),
    ] = None,
    model: ModelOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")
    ] = False,
    backend: Annotated[str, typer.Option(help="auto, cpu, cuda or reference.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="Of weights and K,V: float32, bfloat16 or float16. [default: the model's]"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of the weights alone: a dtype, int8 or int4. [default: as --dtype]")
    ] = None,
    lm_head: Annotated[
        str | None,
        typer.Option(help="Of embedding and lm_head. [default: as --weights; int8 with int4]"),
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the K,V cache: a dtype or int8. [default: as --dtype; bfloat16 with int8 and int4]"
        ),
    ] = None,
    threads: ThreadsOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 128,
    max_seq_len: Annotated[
        int | None,
        typer.Option(help="Longest sequence, prompt included. [default: the model's, at most 8192]"),
    ] = None,
    kv_fill: Annotated[
        str | None,
        typer.Option(
            help="auto or eager: when K,V of skipped layers is written. [default: auto, or as saved]"
        ),
    ] = None,
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy", help="Draw tokens; implied by the options below. [default: the model's]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes what is drawn.")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Works with --greedy too.")] = None,
    stats: Annotated[bool, typer.Option(help="Statistics on stderr at the end.")] = True,
) -> None:
    """Continue a prompt; the text comes to stdout as it is made."""
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise ValueError("the prompt is empty: there is nothing to continue.")
    drawing = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    drawing = {name: value for name, value in drawing.items() if value is not None}
    if drawing and sample is False:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in drawing)
        raise ValueError(f"--greedy with {names}: greedy decoding draws nothing; leave one of them out.")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, **drawing}
    if drawing or sample is not None:
        options["do_sample"] = bool(drawing) or sample
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    if policy is not None:
        parse(policy)  # a misspelt policy should not cost the loading of a model
    compiling = {
        "policy": policy,
        "backend": backend,
        "max_seq_len": max_seq_len,
        "threads": threads,
        "kv_fill": kv_fill,
        "kv_cache_dtype": kv_cache_dtype,
    }
    widths = {"dtype": dtype, "weights": weights, "lm_head": lm_head}
    runtime = compiled(model, compiling, widths)
    if runtime.tokenizer is None:
        raise ValueError(
            f"model {model!r} has no tokenizer, so it cannot read text; save one into its folder."
        )
    if chat and not runtime.tokenizer.chat_template:
        raise ValueError("--chat: the model's tokenizer has no chat template; leave --chat out.")
    try:
        messages = [{"role": "user", "content": prompt}]
        with closing(runtime.stream(messages if chat else prompt, **options)) as pieces:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
        sys.stdout.write("\n")
    finally:
        if stats and runtime.last_run is not None:
            typer.echo(f"\n{runtime.last_run}", err=True)
