"""RowBatch: rows that join, decode and leave one by one, each at its own step of its own policy.

What a server is built on: `add` a prompt, `step` all rows by a token, `remove` a row. Each row's tokens are those of a
`generate` of its own. In a step the rows are sorted by depth, and each layer runs the rows that retain it: with nested
sets one range, its weights read once. A row that has finished is gone from the next step on.

A step takes as long as its deepest row, since decoding waits for weights; so one young row among old ones costs what
they have saved. `join_every` lets new rows wait for each other, and so keeps rows of one age together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d3rt.backends.base import Backend
from d3rt.backends.reference import choose
from d3rt.errors import HoleError, NotFiniteError
from d3rt.generation import Request
from d3rt.kernels import reference
from d3rt.kv_cache import KVCache
from d3rt.models.decoder import Decoder, StepBuffers
from d3rt.plan import Action, Plan
from d3rt.prefill import Prefill
from d3rt.row_plans import by_layer

# Combinations of plans whose recordings are at hand; finding them anew takes a fraction of a millisecond.
KNOWN_STEPS = 4096


@dataclass
class Row:
    """One row. tokens are its new ones so far; depths the retained layers of each."""

    id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)
    finished: bool = False
    request: Request | None = field(default=None, repr=False)
    plans: Sequence[Plan] = field(default=(), repr=False)
    line: int | None = field(default=None, repr=False)
    logits: Tensor | None = field(default=None, repr=False)  # of the prefill, until step 0 has chosen

    @property
    def pos(self) -> int:
        """Position of its newest token."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def plan(self) -> Plan:
        """Of the step at hand."""
        return self.plans[len(self.tokens)]


