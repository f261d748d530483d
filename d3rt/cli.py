"""The command line: d3rt generate, eval, policy, plan, info, demo.

What was asked for goes to stdout, everything about it (statistics, progress, errors) to stderr, so that the output
can be piped on. An error on purpose is one line and exit code 2; Ctrl-C is 130, a reader that went away 141 and quiet,
as shells count signals. torch is loaded inside the commands that need it: `d3rt --help` and `d3rt policy` stay quick.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from d3rt.errors import D3rtError
from d3rt.policies import known_policies, parse

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141
TABLE_WIDTH = 200  # at most: every line of a table is one line, whoever reads it

app = typer.Typer(
    name="d3rt",
    help="LLM decoding whose depth changes from token to token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of `d3rt` and `python -m d3rt`."""
    app(prog_name="d3rt")


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a command whose expected failures end in one line and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes stdout once more on its way out; that must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (D3rtError, ValueError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(EXIT_ERROR) from None

    return app.command(function.__name__.rstrip("_"))(run)  # `eval_`: eval is Python's own


ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|ID",
        help="Folder (Hugging Face's, or saved by d3rt), GGUF file or hub id. [default: the embedded SmolLM2-135M]",
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads of the decode steps. [default: every core]")]


@_command
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
    runtime = _runtime(model, compiling, widths)
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


def _runtime(model: str | None, options: dict[str, Any], widths: dict[str, str | None]) -> Any:
    """The model compiled, or loaded where it was saved compiled; None is an option that was not given."""
    import d3rt
    from d3rt.storage import is_saved

    given = {name: value for name, value in (options | widths).items() if value is not None}
    if not is_saved(model):
        return d3rt.compile(model, **given)
    if fixed := [f"--{name.replace('_', '-')}" for name in widths if name in given]:
        raise ValueError(
            f"{', '.join(fixed)}: {model!r} was saved with its weights as they are; leave it out, or save the original "
            "model again with other weights."
        )
    return d3rt.load(model, **given)


@_command
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
    runtime = _runtime(model, compiling | {"batch_size": ROWS}, {"dtype": dtype, "weights": weights})
    try:
        report = evaluate(runtime, settings)
    except KeyboardInterrupt:
        typer.echo(f"\nwhat is done is in {out}; the same command continues", err=True)
        raise
    typer.echo(report.markdown())
    typer.echo(f"wrote {out / 'report.json'}, report.md and pictures beside it", err=True)


@_command
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


@_command
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


@_command
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show versions, the processor, the backends that work here, the embedded model and the policies."""
    report = _report()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for part, entries in report.items():
        typer.echo(part)
        for name, value in entries.items():
            words = (
                ", ".join(f"{key}: {each}" for key, each in value.items())
                if isinstance(value, dict)
                else value
            )
            typer.echo(f"  {name:<14} {words}")


def _report() -> dict[str, dict[str, Any]]:
    from d3rt import bench
    from d3rt.backends import availability
    from d3rt.models import FAMILIES
    from d3rt.models.loading import DEMO_INSTALL_COMMAND, DEMO_MODEL_NAME, demo_model_path

    try:
        embedded = str(demo_model_path())
    except D3rtError:
        embedded = f"not installed: {DEMO_INSTALL_COMMAND}"
    return {
        "versions": bench.versions(),
        "machine": bench.machine(),
        "backends": availability(),
        "models": {"embedded": f"{DEMO_MODEL_NAME}, {embedded}", "families": ", ".join(FAMILIES)},
        "policies": {
            name: (kind.__doc__ or "").partition("\n")[0] for name, kind in known_policies().items()
        },
    }


@_command
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
