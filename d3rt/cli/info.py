"""d3rt info."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from d3rt.cli.app import command
from d3rt.errors import D3rtError
from d3rt.policies import known_policies


@command
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