class RowBatch:
    """Made by `Runtime.serve_batch`. Has a K,V cache of its own: `generate` and sessions do not disturb it."""

    def __init__(
        self,
        backend: Backend,
        decoder: Decoder,
        rope: tuple[Tensor, Tensor],
        rows: int,
        max_seq_len: int,
        cache_dtype: torch.dtype,
        plan: Callable[..., tuple[Request, Sequence[Plan]]],
        scope: Callable[[], AbstractContextManager],
        join_every: int,
    ):
        """plan(prompt, policy, options): the checked request and the plan of each step; scope(): held while it
        works."""
        self.capacity = rows
        self.join_every = join_every
        self._backend, self._decoder, self._rope = backend, decoder, rope
        self._plan, self._scope = plan, scope
        with backend.scope():
            self._cache = KVCache(decoder.config, rows, max_seq_len, cache_dtype, backend.device)
        self._prefill = Prefill(backend, decoder, rope, self._cache)
        self._free = list(range(rows))[::-1]
        self._active: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._rows: dict[int, Row] = {}
        self._buffers: dict[int, StepBuffers] = {}
        self._recorded: dict[tuple, Any] = {}
        self._steps_of: dict[tuple[Plan, ...], _Step] = {}
        self._next_id = 0
        self._clock = 0  # steps so far

    def __repr__(self) -> str:
        return f"RowBatch({len(self._active)} of {self.capacity} rows active, {len(self._waiting)} waiting)"

    @property
    def active(self) -> tuple[int, ...]:
        """Rows that the next step decodes, those that are to join with it left out."""
        return tuple(row.id for row in self._active)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Rows that were added and have not joined."""
        return tuple(row.id for row in self._waiting)

    def __getitem__(self, row: int) -> Row:
        """A row that was added and not removed, finished or not; KeyError for any other."""
        if row not in self._rows:
            raise KeyError(f"row {row}: there is none of that number; there are {sorted(self._rows)}.")
        return self._rows[row]

    def add(self, prompt: Any, *, policy: Any = None, **options: Any) -> int:
        """Takes a prompt (token ids [T] or [1, T], text or messages); returns the row's number. It joins at one of the
        next steps, when there is room; its prompt is read then.

        policy: in the place of the runtime's own. options: as `generate` has them, for one row. Raises what `generate`
        raises, before any work.
        """
        request, plans = self._plan(prompt, policy, options)
        row = Row(self._next_id, tuple(request.prompts[0].tolist()), request.max_new_tokens, request=request)
        row.plans = plans
        self._next_id += 1
        self._rows[row.id] = row
        self._waiting.append(row)
        return row.id

    def remove(self, row: int) -> Row:
        """Forgets a row, whether it waits, decodes or has finished; returns it. The others are not disturbed."""
        gone = self[row]
        del self._rows[row]
        if gone in self._waiting:
            self._waiting.remove(gone)
        self._retire(gone)
        return gone

    def step(self) -> dict[int, int]:
        """One token for each row: {row: token}; empty when there is none. Rows that end with it are `finished`, and
        give room to others.

        Should choosing a row's token raise (NotFiniteError, a logits processor of its own), no row has moved: remove
        that row, or try again.
        """
        with self._scope():
            self._join()
            decoding = sorted(
                (row for row in self._active if row.logits is None), key=lambda row: -row.plan.layer_set.depth
            )
            rows = decoding + [row for row in self._active if row.logits is not None]
            if not rows:
                return {}
            scores = self._decode(decoding)
            scores += [row.logits for row in rows[len(decoding) :]]
            tokens = _choose(rows, scores)
            for row, token in zip(rows, tokens, strict=True):
                row.depths.append(row.plan.layer_set.depth)
                row.tokens.append(token)
                row.logits = None
                row.finished = row.finished or _ends(row, token)
                if row.finished:
                    self._retire(row)
            self._clock += 1
        return {row.id: token for row, token in zip(rows, tokens, strict=True)}

    def drain(self) -> dict[int, Row]:
        """Steps until no row is left that has not finished; all of them, by number."""
        while self._active or self._waiting:
            self.step()
        return dict(self._rows)

    def _retire(self, row: Row) -> None:
        if row in self._active:
            self._active.remove(row)
        if row.line is not None:
            self._free.append(row.line)
            row.line = row.logits = None

    def _join(self) -> None:
        """Reads the prompts of the rows that may join now."""
        if self._active and self._clock % self.join_every:
            return
        while self._waiting and self._free:
            row, line = self._waiting[0], self._free[-1]
            buf = self._buffer(1)
            with self._backend.scope():
                prompt = torch.tensor(row.prompt, device=self._backend.device)
                self._cache.truncate(line, 0)
                layers = row.plans[0].layer_set
                self._prefill.read([prompt], layers, buf, lines=[line])
                self._program(1, "head").replay_after_torch()
                row.logits = buf.logits[0].to("cpu", copy=True)
            row.line = line
            self._waiting.popleft()
            self._free.pop()
            self._active.append(row)

    def _decode(self, rows: Sequence[Row]) -> list[Tensor]:
        """One step of these rows, sorted by depth; the logits of each."""
        if not rows:
            return []
        count, plans = len(rows), tuple(row.plan for row in rows)
        if plans not in self._steps_of:
            if len(self._steps_of) >= KNOWN_STEPS:
                self._steps_of.clear()  # what was recorded stays
            self._steps_of[plans] = self._record(plans)
        step, buf = self._steps_of[plans], self._buffer(count)
        lines = torch.tensor([row.line for row in rows])
        pos = torch.tensor([row.pos for row in rows], dtype=torch.int32)
        filled = self._cache.filled[:, lines]
        if bool(((filled < pos) & step.reads).any()):
            layer, at = ((filled < pos) & step.reads).nonzero()[0].tolist()
            raise HoleError(
                f"layer {layer} of row {rows[at].id} has K,V for {int(filled[layer, at])} positions, but this step "
                f"reads {int(pos[at])}"
            )
        with self._backend.scope():
            buf.lines.copy_(lines)
            buf.pos.copy_(pos)
            buf.token.copy_(torch.tensor([row.tokens[-1] for row in rows]))
            for program in step.programs:
                program.replay()
            logits = buf.logits.to("cpu")
        self._cache.filled[:, lines] = filled + ((filled == pos) & step.writes).to(torch.int32)
        return list(logits)

    def _record(self, plans: tuple[Plan, ...]) -> _Step:
        """What a step of rows with these plans replays: each layer's share is recorded once for each way in which rows
        have met it, so that new combinations of known ones record nothing."""
        rows = len(plans)
        layers = by_layer(plans)
        programs = [self._program(rows, "embed")]
        for number, todo in enumerate(layers):
            if todo.settle or todo.attention or todo.mlp:
                programs.append(self._program(rows, number, todo))
        programs.append(self._program(rows, "head"))
        runs = torch.tensor([[action is Action.RUN for action in plan.attention] for plan in plans]).T
        fills = torch.tensor([[action is Action.FILL for action in plan.attention] for plan in plans]).T
        return _Step(tuple(programs), runs, runs | fills)

    def _program(self, rows: int, what: str | int, todo: Any = None) -> Any:
        """The recording of one layer, or of the step's beginning or end, for this many rows."""
        key = rows, what, repr(todo)
        if key not in self._recorded:
            buf, decoder = self._buffer(rows), self._decoder
            record = {
                "embed": lambda ops: decoder.embed(ops, buf),
                "head": lambda ops: decoder.project_logits(ops, buf),
            }.get(what, lambda ops: decoder.run_layer(ops, what, todo, buf))
            with self._backend.scope():
                self._recorded[key] = self._backend.record(record)
        return self._recorded[key]

    def _buffer(self, rows: int) -> StepBuffers:
        if rows not in self._buffers:
            with self._backend.scope():
                buf = StepBuffers(self._decoder.config, self._cache, *self._rope, rows, line_table=True)
                self._backend.own(buf.tensors())
            self._buffers[rows] = buf
        return self._buffers[rows]


