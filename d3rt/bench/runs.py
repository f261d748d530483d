"""Whole generations, as they are timed: Hugging Face's and d3rt's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from d3rt.policies import Policy
from d3rt.result import GenerationStats
from d3rt.runtime import Runtime


class TokenClock(BaseStreamer):
    """A streamer that notes when each token came. The first put is the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def prefill_seconds(self) -> float:
        """From the prompt to the first generated token."""
        return self.times[1] - self.times[0]

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens over the time from the first generated token to the last, so without the prefill."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])


@contextmanager
def without_eos(model: nn.Module) -> Iterator[None]:
    """Takes the end-of-sequence token out of the model's generation_config, which d3rt's runtimes read too: every run
    then makes the same number of tokens, with no logits processor (as min_new_tokens would add)."""
    config = model.generation_config
    kept = config.eos_token_id, config.pad_token_id
    config.eos_token_id, config.pad_token_id = None, kept[1] if kept[1] is not None else 0
    try:
        yield
    finally:
        config.eos_token_id, config.pad_token_id = kept


class HuggingFaceRun:
    """Greedy `model.generate`; a call returns decode tokens/s by TokenClock. `tokens` are those of the last call;
    `prefill_seconds` has an entry for each call.

    options: more arguments of generate.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor, new_tokens: int, **options: Any):
        self._model, self._ids, self._new_tokens, self._options = model, input_ids, new_tokens, options
        self.tokens: list[int] = []
        self.prefill_seconds: list[float] = []

    def __call__(self) -> float:
        clock = TokenClock()
        with without_eos(self._model):
            sequences = self._model.generate(
                self._ids,
                attention_mask=torch.ones_like(self._ids),
                max_new_tokens=self._new_tokens,
                do_sample=False,
                streamer=clock,
                **self._options,
            )
        self.tokens = sequences[0, self._ids.shape[1] :].tolist()
        self.prefill_seconds.append(clock.prefill_seconds)
        return clock.decode_tokens_per_second


class D3rtRun:
    """Greedy `runtime.generate`; a call returns decode tokens/s: the clock around the whole call, less the prefill.

    Not the dispatcher's own clock, so that all that Python does around it counts against d3rt, as it does against
    Hugging Face. The steps must be recorded before: the round of `interleave` that does not count sees to it.

    policy: given to the runtime before each call, so that several runs may share one copy of the weights; None is the
    one it has now.
    """

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        input_ids: Tensor,
        new_tokens: int,
        policy: Policy | None = None,
    ):
        self._model, self._runtime, self._ids, self._new_tokens = model, runtime, input_ids, new_tokens
        self.policy = policy or runtime.policy
        self.tokens: list[int] = []
        self.runs: list[GenerationStats] = []

    @property
    def prefill_seconds(self) -> list[float]:
        """Of each call."""
        return [run.prefill_seconds for run in self.runs]

    def __call__(self) -> float:
        self._runtime.policy = self.policy
        with without_eos(self._model):
            begin = time.perf_counter()
            sequences = self._runtime.generate(
                self._ids,
                attention_mask=torch.ones_like(self._ids),
                max_new_tokens=self._new_tokens,
                do_sample=False,
            )
            seconds = time.perf_counter() - begin
        self.tokens = sequences[0, self._ids.shape[1] :].tolist()
        self.runs.append(self._runtime.last_run)
        return (len(self.tokens) - 1) / (seconds - self.runs[-1].prefill_seconds)


def bytes_per_token(stats: GenerationStats) -> float:
    """Weight and K,V bytes that a decode step read, on average; activations stay in the caches."""
    return sum(stats.weight_bytes[1:] + stats.kv_bytes[1:]) / (stats.steps - 1)
