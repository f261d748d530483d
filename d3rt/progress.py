"""A progress bar on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A bar of `total` steps while it is open; shown only if `shown`."""

    def __init__(self, name: str, total: int, shown: bool = True):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        """Some steps are done."""
        self._bar.advance(self._task, steps)

    def say(self, name: str) -> None:
        """What is being done now."""
        self._bar.update(self._task, description=name)
