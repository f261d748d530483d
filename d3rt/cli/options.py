"""The options that several commands have, and the runtime that they ask for."""

from __future__ import annotations

from typing import Annotated, Any

import typer

ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|ID",
        help="Folder (Hugging Face's, or saved by d3rt), GGUF file or hub id. [default: the embedded SmolLM2-135M]",
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads of the decode steps. [default: every core]")]


def compiled(model: str | None, options: dict[str, Any], widths: dict[str, str | None]) -> Any:
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
