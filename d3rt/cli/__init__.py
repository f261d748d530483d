"""The command line: d3rt generate, eval, tune, bench, report, policy, plan, info, demo; a command is one file here.

What was asked for goes to stdout, everything about it (statistics, progress, errors) to stderr, so that the output
can be piped on. An error on purpose is one line and exit code 2; Ctrl-C is 130, a reader that went away 141 and quiet,
as shells count signals. torch is loaded inside the commands that need it: `d3rt --help` and `d3rt policy` stay quick.
"""

# In the order in which `d3rt --help` lists them.
from d3rt.cli import generate, eval, tune, bench, report, policy, plan, info, demo  # isort: skip
from d3rt.cli.app import app

__all__ = ["app", "bench", "demo", "eval", "generate", "info", "main", "plan", "policy", "report", "tune"]


def main() -> None:
    """Entry point of `d3rt` and `python -m d3rt`."""
    app(prog_name="d3rt")
