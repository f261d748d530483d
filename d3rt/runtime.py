"""Runtime: a compiled model. `compile` makes one, `load` one that was saved; `generate` and `stream` answer Hugging
Face's call.

It owns the cache, the buffers, the recorded steps and one dispatcher for each batch size, and puts the pieces
together: arguments (generation.py), prefill and decode step (models/decoder.py), schedule (policies/), execution
(backends/). One generation at a time; several runtimes, and several threads on one runtime, may live side by side.
"""

from __future__ import annotations

import copy
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from d3rt import storage
from d3rt.backends import make_backend
from d3rt.backends.base import Needs
from d3rt.detokenizer import Detokenizer
from d3rt.errors import D3rtError, NotFiniteError, UnsupportedOptionError
from d3rt.generation import Request, resolve
from d3rt.kernels import kv_line, reference
from d3rt.kv_cache import KVCache
from d3rt.memory import MemoryReport, buffer_bytes, prefill_bytes
from d3rt.models import family_of
from d3rt.models.decoder import Decoder, nbytes
from d3rt.models.family import EMBED, LM_HEAD
from d3rt.models.loading import open_model
from d3rt.models.source import SharedModule, Source, parameters
from d3rt.plan import LayerSet, Plan
from d3rt.policies import EarlyExit, FullDepth, Policy, parse
from d3rt.policies.base import KV_FILLS
from d3rt.programs import ProgramInfo, Rows
from d3rt.quantize import Width, Widths, width_bytes
from d3rt.result import GenerateOutput, GenerationStats
from d3rt.row_batch import RowBatch
from d3rt.sampling import SamplingParams
from d3rt.session import Session

# A cache longer than this must be asked for: Llama-3's own limit of 131072 would be 17 GB.
DEFAULT_MAX_SEQ_LEN = 8192
PREFILL_CHUNK_TOKENS = 512
MAX_BATCH_SIZE = 16
# How long a wait inside C++ lasts before Python may look at signals.
POLL_SECONDS = 0.05


def compile(
    model: nn.Module | str | os.PathLike | None,
    policy: Policy | str | None = None,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    max_seq_len: int | None = None,
    batch_size: int = 1,
    threads: int | None = None,
    kv_fill: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights: torch.dtype | str | None = None,
    lm_head: torch.dtype | str | None = None,
    kv_cache_dtype: torch.dtype | str | None = None,
) -> Runtime:
    """Makes a Runtime from a Hugging Face causal LM, which is not changed and keeps working.

    model: the model, or what `d3rt.load_model` takes (a folder, a GGUF file, a hub id, None for the embedded one);
        that is read one matrix at a time, so that beside the runtime's weights no full copy of it takes memory.
    policy: which layers each step runs, as a Policy or its text form; None is FullDepth: the same tokens, faster.
    backend: "auto" (cuda where a usable GPU is found, else cpu), "cpu", "cuda", or "reference" (plain PyTorch, for
        tests).
    dtype: of weights and K,V cache: float32, bfloat16 or float16; None keeps the model's. Weights that already have
        it, and are on the backend's device, are shared with the model, not copied.
    weights: the width of the weights alone: a dtype, or "int8" or "int4" (groups of 32 columns; products with them
        quantise the activations to int8). Blocks of a GGUF file that have this width are taken as they are.
    lm_head: the same for the embedding and the lm_head; None is as `weights`, but int8 where those are int4.
    kv_cache_dtype: of the K,V cache alone: a dtype, or "int8" (a float32 scale for each position of each head); None is
        `dtype`, else bfloat16 with int8 and int4 weights.
    max_seq_len: longest sequence, prompt included; None is the model's own limit, at most 8192.
    batch_size: most rows that one `generate` may have (up to 16).
    threads: of the cpu backend's decode steps; None is every core the process may use (affinity, cgroup quota,
        OMP_NUM_THREADS). The prefill uses torch's own threads.
    kv_fill: what becomes of the K,V of a skipped layer, beside what a later step of the same generation reads, which is
        always written at once. "eager" writes it at every step, from the last computed hidden state. "deferred" keeps
        that hidden state, and writes K,V when a session's next turn first reads it. "recompute" does nothing, and the
        next turn runs these tokens through all layers: exact. "auto" is "recompute". See `session`. A policy
        that decides the depth while it runs (CALM) is always "eager".
    tokenizer: for `stream` with text; found by itself when `model` is a path.

    Raises UnsupportedModelError, PolicyError, BackendUnavailableError or ValueError before any work starts.
    """
    _check_options(policy, max_seq_len, batch_size, threads, kv_fill)
    widths = Widths.parse(dtype, weights, lm_head, kv_cache_dtype)
    chosen = make_backend(backend, threads)
    if isinstance(model, nn.Module):
        source = SharedModule(model, chosen.device)
    else:
        source, found = open_model(model, widths.load_dtype)
        tokenizer = tokenizer or found
    return Runtime(source, policy, chosen, widths, max_seq_len, batch_size, kv_fill, tokenizer)


