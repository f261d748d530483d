"""The reference backend: every op in plain PyTorch, the loop in plain Python. Slow, obvious, and the definition that
the other backends are tested against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from d3rt.backends.base import Built, Needs, causal_attention, typed_linear
from d3rt.errors import NotFiniteError
from d3rt.kernels import reference
from d3rt.kernels.packing import PackedMatrix
from d3rt.kv_cache import check_holes, mark_written
from d3rt.quantize import pack_in_slabs
from d3rt.sampling import SamplingParams


class ReferenceProgram:
    """A recorded step that simply runs the step again."""

    def __init__(self, step: Callable[[Any], None]):
        self._step = step

    def replay(self) -> None:
        self._step(reference)

    replay_after_torch = replay


class ReferenceLoop:
    """The dispatcher's loop in Python; `read` and `wait` do the work when they are called."""

    preparing_keeps_cache = True

    def __init__(self, token: Tensor, pos: Tensor, logits: Tensor, filled: Tensor):
        self._token, self._pos, self._logits, self._filled = token, pos, logits, filled
        self.pos = pos
        self._programs: list[tuple[Any, Sequence[int], Sequence[int]]] = []
        self._ladders: list[tuple[Sequence[tuple[int, int]], int, Tensor]] = []
        self._climbs: dict[int, tuple[int, float]] = {}  # program -> ladder, threshold
        self.exits: list[int] = []
        self._finished = torch.zeros(len(token), dtype=torch.bool)
        self._run: dict[str, Any] | None = None
        self._log: list[int] = []
        self._step_seconds: list[float] = []

    def add(self, program, reads, fills) -> int:
        self._programs.append((program, reads, fills))
        return len(self._programs) - 1

    def add_ladder(self, rungs, top, confidence) -> int:
        self._ladders.append((rungs, top, confidence))
        return len(self._ladders) - 1

    def add_climb(self, ladder, threshold) -> int:
        number = self.add(None, (), ())
        self._climbs[number] = ladder, threshold
        return number

    def prepare(self, programs, sampling, eos_tokens) -> None:
        """A closure is all there is to build."""

    def built(self, program: int) -> Built:
        return Built("python", 0)

    def begin(self) -> None:
        self._finished = torch.zeros(len(self._token), dtype=torch.bool)
        self.exits = []

    def step(self, program: int) -> None:
        climb = self._climbs.get(program)
        if climb is None:
            self._play(program)
        self.exits.append(-1 if climb is None else self._climb(*climb))

    def _climb(self, ladder: int, threshold: float) -> int:
        rungs, top, confidence = self._ladders[ladder]
        for at, (segment, leave) in enumerate(rungs):
            self._play(segment)
            if reference.confident(confidence, self._finished, threshold):
                self._play(leave)
                return at
        self._play(top)
        return len(rungs)

    def _play(self, program: int) -> None:
        recorded, reads, fills = self._programs[program]
        check_holes(self._filled, self._pos, reads)
        recorded.replay()
        mark_written(self._filled, self._pos, (*reads, *fills), self._finished)

    def commit(self, tokens, finished) -> None:
        chosen = torch.tensor(tokens, dtype=self._token.dtype)
        reference.advance(self._token, self._pos, chosen, self._finished)
        self._finished = torch.tensor(finished, dtype=torch.bool)

    def start(self, *, programs, eos_tokens, pad_token, sampling: SamplingParams, seen) -> None:
        self.begin()
        self._log, self._step_seconds = [], []
        self._run = {
            "programs": list(programs),
            "eos": set(eos_tokens),
            "pad": pad_token,
            "sampling": sampling,
        }
        self._run["seen"] = [set(row) for row in seen]

    def _advance_one_step(self) -> None:
        run, i = self._run, len(self._step_seconds)
        begin = time.perf_counter()
        if i > 0:
            self.step(run["programs"][i - 1])
        tokens, finished = [], self._finished.tolist()
        for slot in range(len(self._token)):
            if finished[slot]:
                tokens.append(run["pad"])
                continue
            seen = run["seen"][slot] if run["seen"] else set()
            tokens.append(choose(self._logits[slot], run["sampling"], seen, i, slot))
            seen.add(tokens[-1])
            finished[slot] = tokens[-1] in run["eos"]
        self.commit(tokens, finished)
        self._log.extend(tokens)
        self._step_seconds.append(time.perf_counter() - begin)
        if all(finished) or i == len(run["programs"]):
            self._run = None

    def read(self, first_step: int, seconds: float) -> tuple[list[int], bool]:
        at = first_step * len(self._token)
        if self._run is not None and len(self._log) <= at:
            self._advance_one_step()
        return self._log[at:], len(self._log) <= at and self._run is None

    def wait(self, seconds: float) -> bool:
        until = time.perf_counter() + seconds
        while self._run is not None and time.perf_counter() < until:
            self._advance_one_step()
        return self._run is None

    def cancel(self) -> None:
        self._run = None

    @property
    def step_seconds(self) -> list[float]:
        return self._step_seconds


def choose(logits: Tensor, params: SamplingParams, seen: set[int], step: int, slot: int) -> int:
    """The token of one slot from its logits [V]; NotFiniteError when they are broken."""
    if logits.isnan().any() or not (logits > -torch.inf).any():
        raise NotFiniteError(
            f"the logits of slot {slot} at step {step} hold NaN or no finite value; the model or its "
            "K,V cache is broken"
        )
    scores = reference.penalise(logits, seen, params.repetition_penalty)
    if not params.do_sample:
        return int(scores.argmax())
    scores = reference.warp(scores, params.temperature, params.top_k, params.top_p, params.min_p)
    if not scores.max().isfinite():
        raise NotFiniteError(
            f"the logits of slot {slot} at step {step} are infinite once divided by the temperature, so they "
            "have no distribution to draw from; do_sample=False takes the largest"
        )
    return reference.sample(scores, params.seed, step, slot)


class ReferenceBackend:
    """Plain PyTorch on the CPU."""

    name = "reference"
    scratch_bytes = 0  # torch takes and frees its own
    device = torch.device("cpu")
    scope = nullcontext
    attend = staticmethod(causal_attention)
    line_tables = True

    def __init__(self, threads: int | None = None):
        self.threads = threads or torch.get_num_threads()

    def own(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to register: Python keeps its tensors alive."""

    own_weights = own

    def pack(self, weight: Tensor, format: str) -> PackedMatrix:
        return pack_in_slabs(weight, format)

    def record(self, step: Callable[[Any], None]) -> ReferenceProgram:
        return ReferenceProgram(step)

    def linear(self, x: Tensor, w: Tensor | PackedMatrix) -> Tensor:
        return reference.linear(x, w) if isinstance(w, PackedMatrix) else typed_linear(x, w)

    def short_prompt(self, w: Tensor | PackedMatrix) -> int:
        """The products of whole prompts are the definition."""
        return 0

    def linear_bytes(self, w: Tensor | PackedMatrix) -> int:
        """A packed matrix is made dense, and its activations are."""
        return 4 * w.rows * w.cols if isinstance(w, PackedMatrix) else 0

    def loop(self, token, pos, logits, filled) -> ReferenceLoop:
        return ReferenceLoop(token, pos, logits, filled)

    def admit(self, needs: Needs) -> None:
        """Everything that compile takes runs here."""

    def describe(self) -> dict[str, str]:
        return {"runs": "plain PyTorch, for tests", "threads": str(self.threads)}
