"""Measuring: what the demo, the command line and bench/ share, so that every number is taken the same way.

On a shared machine, speeds drift by a quarter from one minute to the next. So what is compared runs interleaved
(A B C A B C ...), a comparison is the median of the ratios within each round, the spread is told with it, and the
memory bandwidth that a speed is held against is read in the same rounds. What is compared is up to the callers.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.generation.streamers import BaseStreamer

from d3rt.backends.cores import usable_cores
from d3rt.backends.native import native
from d3rt.kernels import kv_line
from d3rt.models.decoder import StepBuffers
from d3rt.plan import Plan
from d3rt.policies import Policy
from d3rt.result import GenerationStats
from d3rt.runtime import Runtime

BANDWIDTH_PROBE = "torch.sum over float32 in large pages, all threads"
BANDWIDTH_PROBE_BYTES = 512 * 2**20  # many times any cache
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Spread:
    """The figures that the rounds gave, in their order."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def over(self, other: Spread) -> Spread:
        """The ratio to `other` within each round: drift of the machine that takes longer than a round cancels."""
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"median": self.median, "min": self.low, "max": self.high, "values": list(self.values)}


def interleave(
    measures: Mapping[str, Callable[[], float]],
    rounds: int,
    budget_seconds: float | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Spread]:
    """Calls every measure in turn, `rounds` times over, after one round that does not count.

    measures: name -> a function that runs once and returns its figure.
    budget_seconds: no further round starts after that time, once there are three; nor after twice that time, once
        there is one.
    progress: called with the name before each run.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least 1 round is needed.")
    values: dict[str, list[float]] = {name: [] for name in measures}
    begin = time.perf_counter()
    for done in range(-1, rounds):
        spent = time.perf_counter() - begin
        late = budget_seconds is not None and spent > budget_seconds * (1 if done >= MIN_ROUNDS else 2)
        if late and done >= 1:
            break
        for name, measure in measures.items():
            progress(name)
            value = measure()
            if done >= 0:
                values[name].append(value)
    return {name: Spread(tuple(each)) for name, each in values.items()}


class Bandwidth:
    """Reads a large buffer with all of torch's threads. A call returns GB/s (1e9 bytes), the best of three reads."""

    def __init__(self, size: int = BANDWIDTH_PROBE_BYTES):
        self._buffer = torch.ones(size // 4)
        # As the weights are kept: in 4 KiB pages the same processor may read at half the speed.
        self._arena = native().Arena()
        self._arena.add(self._buffer)
        self._arena.use_large_pages()

    def __call__(self) -> float:
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            self._buffer.sum()
            seconds.append(time.perf_counter() - begin)
        return self._buffer.numel() * 4 / min(seconds) / 1e9


class TokenClock(BaseStreamer):
    """A streamer that notes when each token came. The first put is the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

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
    """Greedy `model.generate`; a call returns decode tokens/s by TokenClock. `tokens` are those of the last call.

    options: more arguments of generate.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor, new_tokens: int, **options: Any):
        self._model, self._ids, self._new_tokens, self._options = model, input_ids, new_tokens, options
        self.tokens: list[int] = []

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


def step_replay(runtime: Runtime, plan: Plan, position: int, rows: int = 1) -> Callable[[], None]:
    """One recorded decode step of `plan` for `rows` rows at `position`, to be called over and over: without the
    dispatcher and all else that is not the step. The runtime's cache is overwritten, and all its replays for as many
    rows are at the position given last."""
    cache = runtime.engine.cache
    for tensor in (cache.k, cache.v):
        tensor[:, :, :, : position + 1] = kv_line.kept_as(
            torch.full((runtime.config.head_dim,), 0.1), tensor.dtype
        )
    buffers: StepBuffers = runtime.engine.for_rows(rows).buffers
    program = runtime.backend.record(lambda ops: runtime.engine.decoder.decode_step(ops, plan, buffers))
    buffers.pos.fill_(position)
    return program.replay


def step_bytes(runtime: Runtime, plan: Plan, position: int) -> int:
    """Weight and K,V bytes that the step of `step_replay` reads."""
    (kv_bytes,) = runtime.engine.kv_bytes([plan], lengths=[position], ends=[position])
    return runtime.engine.decoder.step_bytes(plan) + kv_bytes


def teacher_forced(runtime: Runtime, tokens: Tensor, progress: Callable[[], None] = lambda: None) -> Tensor:
    """Negative log-likelihoods in nats, float64 [B, T - 1]: of each token of tokens [B, T] after those before it.

    By the recorded decode steps that `generate` replays, the policy's layers at each, with the given token in the place
    of the chosen one: quantised activations exist only there. A row's first token goes through the prefill.
    progress: called after each step.
    """
    losses = []
    for logits, target in zip(
        runtime.forced_logits(list(tokens[:, :1]), tokens[:, 1:]), tokens[:, 1:].T, strict=True
    ):
        losses.append(F.cross_entropy(logits, target, reduction="none").double())
        progress()
    return torch.stack(losses, dim=1)


def versions(packages: Sequence[str] = ("d3rt", "torch", "transformers")) -> dict[str, str]:
    """Python's version and those of the installed packages; "not installed" for one that is not."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, and operating system."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(("model name", "Processor")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