def load(
    folder: str | os.PathLike[str],
    policy: Policy | str | None = None,
    backend: str = "auto",
    max_seq_len: int | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    kv_fill: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kv_cache_dtype: torch.dtype | str | None = None,
) -> Runtime:
    """The Runtime that `Runtime.save` wrote as `folder`: with the same options, the same tokens bit for bit.

    The options are `compile`'s. Policy, max_seq_len, batch_size, kv_fill, tokenizer and kv_cache_dtype are the saved
    ones where they are not given; backend and threads are this machine's. Weights stay as they were saved. They are
    read tensor by tensor into the runtime's own memory, and Hugging Face's model is never made.

    Raises, before any tensor is read: ModelNotFoundError for a folder or file that is not there, UnsupportedModelError
    for one that is damaged, foreign or of a later version, and what `compile` raises for its options.
    """
    _check_options(policy, max_seq_len, 1 if batch_size is None else batch_size, threads, kv_fill or "auto")
    kv_cache = Widths.parse(None, None, None, kv_cache_dtype).kv_cache
    chosen = make_backend(backend, threads)
    saved = storage.open_saved(folder)
    kept = saved.settings
    options = {
        "policy": saved.policy() if policy is None else policy,
        "max_seq_len": kept.max_seq_len if max_seq_len is None else max_seq_len,
        "batch_size": kept.batch_size if batch_size is None else batch_size,
        "kv_fill": kept.kv_fill if kv_fill is None else kv_fill,
    }
    _check_options(**options, threads=threads)  # a settings file can be edited
    widths = replace(kept.widths, kv_cache=kv_cache or kept.widths.kv_cache)
    return Runtime(
        saved.source, backend=chosen, widths=widths, tokenizer=tokenizer or saved.tokenizer(), **options
    )


def _check_options(policy, max_seq_len, batch_size, threads, kv_fill) -> None:
    """Refuses what is wrong whatever the model."""
    for name, value in (("batch_size", batch_size), ("threads", threads), ("max_seq_len", max_seq_len)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r}: it must be a whole number of at least 1.")
    if batch_size > MAX_BATCH_SIZE:
        raise ValueError(
            f"batch_size={batch_size}: at most {MAX_BATCH_SIZE} rows decode together; split the batch."
        )
    _checked_fill(kv_fill)
    if policy is not None and not isinstance(policy, Policy | str):
        raise TypeError(
            f"policy={policy!r}: it must be a d3rt.Policy or its text, such as 'd3:alpha=0.999,start=0.5'."
        )


def _checked_fill(kv_fill: str) -> str:
    if kv_fill not in KV_FILLS:
        raise UnsupportedOptionError(f"kv_fill={kv_fill!r}: choose one of {', '.join(KV_FILLS)}.")
    return kv_fill


