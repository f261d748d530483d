"""CudaLoop: the decode loop of a number of slots on a GPU: the buffers that tokens go through there, and a native Step
for each recorded program and kind of sampling, replayed by the C++ dispatcher (csrc/cuda).

What a step samples by, and how many EOS tokens it looks for, is part of the recording; the values are in buffers. So
programs wait to be built until it is known what they will be used for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from d3rt.backends.base import Built
from d3rt.backends.cuda_record import Recorded, progress
from d3rt.backends.cuda_slots import RING, Kind, SlotBuffers
from d3rt.backends.cuda_steps import BuiltStep
from d3rt.errors import UnsupportedOptionError
from d3rt.kernels.cuda.plans import sampling_settings
from d3rt.sampling import SamplingParams

AHEAD = 4  # steps enqueued beyond the last whose token has been read; fewer than RING
# The state of a first self-check: far enough for several splits of the attention, different in each slot.
CHECK_POS, CHECK_STRIDE = 700, 37
CHECKED_AS = SamplingParams(True, temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1)


def refuse_early_exit(what: str) -> NoReturn:
    """Steps are enqueued ahead as whole graphs, so none can look at the hidden state of one that runs."""
    raise UnsupportedOptionError(
        f"{what}: it decides the depth while a step runs, and backend 'cuda' launches steps whole and ahead; choose "
        "backend='cpu', or a policy with a schedule, such as D3."
    )


class CudaLoop:
    """See base.Loop. token, pos, logits are on the device, filled is not."""

    preparing_keeps_cache = False  # the check of a new step writes random K,V

    def __init__(self, backend: Any, token: Tensor, pos: Tensor, logits: Tensor, filled: Tensor):
        batch, device = len(token), token.device
        self.pos = torch.zeros(batch, dtype=torch.int32)
        self._backend, self._token, self._device_pos, self._logits = backend, token, pos, logits
        with backend.scope():
            self._slots = SlotBuffers(batch, logits.shape[1], device)
        backend.own(self._slots.tensors())
        ring = self._slots.ring.data_ptr()
        self._dispatcher = backend.native.Dispatcher(
            backend.context, backend.stream, self.pos, filled, ring, RING, batch, AHEAD
        )
        for name in ("wait", "read", "cancel"):
            setattr(self, name, getattr(self._dispatcher, name))
        self._programs: list[tuple[Recorded, Sequence[int], Sequence[int]]] = []
        # By program (None: the first token, which the prefill's logits give) and kind (None: without sampling).
        self._numbers: dict[tuple[int | None, Kind | None], int] = {}
        self._built: dict[tuple[int | None, Kind | None], BuiltStep] = {}

    def add(self, program: Any, reads: Sequence[int], fills: Sequence[int]) -> int:
        self._programs.append((program.recorded, reads, fills))
        return len(self._programs) - 1

    def add_ladder(self, rungs, top, confidence) -> int:
        refuse_early_exit("early exit")

    def built(self, program: int) -> Built:
        steps = [built.step for (number, _), built in self._built.items() if number == program]
        modes = sorted({step.mode for step in steps}) or ["not built"]
        return Built(", ".join(modes), sum(step.bytes for step in steps))

    @property
    def steps(self) -> Iterable[Any]:
        """Every native Step."""
        return [built.step for built in self._built.values()]

    # -- building ------------------------------------------------------------------------------------------------------

    def prepare(
        self, programs: Sequence[int], sampling: SamplingParams | None, eos_tokens: Sequence[int]
    ) -> None:
        kind = None if sampling is None else Kind.of(sampling, eos_tokens)
        missing = self._missing(programs, kind)
        if missing:
            with self._backend.scope():
                self._fill_for_check(missing)
            self._build(missing, kind)

    def _missing(self, programs: Sequence[int], kind: Kind | None) -> list[int | None]:
        """Of those, and of the first token's, what has not been built in this kind; the longest first, since memory
        that it shares with the others is then taken once."""
        wanted = {*programs} if kind is None else {*programs, None}
        missing = [program for program in wanted if (program, kind) not in self._numbers]
        return sorted(missing, key=lambda program: (-len(self._recorded(program).launches), program or -1))

    def _recorded(self, program: int | None) -> Recorded:
        return Recorded() if program is None else self._programs[program][0]

    def _build(self, missing: Sequence[int | None], kind: Kind | None) -> None:
        """The state is as before, but for what is sampled by, which each generation brings."""
        tail = Recorded() if kind is None else self._tail(kind)
        with self._backend.scope():
            self._slots.settings.copy_(sampling_settings(CHECKED_AS))
        everything = {program: self._recorded(program) + tail for program in missing}
        for recorded in everything.values():
            self._backend.reserve(recorded)
        builder = self._backend.builder()
        with progress() as show:
            for number, (program, recorded) in enumerate(everything.items(), 1):
                _, reads, fills = (None, (), ()) if program is None else self._programs[program]
                what = f"step of {len(recorded.launches)} launches"
                show(f"building graph {number} of {len(missing)}: {what}, {kind or 'driven from Python'}")
                built = builder.build(recorded, self._device_pos, what)
                self._numbers[program, kind] = self._dispatcher.add(built.step, list(reads), list(fills))
                self._built[program, kind] = built

    def _tail(self, kind: Kind) -> Recorded:
        """The end of a step of that kind."""
        with self._backend.scope():
            self._slots.provide(kind)
        self._backend.own(self._slots.tensors())
        ops = self._backend.recorder()
        self._slots.record(ops, kind, self._token, self._device_pos, self._logits)
        return ops.recorded

    def _fill_for_check(self, programs: Sequence[int | None]) -> None:
        """A state in which a wrong step shows: K,V, logits and tokens are random, positions far apart."""
        draw = torch.Generator(self._token.device).manual_seed(0)
        caches = {cache.data_ptr(): cache for program in programs for cache in self._recorded(program).caches}
        length = min((cache.shape[2] for cache in caches.values()), default=1)
        for slot in range(len(self.pos)):
            self._device_pos[slot] = (CHECK_POS + CHECK_STRIDE * slot) % length
        for cache in caches.values():
            cache[:, :, : CHECK_POS + CHECK_STRIDE * len(self.pos)].normal_(generator=draw)
        self._token.random_(0, self._logits.shape[1], generator=draw)
        self._logits.normal_(generator=draw)
        self._slots.finished.zero_()

    # -- a whole generation --------------------------------------------------------------------------------------------

    def start(
        self,
        *,
        programs: Sequence[int],
        eos_tokens: Sequence[int],
        pad_token: int,
        sampling: SamplingParams,
        seen: Sequence[Sequence[int]],
    ) -> None:
        kind = Kind.of(sampling, eos_tokens)
        if missing := self._missing(programs, kind):
            self._build(missing, kind)
        with self._backend.scope():
            self.pos.copy_(self._device_pos)
            self._slots.begin(kind, sampling, eos_tokens, pad_token, seen)
        self._dispatcher.start(
            first=self._numbers[None, kind],
            programs=[self._numbers[program, kind] for program in programs],
            eos_tokens=list(eos_tokens),
        )

    @property
    def step_seconds(self) -> list[float]:
        return self._dispatcher.step_seconds

    # -- driven from Python --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._dispatcher.begin()
        self._backend.synchronize()  # the logits of the prefill are there
        self.pos.copy_(self._device_pos)

    def step(self, program: int) -> None:
        if (program, None) not in self._numbers:
            self._build([program], None)
        self._dispatcher.step(self._numbers[program, None])

    def commit(self, tokens: Sequence[int], finished: Sequence[bool]) -> None:
        self._dispatcher.commit(list(finished))
        with self._backend.scope():
            self._token.copy_(torch.tensor(tokens, dtype=torch.int32))
            self._device_pos.copy_(self.pos)