@dataclass(frozen=True)
class _Step:
    programs: tuple[Any, ...]
    reads: Tensor  # bool [L, rows]: whose attention runs
    writes: Tensor  # bool [L, rows]: whose K,V is written


def _ends(row: Row, token: int) -> bool:
    """Whether this token was the row's last."""
    if len(row.tokens) == row.max_new_tokens or token in row.request.eos_tokens:
        return True
    criteria = row.request.criteria
    return bool(criteria and criteria(torch.tensor([[*row.prompt, *row.tokens]]), None).all())


def _choose(rows: Sequence[Row], scores: Sequence[Tensor]) -> list[int]:
    """Each row's token from its logits [V], as a generation of its own would choose it."""
    tokens: list[int | None] = [None] * len(rows)
    plain = [
        at
        for at, row in enumerate(rows)
        if not (row.request.stepwise or row.request.sampling.do_sample)
        and row.request.sampling.repetition_penalty == 1.0
    ]
    if plain:
        best, indices = torch.stack([scores[at] for at in plain]).max(-1)
        for at, value, index in zip(plain, best.tolist(), indices.tolist(), strict=True):
            if value == value and value > -torch.inf:  # NaN is not itself, and a maximum where there is one
                tokens[at] = index
            else:
                raise _not_finite(rows[at])
    for at, row in enumerate(rows):
        if tokens[at] is None:
            try:
                tokens[at] = _chosen(row, scores[at])
            except NotFiniteError as error:
                raise _not_finite(row) from error
    return tokens


def _chosen(row: Row, logits: Tensor) -> int:
    sampling, step = row.request.sampling, len(row.tokens)
    if not row.request.stepwise:
        return choose(logits, sampling, {*row.prompt, *row.tokens}, step, 0)
    processed = row.request.processors(torch.tensor([[*row.prompt, *row.tokens]]), logits[None].clone())[
        0
    ].float()
    if processed.isnan().any() or not (processed > -torch.inf).any():
        raise _not_finite(row)
    return (
        reference.sample(processed, sampling.seed, step, 0) if sampling.do_sample else int(processed.argmax())
    )


def _not_finite(row: Row) -> NotFiniteError:
    return NotFiniteError(
        f"the scores of row {row.id} at its step {len(row.tokens)} hold NaN or no finite value; the model or its K,V "
        "cache is broken, or its logits processors leave no token; remove the row"
    )