class Runtime:
    """A compiled model; made by `d3rt.compile` or `d3rt.load`. `last_run` tells what the last generation did."""

    def __init__(
        self,
        source: Source,
        policy: Policy | str | None,
        backend: Any,
        widths: Widths,
        max_seq_len: int | None,
        batch_size: int,
        kv_fill: str,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        model = source.model
        hf_config = getattr(model, "config", None)
        family = family_of(hf_config)
        self.config = family.config(hf_config)
        self._hf_config = copy.deepcopy(hf_config)
        layers = self.config.num_hidden_layers
        self.policy = parse(policy, num_layers=layers) if isinstance(policy, str) else policy or FullDepth()
        self.policy.validate(layers)
        self.widths = widths.of_model(model.dtype)
        self.dtype = self.widths.kv_cache_dtype
        limit = self.config.max_position_embeddings
        self.max_seq_len = max_seq_len or min(limit, DEFAULT_MAX_SEQ_LEN)
        if self.max_seq_len > limit:
            raise ValueError(
                f"max_seq_len={max_seq_len}: the model has positions for {limit} tokens at most."
            )
        self.batch_size = batch_size
        self.kv_fill = kv_fill
        self.backend = backend
        self.tokenizer = tokenizer
        self.generation_config = getattr(model, "generation_config", None) or GenerationConfig()
        self.last_run: GenerationStats | None = None

        kept = family.widths(model, self.widths.weights, self.widths.lm_head)
        backend.admit(self._needs(kept, parameters(model)))
        with backend.scope():
            made = family.weights(
                source, self.widths.weights, self.widths.lm_head, backend.device, backend.pack
            )
            self._decoder = Decoder(self.config, made, backend.linear, backend.attend)
            cos, sin = family.rope_tables(model, self.max_seq_len)
            self._rope = cos.to(backend.device), sin.to(backend.device)
            self._cache = KVCache(self.config, batch_size, self.max_seq_len, self.dtype, backend.device)
        backend.own_weights(self._decoder.weights.tensors())
        self._shared_bytes = _shared_bytes(model, self._decoder.weights.tensors())
        self._rows: dict[int, Rows] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._owner: int | None = None  # the thread whose generation runs
        self._tenant: weakref.ref[Session] | None = None  # the session whose K,V is in line 0 of the cache

    def _needs(self, widths: Mapping[str, Width], shapes: Mapping[str, Tensor]) -> Needs:
        """What this runtime will ask of its backend, from the widths and shapes of the model's parameters."""
        c = self.config
        matrices = {width for name, width in widths.items() if shapes[name].dim() == 2}
        line = c.num_key_value_heads * kv_line.width(c.head_dim, self.dtype) * self.dtype.itemsize
        return Needs(
            weight_dtypes=frozenset(matrices),
            cache_dtype=self.dtype,
            weights=sum(width_bytes(shapes[name].shape, width) for name, width in widths.items()),
            kv_cache=2 * c.num_hidden_layers * self.batch_size * self.max_seq_len * line
            + self._hidden_bytes(),
            buffers=buffer_bytes(c, self.batch_size, self.max_seq_len),
            prefill=self._prefill_bytes(),
            early_exit=str(self.policy) if isinstance(self.policy, EarlyExit) else None,
            unpacked=max(
                (
                    shapes[name].numel()
                    for name, width in widths.items()
                    if isinstance(width, str)
                    and name not in (EMBED, LM_HEAD)  # a prefill looks up, and stops before
                ),
                default=0,
            ),
            group=c.num_attention_heads // c.num_key_value_heads,
            head_dim=c.head_dim,
        )

    def _hidden_bytes(self) -> int:
        """Of the hidden states that this runtime's own policy keeps."""
        if self.kv_fill != "deferred":
            return 0
        schedule = self.policy.schedule(self.config.num_hidden_layers, self.max_seq_len)
        gaps = max((plan.num_gaps for plan in schedule.every_plan(self.kv_fill)), default=0)
        size = 2 if self.dtype == torch.int8 else self.dtype.itemsize
        return gaps * self.batch_size * self.max_seq_len * self.config.hidden_size * size

    def _prefill_bytes(self) -> int:
        """At most, for one chunk; what the backend's products take comes on top (linear_bytes)."""
        return prefill_bytes(
            self.config,
            min(PREFILL_CHUNK_TOKENS, self.batch_size * self.max_seq_len),
            self.max_seq_len,
            self.widths.weights.itemsize if isinstance(self.widths.weights, torch.dtype) else 4,
            self.dtype.itemsize,
        )

    def __repr__(self) -> str:
        return (
            f"Runtime({self.config.model_type}, {self.config.num_hidden_layers} layers, {self.policy!r}, "
            f"backend={self.backend.name!r}, weights={self.widths}, max_seq_len={self.max_seq_len}, "
            f"batch_size={self.batch_size}, threads={self.backend.threads}, kv_fill={self.kv_fill!r})"
        )

    # -- generating ------------------------------------------------------------------------------------------------

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ):
        """The same call and the same return as Hugging Face's `model.generate`: int64 [B, prompt + new], finished rows
        padded; with return_dict_in_generate a GenerateOutput. The answer is where `inputs` is; Python objects that see
        every step are given CPU tensors.

        Runs in C++ from the first sampled token to the last, except when a Python object must see every step
        (logits_processor, stopping_criteria, stop_strings, max_time, output_scores, output_logits, and options that
        only transformers' own processors implement): then Python drives the same recorded steps.
        `seed` or `generator` fix what do_sample draws; else torch's global generator does. What row r draws at a step
        depends on the seed, the step and r alone, not on the other rows. Beams and other unsupported options raise
        UnsupportedOptionError, an unknown keyword a TypeError. Ctrl-C stops after the current step.
        """
        request = resolve(self.config, self.generation_config, inputs, generation_config, **kwargs)
        plans = self._plans(request)
        with self._exclusive():
            streamer = request.streamer
            if streamer is not None:
                streamer.put(request.input_ids)
            new, scores, logits = [], [], []
            for tokens in self._steps(request, plans, scores, logits, wait_for_all=streamer is None):
                new.append(tokens)
                if streamer is not None:
                    streamer.put(tokens)
            if streamer is not None:
                streamer.end()
            stats = self.last_run  # another thread may generate from here on
        sequences = torch.cat([request.input_ids, torch.stack(new, dim=1)], dim=1).to(request.device)
        if not request.return_dict:
            return sequences
        return GenerateOutput(
            sequences=sequences,
            scores=tuple(each.to(request.device) for each in scores) if request.output_scores else None,
            logits=tuple(each.to(request.device) for each in logits) if request.output_logits else None,
            stats=stats,
        )

    def stream(self, prompt: str | Sequence[Any] | Tensor, **kwargs) -> Iterator[str] | Iterator[int]:
        """Yields the continuation as it is made: text when the runtime has a tokenizer, else token ids.

        prompt: text, chat messages (dicts with role and content), or token ids [T] or [1, T]. kwargs as `generate`.
        Closing the iterator stops the generation.
        """
        ids = self._encode(prompt)
        # One prompt has no padding: a pad token in it (chat templates use theirs to end a turn) is a token.
        kwargs.setdefault("attention_mask", torch.ones_like(ids))
        request = resolve(self.config, self.generation_config, ids, **kwargs)
        if request.batch != 1:
            raise ValueError(f"stream() takes one prompt, not {request.batch}; use generate.")
        if request.streamer is not None:
            raise UnsupportedOptionError("streamer: stream() hands out the text itself; use generate.")
        return self._stream(request, self._plans(request))

    def _stream(self, request: Request, plans: Sequence[Plan]) -> Iterator[Any]:
        text = Detokenizer(self.tokenizer) if self.tokenizer is not None else None
        with self._exclusive():
            for tokens in self._steps(request, plans, [], [], wait_for_all=False):
                token = int(tokens[0])
                if text is None:
                    yield token
                    continue
                if token not in request.eos_tokens and (piece := text.put(token)):
                    yield piece
        if text is not None and (piece := text.end()):
            yield piece

    # -- scoring given tokens --------------------------------------------------------------------------------------

    def forced_logits(self, prompts: Sequence[Tensor], tokens: Tensor) -> Iterator[Tensor]:
        """Yields the logits float32 [B, V], in host memory, from which step i would choose its tokens, for each i.

        The steps are those that `generate` replays, at the depth that the policy gives them; but step i chooses
        tokens[:, i], of int64 [B, N], whatever the logits say. prompts: int64 [T_row], one for each row, not empty.
        `last_run` is as after `generate`.
        """
        count, length = tokens.shape
        forced = _Forced(count, [prompt.cpu() for prompt in prompts])
        longest = max(map(len, forced.prompts), default=0) + length - 1  # the last token is not read
        if len(prompts) != count or not 1 <= count <= self.batch_size or not all(map(len, forced.prompts)):
            raise ValueError(
                f"forced_logits: {len(prompts)} prompts and {count} rows of tokens: there must be as many, 1 to "
                f"{self.batch_size} (batch_size), and no prompt may be empty."
            )
        if length < 1 or longest > self.max_seq_len:
            raise ValueError(
                f"forced_logits: the longest row has {longest} tokens to read, and {length} are forced; there must "
                f"be at least 1 of these, and at most max_seq_len={self.max_seq_len} in all."
            )
        plans = self.policy.schedule(self.config.num_hidden_layers, length).plans(self.kv_fill)
        with self._exclusive():
            rows = self._for_rows(count)
            programs = [rows.number(plan) for plan in plans[1:]]
            self._prepare(rows, programs, None, ())
            begin = time.perf_counter()
            self._prefill(forced.prompts, plans[0].layer_set, rows)
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

    def _encode(self, prompt: Any) -> Tensor:
        if isinstance(prompt, Tensor):
            return prompt if prompt.dim() == 2 else prompt.unsqueeze(0)
        is_text = isinstance(prompt, str)
        is_chat = not is_text and len(prompt) > 0 and isinstance(prompt[0], dict)
        if not is_text and not is_chat:
            return torch.tensor(prompt).reshape(1, -1)
        if self.tokenizer is None:
            raise ValueError(
                "this runtime has no tokenizer: pass token ids, or compile(..., tokenizer=tokenizer)."
            )
        if is_text:
            return self.tokenizer(prompt, return_tensors="pt").input_ids
        return self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    # -- conversations -----------------------------------------------------------------------------------------------

    def session(
        self, policy: Policy | str | None = None, kv_fill: str | None = None, restart_steps: bool = True
    ) -> Session:
        """A conversation, whose K,V is kept from turn to turn: see Session. policy and kv_fill in the place of the
        runtime's own; restart_steps: whether each turn's schedule begins at step 0 again, or goes on counting."""
        return Session(
            self, self._checked_policy(policy), _checked_fill(kv_fill or self.kv_fill), restart_steps
        )

    def serve_batch(
        self, rows: int | None = None, max_seq_len: int | None = None, join_every: int = 1
    ) -> RowBatch:
        """Rows that join and leave one by one, each at its own step: see RowBatch.

        rows: at most so many at a time (batch_size); max_seq_len: of each (the runtime's); join_every: rows that were
        added join together, every so many steps, or at once when no other decodes.
        """
        rows = self.batch_size if rows is None else rows
        length = self.max_seq_len if max_seq_len is None else max_seq_len
        for name, value in (("rows", rows), ("max_seq_len", length), ("join_every", join_every)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: it must be a whole number of at least 1.")
        if rows > MAX_BATCH_SIZE:
            raise ValueError(f"rows={rows}: at most {MAX_BATCH_SIZE} rows decode together.")
        if length > self.max_seq_len:
            raise ValueError(
                f"max_seq_len={length}: the runtime was compiled for {self.max_seq_len}; compile(..., max_seq_len=...)."
            )
        if not self.backend.line_tables:
            raise UnsupportedOptionError(
                f"serve_batch: rows that change places need kernels that backend {self.backend.name!r} has not; "
                "use backend='cpu', or generate with a batch."
            )
        return RowBatch(
            self.backend,
            self._decoder,
            self._rope,
            rows,
            length,
            self.dtype,
            partial(self._row_plans, length),
            self._exclusive,
            PREFILL_CHUNK_TOKENS,
            join_every,
        )

    def _row_plans(
        self, max_seq_len: int, prompt: Any, policy: Policy | str | None, options: Mapping[str, Any]
    ) -> tuple[Request, tuple[Plan, ...]]:
        """The request of one row of a RowBatch and its plans; refuses what does not fit."""
        for name in (
            "attention_mask",
            "input_ids",
            "num_return_sequences",
            "return_dict_in_generate",
            "streamer",
        ):
            if options.get(name) is not None:
                raise UnsupportedOptionError(
                    f"{name}: a row is added alone and without padding; leave it out."
                )
        ids = self._encode(prompt)
        if ids.shape[0] != 1:
            raise ValueError(f"a prompt of shape {tuple(ids.shape)}: rows are added one by one.")
        request = resolve(
            self.config, self.generation_config, ids, attention_mask=torch.ones_like(ids), **options
        )
        length = len(request.prompts[0])
        if length + request.max_new_tokens > max_seq_len:
            raise ValueError(
                f"{length} prompt tokens and {request.max_new_tokens} new ones exceed max_seq_len={max_seq_len}; "
                "lower max_new_tokens, or serve_batch(max_seq_len=...)."
            )
        policy = self._checked_policy(policy)
        if isinstance(policy, EarlyExit):
            raise UnsupportedOptionError(
                f"policy={str(policy)!r}: the layers of a serve_batch's rows must be known before a step; generate "
                "ends steps early, for a whole batch."
            )
        return request, self._plans(request, policy, "auto")

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """The conversation that Session.save wrote to a file. ModelNotFoundError when there is none,
        UnsupportedModelError when it is damaged, or was made by another model or with other widths."""
        return Session.load(self, path)

    def _plans(
        self, request: Request, policy: Policy | None = None, kv_fill: str | None = None, first: int = 0
    ) -> tuple[Plan, ...]:
        """The plan of every step; refuses what does not fit before any work starts.

        policy, kv_fill: in the place of the runtime's own; first: see Policy.schedule.
        """
        if request.batch > self.batch_size:
            raise ValueError(
                f"a batch of {request.batch} rows: this runtime was compiled for {self.batch_size}; "
                f"compile(..., batch_size={request.batch})."
            )
        longest = max(len(prompt) for prompt in request.prompts)
        if longest + request.max_new_tokens > self.max_seq_len:
            raise ValueError(
                f"{longest} prompt tokens and {request.max_new_tokens} new ones exceed max_seq_len={self.max_seq_len}; "
                "lower max_new_tokens, or compile(..., max_seq_len=...)."
            )
        policy = policy or self.policy
        schedule = policy.schedule(self.config.num_hidden_layers, request.max_new_tokens, first)
        return schedule.plans(kv_fill or self.kv_fill)

    def _checked_policy(self, policy: Policy | str | None) -> Policy:
        """A policy for this model, from a policy or its text; None is the runtime's own."""
        if policy is None:
            return self.policy
        layers = self.config.num_hidden_layers
        policy = parse(policy, num_layers=layers) if isinstance(policy, str) else policy
        if not isinstance(policy, Policy):
            raise TypeError(f"policy={policy!r}: it must be a d3rt.Policy or its text.")
        policy.validate(layers)
        return policy

    @contextmanager
    def _exclusive(self):
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

    def _steps(
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
        rows = self._for_rows(request.batch)
        programs = [rows.number(plan) for plan in plans[1:]]
        self._prepare(rows, programs, None if request.stepwise else request.sampling, request.eos_tokens)
        begin = time.perf_counter()
        (read or self._prefill)(request.prompts, plans[0].layer_set, rows)
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

    def _prefill(
        self,
        prompts: Sequence[Tensor],
        layers: LayerSet,
        rows: Rows,
        starts: Sequence[int] | None = None,
    ) -> None:
        """Reads the prompts from positions `starts` on, or from 0 into an empty cache."""
        if starts is None:
            self._lend(None)
            self._cache.reset()
        with self.backend.scope():
            there = [prompt.to(self.backend.device) for prompt in prompts]
            self._decoder.prefill(there, layers, self._cache, rows.buffers, PREFILL_CHUNK_TOKENS, starts)
            rows.first_logits.replay()

    def _prepare(
        self, rows: Rows, programs: Sequence[int], sampling: SamplingParams | None, eos_tokens: Sequence[int]
    ) -> None:
        """Loop.prepare; a session whose K,V that might change has them put away."""
        if not rows.loop.preparing_keeps_cache:
            self._lend(None)
        rows.loop.prepare(programs, sampling, eos_tokens)

    def _lend(self, session: Session | None) -> None:
        """Makes line 0 of the cache this session's, or nobody's; whose it was puts its K,V away."""
        tenant = self._tenant() if self._tenant else None
        if tenant is session:
            return
        with self.backend.scope():
            if tenant is not None:
                tenant._put_away()
            self._tenant = None  # should taking it back fail, it is nobody's
            if session is not None:
                session._take_back()
        self._tenant = weakref.ref(session) if session is not None else None

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
        while wait_for_all and not loop.wait(POLL_SECONDS):
            pass
        step, ended = 0, False
        while not ended:
            tokens, ended = loop.read(step, POLL_SECONDS)
            for at in range(0, len(tokens), request.batch):
                step += 1
                yield torch.tensor(tokens[at : at + request.batch])

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
        rows.replays.update(ran[1:])
        layers = self.config.num_hidden_layers
        head = nbytes([self._decoder.weights.lm_head, self._decoder.weights.norm])
        bytes_of = {plan: rows.weight_bytes(plan) for plan in set(ran[1:])}
        text = {plan: str(plan.layer_set) for plan in set(ran)}
        lengths = [len(prompt) for prompt in request.prompts]
        self.last_run = GenerationStats(
            num_layers=layers,
            batch=request.batch,
            prompt_tokens=tuple(lengths),
            depths=tuple(plan.layer_set.depth for plan in ran),
            layers=tuple(text[plan] for plan in ran),
            weight_bytes=(head, *(bytes_of[plan] for plan in ran[1:])),
            full_weight_bytes=self._decoder.step_bytes(Plan.of(LayerSet.full(layers))),
            kv_bytes=(0, *self._kv_bytes(ran[1:], lengths, rows.loop.pos.tolist())),
            prefill_seconds=prefill_seconds,
            step_seconds=tuple(step_seconds),
        )

    def _kv_bytes(self, ran: Sequence[Plan], lengths: Sequence[int], ends: Sequence[int]) -> Iterator[int]:
        """K,V bytes that each decode step read: at step 1 a prompt of `lengths` and one token more. A row that has
        finished stands still at its position in `ends`."""
        c = self.config
        cache = self._cache.k
        line = 2 * c.num_key_value_heads * cache.shape[-1] * cache.element_size()
        windows = {
            plan: Counter(c.sliding_windows[layer] for layer in plan.layer_set.attention_layers)
            for plan in set(ran)
        }
        for step, plan in enumerate(ran, 1):
            reach = [min(length + step, end + 1) for length, end in zip(lengths, ends, strict=True)]
            yield line * sum(
                count * min(positions, window or positions)
                for window, count in windows[plan].items()
                for positions in reach
            )

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes a folder that `d3rt.load` makes this runtime from, packing nothing again; returns its path.

        In it: the weights as they are kept (safetensors), config.json, generation_config.json and the tokenizer as
        Hugging Face has them, and d3rt.json with policy, widths and the other options. It is written beside its place
        and renamed, so there is no half-written one; an earlier save is replaced.

        SaveError when something is there that no earlier save wrote; PolicyError for a policy that has no name;
        OSError when the disk does not take it.
        """
        settings = storage.Settings(
            self.widths, self.policy.to_dict(), self.kv_fill, self.max_seq_len, self.batch_size
        )
        return storage.save(
            folder,
            settings,
            family_of(self._hf_config).named(self._decoder.weights),
            self._hf_config,
            self.generation_config,
            self.tokenizer,
        )

    # -- what is recorded, and what it takes ---------------------------------------------------------------------

    def _for_rows(self, rows: int) -> Rows:
        if rows not in self._rows:
            with self.backend.scope():
                self._rows[rows] = Rows(self.backend, self._decoder, self._cache, self._rope, rows)
        return self._rows[rows]

    def warmup(self, max_new_tokens: int | None = None, rows: int | None = None) -> int:
        """Records every step that a generation of up to max_new_tokens (default: all that fit) with `rows` rows
        (default: batch_size) can need, so that no later call records; returns how many there are for these rows. On
        cuda also builds their graphs, for greedy tokens or drawn ones, as the generation_config has it."""
        rows = rows or self.batch_size
        if not 1 <= rows <= self.batch_size:
            raise ValueError(f"rows={rows}: it must be in 1..{self.batch_size} (batch_size).")
        steps = max_new_tokens or self.max_seq_len - 1
        with self._exclusive():
            schedule = self.policy.schedule(self.config.num_hidden_layers, steps)
            kept = self._for_rows(rows)
            numbers = [kept.number(plan) for plan in schedule.every_plan(self.kv_fill)]
            defaults = self.generation_config
            sampling = SamplingParams(
                do_sample=bool(defaults.do_sample), repetition_penalty=defaults.repetition_penalty or 1.0
            )
            self._prepare(kept, numbers, sampling, ())
        return sum(1 for _ in kept.recorded())

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

    def memory(self) -> MemoryReport:
        """Bytes held, and the most that will be."""
        weights = nbytes(self._decoder.weights.tensors())
        buffers = nbytes(self._rope) + sum(rows.nbytes for rows in self._rows.values())
        return MemoryReport(
            shared_weights=self._shared_bytes,
            own_weights=weights - self._shared_bytes,
            kv_cache=self._cache.nbytes + self._cache.hidden_bytes,
            buffers=buffers + self.backend.scratch_bytes,
            prefill=self._prefill_bytes()
            + max(
                self.backend.linear_bytes(w)
                for layer in self._decoder.weights.layers
                for w in layer.matrices()
            ),
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


def _shared_bytes(model: nn.Module, weights: Sequence[Tensor]) -> int:
    """Bytes of those weights whose storage is the model's own."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return nbytes([tensor for tensor in weights if tensor.untyped_storage().data_ptr() in storages])
