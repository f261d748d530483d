"""Greedy text up to a stop, on the fast path: the dispatcher runs ahead, and is stopped when a stop string has come.

What it ran beyond the stop does not count: depth, bytes and time are those of the tokens of the answer, the tokens of
the stop string among them, as an engine that looks after each token would have run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from d3rt.evaluation.scoring import cut
from d3rt.result import GenerationStats
from d3rt.runtime import Runtime


@dataclass(frozen=True)
class Cost:
    """What the steps of one answer, or of one row of forced tokens, took. Bytes and seconds are those of the decode
    steps: without the prefill and the token that comes from it. A row among several counts as if it had run alone: it
    reads all weights, and its share of the K,V."""

    steps: int  # tokens, the prefill's among them
    depth: float  # summed over the steps, the prefill among them
    weight_bytes: int
    kv_bytes: int
    full_weight_bytes: int  # what as many decode steps read at full depth
    seconds: float | None  # None where no time was taken that means anything

    @staticmethod
    def of(stats: GenerationStats, steps: int, timed: bool) -> Cost:
        """Of the first `steps` steps of a generation, for one of its rows."""
        return Cost(
            steps=steps,
            depth=sum(stats.depths[:steps]),
            weight_bytes=sum(stats.weight_bytes[1:steps]),
            kv_bytes=sum(stats.kv_bytes[1:steps]) // stats.batch,
            full_weight_bytes=stats.full_weight_bytes * (steps - 1),
            seconds=sum(stats.step_seconds[1:steps]) if timed else None,
        )


@dataclass(frozen=True)
class Answer:
    """What was generated: the text before the stop, and what it took."""

    text: str
    tokens: int
    cost: Cost


class _Stopped(Exception):
    """A stop string has come."""


class _Watch(BaseStreamer):
    """Keeps the tokens, and ends the generation at a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._prompt_seen = False
        self.tokens: list[int] = []

    @property
    def text(self) -> str:
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True)

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.tokens.append(int(value[0]))
        text = self.text
        if any(stop in text for stop in self._stops):
            raise _Stopped

    def end(self) -> None:
        pass


def prompt_ids(runtime: Runtime, prompt: str, max_new_tokens: int) -> tuple[Tensor, bool]:
    """A prompt as ids [1, T]; where it is too long it loses its beginning, as in the harness, and True says so."""
    tokenizer = runtime.tokenizer
    has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    ids = tokenizer(prompt, add_special_tokens=not has_bos, return_tensors="pt", verbose=False).input_ids
    room = runtime.max_seq_len - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: sequences have {runtime.max_seq_len} tokens, prompt included."
        )
    return ids[:, -room:], ids.shape[1] > room


def answer(runtime: Runtime, ids: Tensor, stops: Sequence[str], max_new_tokens: int) -> Answer:
    """Greedy continuation of ids [1, T] up to a stop string, end-of-sequence or max_new_tokens."""
    watch = _Watch(runtime.tokenizer, stops)
    try:
        runtime.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            streamer=watch,
        )
    except _Stopped:
        pass
    steps = len(watch.tokens)
    return Answer(cut(watch.text, stops), steps, Cost.of(runtime.last_run, steps, timed=True))
