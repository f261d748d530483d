"""Journal: every result of an evaluation, or of a tuning, in a file of JSON lines, as soon as there is one.

The first line holds the settings; each further one is a task, an item, an arm (full depth, or a policy's text) and the
result. A run that is continued reads what is there and does the rest. It must have the same settings: a difference is
refused, by name. A last line that an interruption cut short is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d3rt.errors import D3rtError

Key = tuple[str, str, str]  # task, item, arm


class SettingsChangedError(D3rtError, ValueError):
    """A journal of other settings than those that it should be continued with."""


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Of settings as JSON knows them."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """The file, and the results in it. A context manager: closing writes nothing more."""

    def __init__(self, path: Path, settings: Mapping[str, Any], restart: bool = False):
        self.path = path
        self.results: dict[Key, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = b"" if restart or not path.exists() else self._read(settings)
        self._file = open(path, "r+b" if whole else "wb")  # noqa: SIM115 - closed by close()
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._write({"settings": dict(settings), "hash": settings_hash(settings)})

    def _read(self, settings: Mapping[str, Any]) -> bytes:
        """The whole lines of the file, taken in; empty where not even the first is whole."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            return b""
        try:
            head, *rest = map(json.loads, lines)
            before = head["settings"]
            results = {(each["task"], each["item"], each["arm"]): each["result"] for each in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsChangedError(
                f"{self.path} is no journal ({error!r}); choose another folder, or restart."
            ) from error
        if head["hash"] != settings_hash(settings):
            _refuse(self.path, before, settings)
        self.results = results
        return whole

    def add(self, task: str, item: str, arm: str, result: dict[str, Any]) -> None:
        """Keeps a result, on the disk when this returns."""
        self.results[task, item, arm] = result
        self._write({"task": task, "item": item, "arm": arm, "result": result})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _refuse(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    told = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)
    raise SettingsChangedError(
        f"{path} holds results of other settings: {told or 'its hash is not that of its settings'}. Choose "
        "another folder (--out), give the same settings, or start anew (--restart)."
    )
