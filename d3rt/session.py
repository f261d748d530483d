"""Session: a conversation whose K,V is kept from turn to turn.

A turn reads only what is new. What the turns before left in the cache is used as far as the tokens are the same; where
it has holes, because steps skipped layers, it is repaired first, as kv_fill says. The cache's line 0 belongs to one
session at a time: another session or a plain `generate` may take it, and the K,V of the one before is put away and
brought back when it is needed.

A turn that raises leaves the conversation as it was before; a stream that is closed early keeps what it has handed out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d3rt.cached_sequence import CachedSequence
from d3rt.detokenizer import Detokenizer
from d3rt.errors import ModelNotFoundError, PolicyError, UnsupportedModelError, UnsupportedOptionError
from d3rt.generation import Request, resolve
from d3rt.kv_cache import Line
from d3rt.plan import Action, LayerSet, Plan
from d3rt.policies import Policy
from d3rt.policies.early_exit import Climb
from d3rt.programs import Rows
from d3rt.result import GenerationStats

if TYPE_CHECKING:
    from d3rt.runtime import Runtime

VERSION = 1
LINE = 0  # of the cache: where a session's K,V is while it is used
REFUSED = ("attention_mask", "input_ids", "num_return_sequences", "return_dict_in_generate", "streamer")


@dataclass(frozen=True)
class Reply:
    """What a turn answered, and what it took. Positions are tokens of the conversation."""

    tokens: tuple[int, ...]
    text: str | None  # without special tokens; None without a tokenizer
    reused: int  # positions whose K,V was taken over from earlier turns
    filled: int  # of these, positions in which some layer was filled from a kept hidden state first
    recomputed: int  # positions that were cached, and ran through the layers again
    read: int  # positions that were new
    repair_seconds: float  # of the fills; what is recomputed is part of the prefill
    stats: GenerationStats

    def __str__(self) -> str:
        return self.text if self.text is not None else str(list(self.tokens))


@dataclass(frozen=True)
class _Turn:
    """What a turn has changed: before it the conversation's tokens were the first `shared` of those after it, and then
    `tail` (nothing, unless it was rendered or said anew); messages: those before it; steps: of the turns before it."""

    shared: int
    tail: tuple[int, ...]
    messages: tuple[dict[str, Any], ...] | None
    steps: int

    @property
    def length(self) -> int:
        """Tokens before it."""
        return self.shared + len(self.tail)


class Session:
    """A conversation; made by `Runtime.session`. `ids` are all its tokens, `messages` its messages where it has
    them."""

    def __init__(self, runtime: Runtime, policy: Policy, kv_fill: str, restart_steps: bool):
        self._runtime = runtime
        self._policy = policy
        self.kv_fill = kv_fill
        self.restart_steps = restart_steps
        self.ids: list[int] = []
        self.messages: list[dict[str, Any]] | None = None
        self.last_reply: Reply | None = None
        self._steps = 0  # of all turns
        self._turns: list[_Turn] = []
        self._cached = CachedSequence()
        self._away: Line | None = None  # a copy of the K,V as it is now, if there is one

    def __repr__(self) -> str:
        return (
            f"Session({len(self.ids)} tokens, {len(self._turns)} turns, {len(self._cached)} cached, {self._policy!r}, "
            f"kv_fill={self.kv_fill!r})"
        )

    @property
    def policy(self) -> Policy:
        """May be set between turns, to a policy or its text."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy | str) -> None:
        self._policy = self._runtime._checked_policy(policy)

    @property
    def turns(self) -> int:
        """Turns that were answered and not taken back."""
        return len(self._turns)

    @property
    def cached_tokens(self) -> int:
        """Tokens at the start of the conversation of which K,V is kept, in whole or in part."""
        return len(self._cached)

    @property
    def nbytes(self) -> int:
        """Bytes of K,V that this session holds beside the runtime's cache."""
        return self._away.nbytes if self._away else 0

    # -- a turn --------------------------------------------------------------------------------------------------------

    def send(self, prompt: Any, *, whole: bool = False, **options: Any) -> Reply:
        """One turn: reads `prompt`, answers, and keeps both.

        prompt: chat messages (dicts with role and content), rendered with the tokenizer's chat template; text, which is
            a user's message where there is such a template, else text that goes on; or token ids, a sequence or a
            tensor [T] or [1, T]. It is what is new; with whole=True it is the whole conversation, and replaces what was
            said so far. Either way whatever tokens are the same as those cached, from the start on, are not read again.
        options: `generate`'s, but for those that make no sense for one row.

        Raises, before any work starts, ValueError for a conversation that would not fit max_seq_len, and what
        `generate` raises. Whatever it raises, the conversation is as it was.
        """
        for _ in self._turn(prompt, whole, options, streaming=False):
            pass
        return self.last_reply

    def stream(self, prompt: Any, *, whole: bool = False, **options: Any) -> Iterator[str] | Iterator[int]:
        """`send`, yielding text as it comes, or token ids where there is no tokenizer; `last_reply` has the rest.
        Closed early, it keeps what it has yielded, as if the answer had ended there."""
        return self._turn(prompt, whole, options, streaming=True)

    def _turn(self, prompt: Any, whole: bool, options: Mapping[str, Any], streaming: bool) -> Iterator[Any]:
        """Checks now, and returns what does the turn when it is iterated."""
        runtime = self._runtime
        for name in REFUSED:
            if options.get(name) is not None:
                raise UnsupportedOptionError(f"{name}: a session has one row and no padding; leave it out.")
        ids, messages = self._conversation(prompt, whole)
        if not ids:
            raise ValueError("an empty conversation: a turn needs at least one token.")
        request = resolve(
            runtime.config,
            runtime.generation_config,
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            **options,
        )
        first = 0 if self.restart_steps else self._steps
        plans = runtime._plans(request, self._policy, self.kv_fill, first)
        return self._run(request, plans, messages, streaming)

    def _conversation(self, prompt: Any, whole: bool) -> tuple[list[int], list[dict] | None]:
        """All tokens of the conversation with `prompt`, and all its messages."""
        tokenizer = self._runtime.tokenizer
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(prompt, Mapping):
            prompt = [prompt]
        if isinstance(prompt, str) and template:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(
                    "this runtime has no tokenizer: send token ids, or compile(..., tokenizer=tokenizer)."
                )
            prompt = tokenizer(prompt, add_special_tokens=whole or not self.ids).input_ids
        is_chat = not isinstance(prompt, Tensor) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if is_chat and not template:
            raise ValueError(
                "chat messages need a tokenizer with a chat template: send token ids, or compile(..., "
                "tokenizer=tokenizer)."
            )
        if not whole and self.ids and is_chat != (self.messages is not None):
            raise ValueError(
                f"this conversation is of {'messages' if self.messages is not None else 'token ids'}, and so must be "
                "what follows; whole=True begins anew."
            )
        if is_chat:
            messages = [*([] if whole else self.messages or []), *map(dict, prompt)]
            encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            return list(encoded["input_ids"]), messages
        if isinstance(prompt, Tensor):
            prompt = prompt.flatten().tolist()
        return [*([] if whole else self.ids), *map(int, prompt)], None

    def _run(
        self, request: Request, plans: Sequence[Plan | Climb], messages: list[dict] | None, streaming: bool
    ) -> Iterator[Any]:
        runtime = self._runtime
        text = Detokenizer(runtime.tokenizer) if streaming and runtime.tokenizer is not None else None
        ids, turn = request.prompts[0].tolist(), _Reading(plans)
        new: list[int] = []
        with runtime.engine.exclusive():
            answering = runtime.engine.generate(
                request,
                plans,
                [],
                [],
                wait_for_all=not streaming,
                read=lambda *given: self._read(turn, *given),
            )
            try:
                for tokens in answering:
                    new.append(int(tokens[0]))
                    if text is None:
                        yield new[-1]
                    elif new[-1] not in request.eos_tokens and (piece := text.put(new[-1])):
                        yield piece
            except GeneratorExit:
                answering.close()
                self._keep(turn, ids, new, messages)
                raise
            except BaseException:
                self._forget(turn)
                raise
            self._keep(turn, ids, new, messages)
        if text is not None and (piece := text.end()):
            yield piece

    def _read(self, turn: _Reading, prompts: Sequence[Tensor], layers: LayerSet, rows: Rows) -> None:
        """Repairs what is cached as far as this turn can use it, and reads the rest of the prompt."""
        runtime, cached = self._runtime, self._cached
        runtime.engine.lend(self)
        ids = prompts[0].tolist()
        # The last token is always read: its logits are where the answer starts.
        turn.shared = min(cached.shared(ids), len(ids) - 1)
        begin = time.perf_counter()
        turn.start, fills = self._usable(turn, layers)
        self._away = None  # from here on the line changes
        cached.truncate(turn.shared)
        runtime.engine.cache.truncate(LINE, turn.shared)
        with runtime.backend.scope():
            for fill in fills:
                hidden = runtime.engine.cache.hidden[fill.gap][LINE, fill.start : fill.stop]
                runtime.engine.decoder.fill(
                    fill.layer, hidden, runtime.engine.cache, LINE, fill.start, rows.buffers
                )
                runtime.engine.cache.filled[fill.layer, LINE] = fill.stop
        turn.filled = len({at for fill in fills for at in range(fill.start, fill.stop)})
        turn.repair_seconds = time.perf_counter() - begin
        cached.truncate(turn.start)
        runtime.engine.prefill(prompts, layers, rows, [turn.start])
        turn.rows = rows

    def _usable(self, turn: _Reading, layers: LayerSet):
        """How many positions are used as they are once the fills are done, and the fills."""
        cached = self._cached
        filled = self._runtime.engine.cache.filled[:, LINE].tolist()
        reads = layers.attention
        for plan in turn.plans[1:]:
            reads |= plan.layer_set.attention
        reads = [layer for layer in range(layers.num_layers) if reads >> layer & 1]
        stop = turn.shared
        if self.kv_fill in ("auto", "recompute"):
            stop = cached.exact(layers, stop)
        return cached.repairs(reads, filled, stop)

    def _keep(self, turn: _Reading, ids: list[int], new: list[int], messages: list[dict] | None) -> None:
        """The turn has ended with these new tokens: the conversation and the cache go on from here."""
        if not new or turn.rows is None:  # closed before the first token
            return self._forget(turn)
        runtime, cached = self._runtime, self._cached
        # Every token was consumed but the last one.
        tokens = [*ids[turn.start :], *new[:-1]]
        # What a step did that decides its depth while it runs, is known now.
        ran = [getattr(step, "plan", step) for step in turn.rows.ran(turn.plans[: len(new)])]
        plans = [ran[0]] * (len(ids) - turn.start) + ran[1:]
        cached.append(tokens, plans)
        runtime.engine.cache.truncate(LINE, len(cached))
        shared = _shared(self.ids, ids)
        said = tuple(self.messages) if self.messages is not None else None
        self._turns.append(_Turn(shared, tuple(self.ids[shared:]), said, self._steps))
        self.ids = [*ids, *new]
        self._steps += len(new)
        text = (
            runtime.tokenizer.decode(new, skip_special_tokens=True) if runtime.tokenizer is not None else None
        )
        self.messages = [*messages, {"role": "assistant", "content": text}] if messages is not None else None
        self.last_reply = Reply(
            tokens=tuple(new),
            text=text,
            reused=turn.start,
            filled=turn.filled,
            recomputed=turn.shared - turn.start,
            read=len(ids) - turn.shared,
            repair_seconds=turn.repair_seconds,
            stats=runtime.last_run,
        )

    def _forget(self, turn: _Reading) -> None:
        """The turn has failed: what it wrote is not there."""
        if turn.start is not None:
            self._cached.truncate(turn.start)
            self._runtime.engine.cache.truncate(LINE, len(self._cached))

    # -- the conversation ----------------------------------------------------------------------------------------------

    def fork(self) -> Session:
        """A second conversation that has said the same so far, and goes its own way from here; K,V is shared until one
        of them goes on."""
        runtime = self._runtime
        with runtime.engine.exclusive():
            if runtime.engine.tenant is not None and runtime.engine.tenant() is self:
                with runtime.backend.scope():
                    self._put_away()
            fork = Session(runtime, self._policy, self.kv_fill, self.restart_steps)
            fork.ids, fork._steps, fork._turns = list(self.ids), self._steps, list(self._turns)
            fork.messages = [dict(each) for each in self.messages] if self.messages is not None else None
            fork._cached, fork._away, fork.last_reply = self._cached.copy(), self._away, self.last_reply
        return fork

    def rewind(self, turns: int | None = None, *, tokens: int | None = None) -> None:
        """Takes back the last `turns` turns (1), or what comes after the first `tokens` tokens, and with it every turn
        that goes further. K,V of what is left stays. ValueError when there are not so many."""
        if turns is not None and tokens is not None:
            raise ValueError(f"rewind(turns={turns}, tokens={tokens}): give one of them.")
        turns = 1 if turns is None else turns
        if tokens is None and not 0 <= turns <= len(self._turns):
            raise ValueError(f"rewind(turns={turns}): this conversation has {len(self._turns)} turns.")
        if tokens is not None and not 0 <= tokens <= len(self.ids):
            raise ValueError(f"rewind(tokens={tokens}): this conversation has {len(self.ids)} tokens.")
        runtime = self._runtime
        with runtime.engine.exclusive():
            if tokens is None:
                for _ in range(turns):
                    back = self._take_turn_back()
                    self.ids = [*self.ids[: back.shared], *back.tail]
            else:
                end = len(self.ids)
                self.ids = self.ids[:tokens]
                while self._turns and end > tokens:
                    back = self._take_turn_back()
                    end = back.length
                    if back.tail:  # the turns before it were of another conversation
                        self._turns = []
            kept = self._cached.shared(self.ids)
            if runtime.engine.tenant is not None and runtime.engine.tenant() is self:
                runtime.engine.cache.truncate(LINE, kept)
            if len(self._cached) > kept:
                self._cached.truncate(kept)
                if self._away is not None:
                    self._away = _shortened(self._away, kept)

    def _take_turn_back(self) -> _Turn:
        back = self._turns.pop()
        self._steps, self.last_reply = back.steps, None
        self.messages = list(back.messages) if back.messages is not None else None
        return back

    def _put_away(self) -> None:
        """Copies the K,V out of the cache, unless there is a copy already."""
        if self._away is None:
            self._away = self._runtime.engine.cache.take(LINE, len(self._cached), self._cached.num_gaps)

    def _take_back(self) -> None:
        """Into the cache."""
        if self._away is not None:
            self._runtime.engine.cache.put(LINE, self._away)
        else:  # nothing was ever cached
            self._runtime.engine.cache.truncate(LINE, 0)

    # -- in a file -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the conversation and its K,V to a safetensors file, all or nothing; returns its path. PolicyError for
        a policy that has no name, OSError when the disk does not take it."""
        runtime, path = self._runtime, Path(path).expanduser().resolve()
        policy = self._policy.to_dict()
        with runtime.engine.exclusive():
            if runtime.engine.tenant is not None and runtime.engine.tenant() is self:
                with runtime.backend.scope():
                    self._put_away()
            line = self._away
            distinct = list(dict.fromkeys(self._cached.plans))
            number = {plan: at for at, plan in enumerate(distinct)}
            values = {
                "version": VERSION,
                "model": _fingerprint(runtime),
                "policy": policy,
                "kv_fill": self.kv_fill,
                "restart_steps": self.restart_steps,
                "ids": self.ids,
                "messages": self.messages,
                "steps": self._steps,
                "turns": [[turn.shared, turn.tail, turn.messages, turn.steps] for turn in self._turns],
                "cached": self._cached.tokens,
                "plans": [_text(plan) for plan in distinct],
                "plan_of": [number[plan] for plan in self._cached.plans],
            }
        tensors = {} if line is None else {"k": line.k, "v": line.v, "filled": line.filled}
        if line is not None:
            tensors |= {f"hidden.{gap}": hidden for gap, hidden in enumerate(line.hidden)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                temporary,
                {"d3rt.session": json.dumps(values)},
            )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, runtime: Runtime, path: str | os.PathLike[str]) -> Session:
        """See Runtime.load_session."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise ModelNotFoundError(f"session {str(path)!r}: there is no such file.")
        try:
            with safe_open(path, "pt") as file:
                values = json.loads((file.metadata() or {})["d3rt.session"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._from_file(runtime, values, tensors)
        except (SafetensorError, KeyError, TypeError, IndexError, json.JSONDecodeError, PolicyError) as error:
            raise UnsupportedModelError(f"session {str(path)!r} cannot be read: {error!r}.") from error
        except _Mismatch as error:
            raise UnsupportedModelError(f"session {str(path)!r}: {error}") from error

    @classmethod
    def _from_file(cls, runtime: Runtime, values: dict[str, Any], tensors: dict[str, Tensor]) -> Session:
        if values["version"] != VERSION:
            raise _Mismatch(f"its format is version {values['version']}; this d3rt reads {VERSION}.")
        if values["model"] != _fingerprint(runtime):
            raise _Mismatch(
                "another model made it, or the same with other widths, and its K,V means nothing to this one; "
                "compile the model that it was saved with."
            )
        session = cls(
            runtime, Policy.from_dict(values["policy"]), str(values["kv_fill"]), bool(values["restart_steps"])
        )
        session.ids, session.messages = list(values["ids"]), values["messages"]
        session._steps = int(values["steps"])
        session._turns = [
            _Turn(int(shared), tuple(tail), tuple(said) if said is not None else None, int(steps))
            for shared, tail, said, steps in values["turns"]
        ]
        known = [_plan(text) for text in values["plans"]]
        session._cached = CachedSequence(list(values["cached"]), [known[at] for at in values["plan_of"]])
        length, layers = len(session._cached), runtime.config.num_hidden_layers
        if length > runtime.max_seq_len:
            raise _Mismatch(f"it has {length} tokens, which exceed max_seq_len={runtime.max_seq_len}.")
        if len(session._cached.plans) != length or any(plan.num_layers != layers for plan in known):
            raise _Mismatch("it is damaged: its tokens and plans do not fit together.")
        if tensors:
            cache = runtime.engine.cache
            line_shape = (layers, cache.k.shape[2], length, cache.k.shape[4])
            hidden = tuple(tensors[f"hidden.{gap}"] for gap in range(session._cached.num_gaps))
            line = Line(tensors["k"], tensors["v"], hidden, tensors["filled"])
            fits = all(each.shape == line_shape and each.dtype == cache.k.dtype for each in (line.k, line.v))
            fits &= all(each.shape == (length, runtime.config.hidden_size) for each in hidden)
            fits &= line.filled.shape == (layers,) and line.filled.dtype == torch.int32
            if not fits or int(line.filled.max()) > length:
                raise _Mismatch("it is damaged: its tensors do not have the shapes of its tokens.")
            device = cache.k.device
            session._away = Line(
                line.k.to(device), line.v.to(device), tuple(each.to(device) for each in hidden), line.filled
            )
        elif length:
            raise _Mismatch("it is damaged: it has tokens and no K,V.")
        return session


def _shared(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens at the start are the same."""
    return CachedSequence(list(ours)).shared(theirs)


class _Mismatch(Exception):
    """Why a file is no session of this runtime."""


@dataclass
class _Reading:
    """What a turn has found and done so far."""

    plans: Sequence[Plan | Climb]
    shared: int = 0  # tokens at the start that were cached
    start: int | None = None  # where reading began; None before anything was changed
    filled: int = 0
    repair_seconds: float = 0.0
    rows: Rows | None = None  # what the prompt was read with, once it was


def _shortened(line: Line, length: int) -> Line:
    return Line(
        line.k[:, :, :length],
        line.v[:, :, :length],
        tuple(hidden[:length] for hidden in line.hidden),
        line.filled.clamp(max=length),
    )


_LETTERS = {Action.RUN: "r", Action.FILL: "f", Action.KEEP: "k", Action.SKIP: "-"}
_ACTIONS = {letter: action for action, letter in _LETTERS.items()}


def _text(plan: Plan) -> list[str]:
    """A plan in a file: a letter for each layer, of its attention and of its MLP."""
    return ["".join(map(_LETTERS.get, actions)) for actions in (plan.attention, plan.mlp)]


def _plan(text: Sequence[str]) -> Plan:
    attention, mlp = text
    return Plan([_ACTIONS[each] for each in attention], [_ACTIONS[each] for each in mlp])


def _fingerprint(runtime: Runtime) -> str:
    """The same for runtimes whose K,V are the same: config, widths, and the weights' norms, which no two models
    share."""
    digest = hashlib.sha256(repr((runtime.config, str(runtime.widths), str(runtime.dtype))).encode())
    for layer in runtime.engine.decoder.weights.layers:
        for norm in (layer.attention_norm, layer.mlp_norm):
            digest.update(norm.cpu().numpy().tobytes())
    return digest.hexdigest()
