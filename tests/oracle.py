"""A slow, obvious generate with layer skipping, which everything else is held against.

It calls the modules of a Hugging Face model one by one: one prompt at a time, one token at a time (the prompt's
too), with a dictionary position -> (K, V) for each layer. Projections, norms, RoPE and attention are Hugging
Face's own; nothing of d3rt's decoder or ops is used. A layer's K,V exist only where a plan ran or filled its
attention, and reading one that does not exist raises ReadHole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from d3rt.plan import Action, Plan


class ReadHole(AssertionError):
    """Attention was to read K,V that no step has written."""


class Cache:
    """What Hugging Face's attention calls to store and fetch K,V, with nothing but what was written in it."""

    def __init__(self, num_layers: int, windows: Sequence[int]):
        self.lines: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(num_layers)]
        self.windows = windows  # 0: no window
        self.pos = 0
        self.only_write = False

    def fork(self) -> Cache:
        """A copy that goes its own way; K,V themselves are never written to."""
        copy = Cache(len(self.lines), self.windows)
        copy.lines = [dict(line) for line in self.lines]
        return copy

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on."""
        self.lines = [{pos: kv for pos, kv in line.items() if pos < length} for line in self.lines]

    def update(self, k: Tensor, v: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Stores K,V [1, G, 1, d] of this token; returns those its attention may see [1, G, T, d]."""
        line = self.lines[layer]
        line[self.pos] = k, v
        if self.only_write:
            return k, v
        window = self.windows[layer]
        first = max(0, self.pos + 1 - window) if window else 0
        missing = [pos for pos in range(first, self.pos + 1) if pos not in line]
        if missing:
            raise ReadHole(f"layer {layer} at position {self.pos} reads positions {missing}, never written")
        seen = [line[pos] for pos in range(first, self.pos + 1)]
        return torch.cat([k for k, _ in seen], dim=2), torch.cat([v for _, v in seen], dim=2)


@dataclass
class Run:
    """One prompt's generation: tokens[i] and logits[i] [V] are step i's."""

    tokens: list[int]
    logits: Tensor  # [steps, V]
    cache: Cache

    def keys(self, layer: int, pos: int) -> Tensor:
        """K [G, d] that was written there."""
        return self.cache.lines[layer][pos][0][0, :, 0]

    def values(self, layer: int, pos: int) -> Tensor:
        """V [G, d] that was written there."""
        return self.cache.lines[layer][pos][1][0, :, 0]


def windows_of(hf_config) -> list[int]:
    """Each layer's sliding window in Hugging Face's reading of the config; 0 is none."""
    window = getattr(hf_config, "sliding_window", None) or 0
    types = getattr(hf_config, "layer_types", None)
    if hf_config.model_type == "llama":
        return [0] * hf_config.num_hidden_layers
    if types is None:
        return [window] * hf_config.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in types]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt: Sequence[int],
    plans: Sequence[Plan],
    forced: Sequence[int] | None = None,
    cache: Cache | None = None,
    start: int = 0,
) -> Run:
    """Greedy tokens of len(plans) steps: plans[0] for every token of the prompt, plans[i] for step i.

    forced: feed these tokens instead of the chosen ones; Run.tokens are then still the argmax of each step.
    cache: what is there of the prompt's first `start` tokens; it is written to.
    """
    # A model cast to bfloat16 has rounded RoPE frequencies; a module made afresh has not.
    rotary = type(model.model.rotary_emb)(model.config)
    cache = cache or Cache(model.config.num_hidden_layers, windows_of(model.config))

    def forward(token: int, pos: int, plan: Plan) -> Tensor:
        cache.pos = pos
        x = model.model.embed_tokens(torch.tensor([[token]]))
        cos_sin = rotary(x, torch.tensor([[pos]]))
        for layer, attention, mlp in plan:
            block = model.model.layers[layer]
            # K,V of a filled layer are what its attention makes of x as it is; what it would give is thrown away.
            # What is kept for later is written at once: when is nobody's business but the runtime's.
            cache.only_write = attention in (Action.FILL, Action.KEEP)
            if attention is not Action.SKIP:
                attended, _ = block.self_attn(
                    hidden_states=block.input_layernorm(x),
                    position_embeddings=cos_sin,
                    attention_mask=None,
                    past_key_values=cache,
                )
                if attention is Action.RUN:
                    x = x + attended
            if mlp is Action.RUN:
                x = x + block.mlp(block.post_attention_layernorm(x))
        return model.lm_head(model.model.norm(x))[0, 0]

    for pos in range(start, len(prompt)):
        logits = [forward(prompt[pos], pos, plans[0])]
    tokens = [int(logits[0].argmax())]
    for step, plan in enumerate(plans[1:], 1):
        fed = tokens[-1] if forced is None else forced[step - 1]
        logits.append(forward(fed, len(prompt) + step - 1, plan))
        tokens.append(int(logits[-1].argmax()))
    return Run(tokens, torch.stack(logits), cache)


def excess(ours: Tensor, same_dtype: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """How far the error of `ours` exceeds what is allowed to a run in `dtype`; at most 1 is right.

    Allowed is twice the error of plain torch in that dtype, both against wider arithmetic, plus 4 eps of the values'
    size (a few roundings), so that a lucky torch run does not ask for more luck. Errors are root mean squares over
    all that is given: the largest of them depends on which step happens to be ill-conditioned, the mean does not,
    and one wrong value in ten thousand still stands out of it.
    """

    def rms(values: Tensor) -> float:
        return values.double().square().mean().sqrt().item()

    exact = exact.double()
    allowed = 2 * rms(same_dtype - exact) + 4 * torch.finfo(dtype).eps * rms(exact)
    return rms(ours - exact) / allowed


@dataclass
class Conversation:
    """Turns one after the other over one cache, as a session has them: kv_fill "recompute" uses of the cache what a
    prefill would have made, the others whatever is there."""

    model: PreTrainedModel
    ids: list[int]
    cache: Cache
    how: list[tuple[int, Plan]]  # of each cached position its token and its plan
    exact: bool = True

    @classmethod
    def new(cls, model: PreTrainedModel, exact: bool) -> Conversation:
        return cls(model, [], Cache(model.config.num_hidden_layers, windows_of(model.config)), [], exact)

    def fork(self) -> Conversation:
        return Conversation(self.model, list(self.ids), self.cache.fork(), list(self.how), self.exact)

    def keep(self, length: int) -> None:
        """Forgets what was cached of positions from `length` on."""
        del self.how[length:]
        self.cache.truncate(length)

    def start(self, ids: Sequence[int], plans: Sequence[Plan]) -> int:
        """The first position that the next turn has to read."""
        reads = {layer for plan in plans for layer in plan.layer_set.attention_layers}
        for pos, (token, plan) in enumerate(self.how[: len(ids) - 1]):
            holes = any(pos not in self.cache.lines[layer] for layer in reads)
            if token != ids[pos] or holes or (self.exact and plan.layer_set != plans[0].layer_set):
                return pos
        return min(len(self.how), len(ids) - 1)

    def send(self, ids: Sequence[int], plans: Sequence[Plan]) -> Run:
        """One turn whose whole conversation is `ids`."""
        start = self.start(ids, plans)
        self.keep(start)
        run = generate(self.model, ids, plans, cache=self.cache, start=start)
        self.ids = [*ids, *run.tokens]
        self.how += [(token, plans[0]) for token in ids[start:]]
        self.how += list(zip(run.tokens, plans[1:], strict=False))
        return run
