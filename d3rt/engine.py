"""Engine: a model's weights on a backend, with its cache; what runs a generation once it is known what it is.

It owns the cache, the buffers, the recorded steps and one dispatcher for each batch size. It is told prompts, plans and
how tokens are chosen, and knows neither arguments nor policies: those are the runtime's.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d3rt.backends.base import Backend
from d3rt.config import DecoderConfig
from d3rt.errors import D3rtError, NotFiniteError
from d3rt.generation import Request
from d3rt.kernels import reference
from d3rt.kv_cache import KVCache
from d3rt.models.decoder import Decoder, nbytes
from d3rt.plan import LayerSet, Plan
from d3rt.prefill import Prefill
from d3rt.programs import ProgramInfo, Rows
from d3rt.result import GenerationStats
from d3rt.sampling import SamplingParams

if TYPE_CHECKING:
    from d3rt.session import Session

# How long a read of tokens waits inside C++ before Python may look at signals.
POLL_SECONDS = 0.05


class Engine:
    """What a Runtime decodes with. `last_run` tells what the last generation did."""

    def __init__(
        self,
        config: DecoderConfig,
        backend: Backend,
        decoder: Decoder,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
    ):
        self.config, self.backend, self.decoder, self.rope, self.cache = config, backend, decoder, rope, cache
        self.prefiller = Prefill(backend, decoder, rope, cache)
        self.last_run: GenerationStats | None = None
        self.tenant: weakref.ref[Session] | None = None  # the session whose K,V is in line 0 of the cache
        self._rows: dict[int, Rows] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._owner: int | None = None  # the thread whose generation runs

    @contextmanager
    def exclusive(self):
        # Here and not in C++: torch's own threads are gone too, and the prefill would wait for them for ever.
        if os.getpid() != self._pid:
            raise D3rtError(
                "this runtime was made before fork(), and its threads do not exist in this process: compile the model "
                "here, in a process started by 'spawn'."
            )
        me = threading.get_ident()
        if self._owner == me:
            raise D3rtError(
                "a stream of this runtime is still open in this thread: finish or close it before the next generation."
            )
        with self._lock:
            self._owner = me
            try:
                yield
            finally:
                self._owner = None

    def generate(
        self,
        request: Request,
        plans: Sequence[Plan],
        scores: list[Tensor],
        logits: list[Tensor],
        wait_for_all: bool,
        read: Callable[[Sequence[Tensor], LayerSet, Rows], None] | None = None,
    ) -> Iterator[Tensor]:
        """Prefill, then the tokens int64 [B] of each step. Leaves last_run, also when it is stopped midway.

        read: what reads the prompts (int64 [T_row], in host memory) and leaves the first step's logits; the prefill of
        an empty cache where it is None.
        """
        rows = self.for_rows(request.batch)
        programs = rows.numbers_of(plans[1:])
        self.prepare(rows, programs, None if request.stepwise else request.sampling, request.eos_tokens)
        begin = time.perf_counter()
        (read or self.prefill)(request.prompts, plans[0].layer_set, rows)
        prefill_seconds = time.perf_counter() - begin

        step_seconds: list[float] = []
        try:
            if request.stepwise:
                yield from self._drive(request, rows, programs, scores, logits, step_seconds)
            else:
                yield from self._dispatch(request, rows, programs, wait_for_all)
                step_seconds = rows.loop.step_seconds
        except BaseException:
            rows.loop.cancel()
            if not request.stepwise:
                step_seconds = rows.loop.step_seconds
            raise
        finally:
            self._note(request, plans, rows, prefill_seconds, step_seconds)

    def prefill(
        self,
        prompts: Sequence[Tensor],
        layers: LayerSet,
        rows: Rows,
        starts: Sequence[int] | None = None,
    ) -> None:
        """Reads the prompts from positions `starts` on, or from 0 into an empty cache."""
        if starts is None:
            self.lend(None)
            self.cache.reset()
        with self.backend.scope():
            there = [prompt.to(self.backend.device) for prompt in prompts]
            self.prefiller.read(there, layers, rows.buffers, starts)
            rows.first_logits.replay_after_torch()

    def prepare(
        self, rows: Rows, programs: Sequence[int], sampling: SamplingParams | None, eos_tokens: Sequence[int]
    ) -> None:
        """Loop.prepare; a session whose K,V that might change has them put away."""
        if not rows.loop.preparing_keeps_cache:
            self.lend(None)
        rows.loop.prepare(programs, sampling, eos_tokens)

    def lend(self, session: Session | None) -> None:
        """Makes line 0 of the cache this session's, or nobody's; whose it was puts its K,V away."""
        tenant = self.tenant() if self.tenant else None
        if tenant is session:
            return
        with self.backend.scope():
            if tenant is not None:
                tenant._put_away()
            self.tenant = None  # should taking it back fail, it is nobody's
            if session is not None:
                session._take_back()
        self.tenant = weakref.ref(session) if session is not None else None

    def _dispatch(
        self, request: Request, rows: Rows, programs: list[int], wait_for_all: bool
    ) -> Iterator[Tensor]:
        """The dispatcher runs the whole generation; Python only waits, so that Ctrl-C is noticed."""
        loop = rows.loop
        loop.start(
            programs=programs,
            eos_tokens=request.eos_tokens,
            pad_token=request.pad_token,
            sampling=request.sampling,
            seen=self._seen(request),
        )
        if wait_for_all:
            loop.wait(math.inf)
        batch, step, ended = request.batch, 0, False
        while not ended:
            tokens, ended = loop.read(step, POLL_SECONDS)
            for row in torch.tensor(tokens, dtype=torch.int64).view(-1, batch):
                step += 1
                yield row

    @staticmethod
    def _seen(request: Request) -> list[list[int]]:
        if request.sampling.repetition_penalty == 1.0:
            return []
        return [prompt.tolist() for prompt in request.prompts]

    def _drive(
        self,
        request: Request,
        rows: Rows,
        programs: list[int],
        scores: list[Tensor],
        logits: list[Tensor],
        step_seconds: list[float],
    ) -> Iterator[Tensor]:
        """The same loop in Python, for processors and criteria that are Python objects."""
        ids = request.input_ids
        finished = torch.zeros(request.batch, dtype=torch.bool)
        eos = torch.tensor(request.eos_tokens, dtype=torch.int64)
        rows.loop.begin()
        for i in range(request.max_new_tokens):
            begin = time.perf_counter()
            if i > 0:
                rows.loop.step(programs[i - 1])
            raw = rows.buffers.logits.to("cpu", copy=True)
            processed = request.processors(ids, raw.clone())
            if request.output_logits:
                logits.append(raw)
            if request.output_scores:
                scores.append(processed)
            padded = finished if request.pads else torch.zeros_like(finished)
            chosen = [
                request.pad_token if padded[slot] else _choose(row, request.sampling, i, slot)
                for slot, row in enumerate(processed.float())
            ]
            tokens = torch.tensor(chosen)
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            finished = finished | torch.isin(tokens, eos)
            if request.criteria:
                finished = finished | request.criteria(ids, tuple(scores) if request.output_scores else None)
            rows.loop.commit(tokens.tolist(), (finished & request.pads).tolist())
            step_seconds.append(time.perf_counter() - begin)
            yield tokens
            if finished.all():
                break

    def _note(
        self, request, plans, rows: Rows, prefill_seconds: float, step_seconds: Sequence[float]
    ) -> None:
        """last_run and the replay counts, from the steps that really ran."""
        ran = rows.ran(plans[: len(step_seconds)])
        if not ran:
            return
        layers = self.config.num_hidden_layers
        head = nbytes([self.decoder.weights.lm_head, self.decoder.weights.norm])
        # Of each plan once, known by its identity: there may be thousands of steps.
        distinct, steps = {id(plan): plan for plan in ran}, list(map(id, ran))
        for key, times in Counter(steps[1:]).items():
            rows.replays[distinct[key]] += times
        told = {}
        for key, plan in distinct.items():
            layer_set = plan.layer_set
            told[key] = layer_set.depth, str(layer_set), rows.weight_bytes(plan)
        depths, texts, weight_bytes = zip(*map(told.__getitem__, steps), strict=True)
        lengths = [len(prompt) for prompt in request.prompts]
        self.last_run = GenerationStats(
            num_layers=layers,
            batch=request.batch,
            prompt_tokens=tuple(lengths),
            depths=depths,
            layers=texts,
            weight_bytes=(head, *weight_bytes[1:]),
            full_weight_bytes=self.decoder.step_bytes(Plan.of(LayerSet.full(layers))),
            kv_bytes=(0, *self.kv_bytes(ran[1:], lengths, rows.loop.pos.tolist())),
            prefill_seconds=prefill_seconds,
            step_seconds=tuple(step_seconds),
        )

    def kv_bytes(self, ran: Sequence[Plan], lengths: Sequence[int], ends: Sequence[int]) -> Iterator[int]:
        """K,V bytes that each decode step read: at step 1 a prompt of `lengths` and one token more. A row that has
        finished stands still at its position in `ends`."""
        c = self.config
        cache = self.cache.k
        line = 2 * c.num_key_value_heads * cache.shape[-1] * cache.element_size()
        distinct = {id(plan): plan for plan in ran}
        windows = {
            key: tuple(Counter(c.sliding_windows[layer] for layer in plan.layer_set.attention_layers).items())
            for key, plan in distinct.items()
        }
        # Positions of all rows at each step, as each window sees them.
        seen: dict[int, list[int]] = {}
        for window in {window for counts in windows.values() for window, _ in counts}:
            rows = [
                [
                    min(position, end + 1, window or position)
                    for position in range(length + 1, length + 1 + len(ran))
                ]
                for length, end in zip(lengths, ends, strict=True)
            ]
            seen[window] = rows[0] if len(rows) == 1 else list(map(sum, zip(*rows, strict=True)))
        for step, plan in enumerate(ran):
            yield line * sum(count * seen[window][step] for window, count in windows[id(plan)])

    def forced(self, prompts: Sequence[Tensor], tokens: Tensor, plans: Sequence[Plan]) -> Iterator[Tensor]:
        """Yields the logits float32 [B, V], in host memory, from which step i would choose, for each i; it chooses
        tokens[:, i], of int64 [B, N], whatever they say. prompts: int64 [T_row], in host memory, one for each row."""
        count, length = tokens.shape
        forced = _Forced(count, prompts)
        with self.exclusive():
            rows = self.for_rows(count)
            programs = rows.numbers_of(plans[1:])
            self.prepare(rows, programs, None, ())
            begin = time.perf_counter()
            self.prefill(forced.prompts, plans[0].layer_set, rows)
            prefill_seconds = time.perf_counter() - begin
            step_seconds = [0.0]
            rows.loop.begin()
            try:
                yield rows.buffers.logits.to("cpu", copy=True)
                for step in range(1, length):
                    begin = time.perf_counter()
                    rows.loop.commit(tokens[:, step - 1].tolist(), [False] * count)
                    rows.loop.step(programs[step - 1])
                    logits = rows.buffers.logits.to("cpu", copy=True)
                    step_seconds.append(time.perf_counter() - begin)
                    yield logits
            finally:
                self._note(forced, plans, rows, prefill_seconds, step_seconds)

    # -- what is recorded, and what it takes ---------------------------------------------------------------------

    def for_rows(self, rows: int) -> Rows:
        if rows not in self._rows:
            with self.backend.scope():
                self._rows[rows] = Rows(self.backend, self.decoder, self.cache, self.rope, rows)
        return self._rows[rows]

    def programs(self) -> list[ProgramInfo]:
        """Every recorded step: one for each distinct plan and number of rows."""
        return [
            ProgramInfo(
                plan=step if isinstance(step, Plan) else step.plan,
                rows=count,
                depth=step.layer_set.depth,
                weight_bytes=rows.weight_bytes(step),
                replays=rows.replays[step],
                mode=built.mode,
                device_bytes=built.device_bytes,
            )
            for count, rows in self._rows.items()
            for step, built in rows.recorded()
        ]

    @property
    def buffer_bytes(self) -> int:
        """Of RoPE tables, buffers, and what the recorded steps work in."""
        return (
            nbytes(self.rope)
            + sum(rows.nbytes for rows in self._rows.values())
            + self.prefiller.nbytes
            + self.backend.scratch_bytes
        )


@dataclass(frozen=True)
class _Forced:
    """What `_note` needs to know of a run over given tokens."""

    batch: int
    prompts: Sequence[Tensor]


def _choose(scores: Tensor, sampling: SamplingParams, step: int, slot: int) -> int:
    """The token of one slot from its processed scores [V], as the dispatcher would choose it."""
    if scores.isnan().any() or not (scores > -torch.inf).any():
        raise NotFiniteError(
            f"the scores of slot {slot} at step {step} hold NaN or no finite value; the model or its K,V cache is "
            "broken, or the logits processors leave no token"
        )
    return reference.sample(scores, sampling.seed, step, slot) if sampling.do_sample else int(scores.argmax())
