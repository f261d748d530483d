"""SlotBuffers: what tokens go through between two steps on a GPU, beside the step's own buffers: the token chosen, who
has finished, what is sampled by, and the ring that hands tokens to the host. All of it is in device buffers, so a
recorded step fits any generation of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d3rt.backends.cuda_record import Recorder
from d3rt.kernels.cuda import plans
from d3rt.sampling import SamplingParams

RING = 8  # lines of tokens on their way to the host
EOS_PLACES = 8  # of the list of EOS tokens, in which NO_TOKEN fills the rest
NO_TOKEN = -3


@dataclass(frozen=True)
class Kind:
    """How a step ends, as far as it is part of the recording. eos: places in the list of EOS tokens."""

    draw: bool
    penalty: bool
    eos: int

    @classmethod
    def of(cls, sampling: SamplingParams, eos_tokens: Sequence[int]) -> Kind:
        return cls(
            sampling.do_sample,
            sampling.repetition_penalty != 1.0,
            EOS_PLACES * max(1, -(-len(eos_tokens) // EOS_PLACES)),
        )

    def __str__(self) -> str:
        return f"{'drawn' if self.draw else 'greedy'}{' with repetition penalty' if self.penalty else ''}"


class SlotBuffers:
    """Of B slots on a device; eos and seen come with the first kind that wants them."""

    def __init__(self, batch: int, vocab_size: int, device: torch.device):
        self._seen_shape = batch, vocab_size
        self.next_token = torch.zeros(batch, dtype=torch.int32, device=device)
        self.finished = torch.zeros(batch, dtype=torch.uint8, device=device)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        self.pad = torch.zeros(1, dtype=torch.int32, device=device)
        self.settings = torch.zeros(len(plans.token_kernels.SETTINGS), dtype=torch.int64, device=device)
        self.ring = torch.zeros(RING, batch, dtype=torch.int32, device=device)
        self.seen: Tensor | None = None  # int8 [B, V]
        self.eos: dict[int, Tensor] = {}  # int32 [places], by places

    def provide(self, kind: Kind) -> None:
        """Makes what a step of that kind needs and is not there yet."""
        if kind.penalty and self.seen is None:
            self.seen = torch.zeros(self._seen_shape, dtype=torch.int8, device=self.step.device)
        if kind.eos not in self.eos:
            self.eos[kind.eos] = torch.full((kind.eos,), NO_TOKEN, dtype=torch.int32, device=self.step.device)

    def tensors(self) -> list[Tensor]:
        seen = [] if self.seen is None else [self.seen]
        fixed = [self.next_token, self.finished, self.step, self.pad, self.settings, self.ring]
        return [*fixed, *seen, *self.eos.values()]

    def record(self, ops: Recorder, kind: Kind, token: Tensor, pos: Tensor, logits: Tensor) -> None:
        """The end of a step of that kind: sample and advance."""
        seen = self.seen if kind.penalty else None
        ops.sample(self.next_token, logits, self.settings, self.step, seen, kind.draw)
        ops.advance(
            *(token, pos, self.next_token, self.finished),
            **{"eos": self.eos[kind.eos], "pad": self.pad, "step": self.step, "ring": self.ring},
        )

    def begin(
        self,
        kind: Kind,
        sampling: SamplingParams,
        eos_tokens: Sequence[int],
        pad_token: int,
        seen: Sequence[Sequence[int]],
    ) -> None:
        """Readies them for a generation: copies to the device, and nothing back. seen: tokens of each slot."""
        device = self.step.device
        self.finished.zero_()
        self.step.zero_()
        self.pad.fill_(pad_token)
        self.settings.copy_(plans.sampling_settings(sampling))
        places = [*eos_tokens, *[NO_TOKEN] * (kind.eos - len(eos_tokens))]
        self.eos[kind.eos].copy_(torch.tensor(places, dtype=torch.int32))
        if kind.penalty:
            self.seen.zero_()
            for slot, tokens in enumerate(seen):
                self.seen[slot].index_fill_(0, torch.tensor(tokens, dtype=torch.int64).to(device), 1)
