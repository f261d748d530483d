"""Runtime: a compiled model, whose `generate` and `stream` answer Hugging Face's call.

It puts the pieces together: arguments (generation.py), schedule (policies/), and the engine that runs them (engine.py).
One generation at a time; several runtimes, and several threads on one runtime, may live side by side.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from d3rt import prefill, storage
from d3rt.backends.base import MAX_BATCH_SIZE, Needs
from d3rt.detokenizer import Detokenizer
from d3rt.engine import Engine
from d3rt.errors import UnsupportedOptionError
from d3rt.generation import Request, resolve
from d3rt.kernels import kv_line
from d3rt.kv_cache import KVCache
from d3rt.memory import MemoryReport, buffer_bytes, prefill_bytes
from d3rt.models import family_of
from d3rt.models.decoder import Decoder, nbytes
from d3rt.models.family import EMBED, LM_HEAD
from d3rt.models.source import Source, parameters
from d3rt.plan import Plan
from d3rt.policies import EarlyExit, FullDepth, Policy, parse
from d3rt.policies.base import KV_FILLS
from d3rt.programs import ProgramInfo
from d3rt.quantize import Width, Widths, width_bytes
from d3rt.result import GenerateOutput, GenerationStats
from d3rt.row_batch import RowBatch
from d3rt.sampling import SamplingParams
from d3rt.session import Session

# A cache longer than this must be asked for: Llama-3's own limit of 131072 would be 17 GB.
DEFAULT_MAX_SEQ_LEN = 8192


def checked_fill(kv_fill: str) -> str:
    if kv_fill not in KV_FILLS:
        raise UnsupportedOptionError(f"kv_fill={kv_fill!r}: choose one of {', '.join(KV_FILLS)}.")
    return kv_fill


class Runtime:
    """A compiled model; made by `d3rt.compile` or `d3rt.load`."""

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

        kept = family.widths(model, self.widths.weights, self.widths.lm_head)
        backend.admit(self._needs(kept, parameters(model)))
        with backend.scope():
            made = family.weights(
                source, self.widths.weights, self.widths.lm_head, backend.device, backend.pack
            )
            decoder = Decoder(self.config, made, backend.linear, backend.attend)
            cos, sin = family.rope_tables(model, self.max_seq_len)
            rope = cos.to(backend.device), sin.to(backend.device)
            cache = KVCache(self.config, batch_size, self.max_seq_len, self.dtype, backend.device)
        weights = decoder.weights.tensors()
        backend.own_weights(weights)
        self._shared_bytes = _shared_bytes(model, weights)
        self.engine = Engine(self.config, backend, decoder, rope, cache)

    @property
    def last_run(self) -> GenerationStats | None:
        """What the last generation did; None before the first."""
        return self.engine.last_run

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
            buffers=buffer_bytes(
                c, self.batch_size, self.max_seq_len, MAX_BATCH_SIZE if self.backend.line_tables else 0
            ),
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
            min(prefill.PREFILL_CHUNK_TOKENS, self.batch_size * self.max_seq_len),
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
        with self.engine.exclusive():
            streamer = request.streamer
            if streamer is not None:
                streamer.put(request.input_ids)
            new, scores, logits = [], [], []
            for tokens in self.engine.generate(request, plans, scores, logits, wait_for_all=streamer is None):
                new.append(tokens)
                if streamer is not None:
                    streamer.put(tokens)
            if streamer is not None:
                streamer.end()
            stats = self.engine.last_run  # another thread may generate from here on
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
        with self.engine.exclusive():
            for tokens in self.engine.generate(request, plans, [], [], wait_for_all=False):
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
        prompts = [prompt.cpu() for prompt in prompts]
        longest = max(map(len, prompts), default=0) + length - 1  # the last token is not read
        if len(prompts) != count or not 1 <= count <= self.batch_size or not all(map(len, prompts)):
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
        return self.engine.forced(prompts, tokens, plans)

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
            self, self._checked_policy(policy), checked_fill(kv_fill or self.kv_fill), restart_steps
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
            self.engine.decoder,
            self.engine.rope,
            rows,
            length,
            self.dtype,
            partial(self._row_plans, length),
            self.engine.exclusive,
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
            family_of(self._hf_config).named(self.engine.decoder.weights),
            self._hf_config,
            self.generation_config,
            self.tokenizer,
        )

    # -- what is recorded, and what it takes ---------------------------------------------------------------------

    def warmup(self, max_new_tokens: int | None = None, rows: int | None = None) -> int:
        """Records every step that a generation of up to max_new_tokens (default: all that fit) with `rows` rows
        (default: batch_size) can need, so that no later call records; returns how many there are for these rows. On
        cuda also builds their graphs, for greedy tokens or drawn ones, as the generation_config has it."""
        rows = rows or self.batch_size
        if not 1 <= rows <= self.batch_size:
            raise ValueError(f"rows={rows}: it must be in 1..{self.batch_size} (batch_size).")
        steps = max_new_tokens or self.max_seq_len - 1
        with self.engine.exclusive():
            schedule = self.policy.schedule(self.config.num_hidden_layers, steps)
            kept = self.engine.for_rows(rows)
            numbers = [kept.number(plan) for plan in schedule.every_plan(self.kv_fill)]
            defaults = self.generation_config
            sampling = SamplingParams(
                do_sample=bool(defaults.do_sample), repetition_penalty=defaults.repetition_penalty or 1.0
            )
            self.engine.prefiller.record(self.policy.prompt_set(self.config.num_hidden_layers))
            self.engine.prepare(kept, numbers, sampling, ())
        return sum(1 for _ in kept.recorded())

    def programs(self) -> list[ProgramInfo]:
        """Every recorded step: one for each distinct plan and number of rows."""
        return self.engine.programs()

    def memory(self) -> MemoryReport:
        """Bytes held, and the most that will be."""
        weights = nbytes(self.engine.decoder.weights.tensors())
        return MemoryReport(
            shared_weights=self._shared_bytes,
            own_weights=weights - self._shared_bytes,
            kv_cache=self.engine.cache.nbytes + self.engine.cache.hidden_bytes,
            buffers=self.engine.buffer_bytes,
            prefill=self._prefill_bytes()
            + max(
                self.backend.linear_bytes(w)
                for layer in self.engine.decoder.weights.layers
                for w in layer.matrices()
            ),
        )


def _shared_bytes(model: nn.Module, weights: Sequence[Tensor]) -> int:
    """Bytes of those weights whose storage is the model's own."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return nbytes([tensor for tensor in weights if tensor.untyped_storage().data_ptr() in storages])
