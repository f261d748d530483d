"""Where the time of a step goes: its recorded ops, kind by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from d3rt.plan import Plan
from d3rt.runtime import Runtime


class _Only:
    """Ops of which those of one kind are recorded; None: none of them, but `seen` gets their names."""

    def __init__(self, ops: Any, kind: str | None, seen: dict[str, int]):
        self._ops, self._kind, self._seen = ops, kind, seen

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self._seen[name] = self._seen.get(name, 0) + 1
            return getattr(self._ops, name)(*given, **named) if name == self._kind else None

        return call


def op_kinds(runtime: Runtime, plan: Plan) -> dict[str, int]:
    """The ops of a decode step of that plan, in order of their first call, and how often each is called."""
    seen: dict[str, int] = {}
    buffers = runtime.engine.for_rows(1).buffers
    runtime.engine.decoder.decode_step(_Only(None, None, seen), plan, buffers)
    return seen


def part_replay(runtime: Runtime, plan: Plan, kind: str) -> Callable[[], None]:
    """The ops of one kind of a decode step, recorded without the others. They read whatever the buffers hold: an op's
    time does not depend on it."""
    engine = runtime.engine
    buffers = engine.for_rows(1).buffers
    program = runtime.backend.record(
        lambda ops: engine.decoder.decode_step(_Only(ops, kind, {}), plan, buffers)
    )
    return program.replay
