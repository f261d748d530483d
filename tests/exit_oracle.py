"""A slow, obvious generate with early exit, in the manner of oracle.py, which early exit is held against.

Hugging Face's modules one by one, one token at a time, the rows of a batch in lockstep and each with a cache of its
own. After each layer count that is an exit, the confidence of every row that goes on is computed as CALM's paper has
it; the least of them decides for all. The layers above get K,V from what their own attention makes of the state left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from oracle import Cache, windows_of
from torch import Tensor
from transformers import PreTrainedModel

import d3rt


@dataclass
class Run:
    """tokens[row] are the row's, eos included; logits[i], depths[i] and confidences[i] are step i's, and the prefill is
    step 0."""

    tokens: list[list[int]]
    logits: list[Tensor]  # of each step, [B, V]; a finished row's are NaN
    depths: list[int]
    confidences: list[list[float]]  # the worst row's at each tested exit
    caches: list[Cache]


class Row:
    """One sequence, part of the way through its layers."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        # A model cast to bfloat16 has rounded RoPE frequencies; a module made afresh has not.
        self.rotary = type(model.model.rotary_emb)(model.config)
        self.cache = Cache(model.config.num_hidden_layers, windows_of(model.config))
        self.finished = False

    def enter(self, token: int, pos: int) -> None:
        self.cache.pos = pos
        self.x = self.model.model.embed_tokens(torch.tensor([[token]]))
        self.cos_sin = self.rotary(self.x, torch.tensor([[pos]]))

    def attend(self, layer: int) -> Tensor:
        block = self.model.model.layers[layer]
        attended, _ = block.self_attn(
            hidden_states=block.input_layernorm(self.x),
            position_embeddings=self.cos_sin,
            attention_mask=None,
            past_key_values=self.cache,
        )
        return attended

    def run(self, layer: int) -> None:
        block = self.model.model.layers[layer]
        self.before = self.x
        self.cache.only_write = False
        self.x = self.x + self.attend(layer)
        self.x = self.x + block.mlp(block.post_attention_layernorm(self.x))

    def fill(self, layers: Sequence[int]) -> None:
        self.cache.only_write = True
        for layer in layers:
            self.attend(layer)

    def logits(self) -> Tensor:
        return self.model.lm_head(self.model.model.norm(self.x))[0, 0]

    def confidence(self, measure: str) -> float:
        if measure == "state":
            return torch.cosine_similarity(self.before[0, 0], self.x[0, 0], dim=0).item()
        top = self.logits().softmax(-1).topk(2).values
        return (top[0] - top[1]).item()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    policy: d3rt.CALM,
    steps: int,
    forced: Sequence[Sequence[int]] | None = None,
    eos: int | None = None,
) -> Run:
    """Greedy tokens of each prompt; forced[row]: feed these instead of the chosen ones."""
    layers = model.config.num_hidden_layers
    rows = [Row(model) for _ in prompts]
    first = []
    for row, prompt in zip(rows, prompts, strict=True):
        for pos, token in enumerate(prompt):
            row.enter(token, pos)
            for layer in range(layers):
                row.run(layer)
        first.append(row.logits())
    run = Run([[] for _ in prompts], [torch.stack(first)], [layers], [[]], [row.cache for row in rows])

    def choose() -> None:
        for row, tokens, logits in zip(rows, run.tokens, run.logits[-1], strict=True):
            if not row.finished:
                tokens.append(int(logits.argmax()))
                row.finished = tokens[-1] == eos

    choose()
    for step in range(1, steps):
        going = [i for i, row in enumerate(rows) if not row.finished]
        if not going:
            break
        for i in going:
            fed = run.tokens[i][-1] if forced is None else forced[i][step - 1]
            rows[i].enter(fed, len(prompts[i]) + step - 1)
        threshold, depth, seen = policy.threshold_at(step), layers, []
        for layer in range(layers):
            for i in going:
                rows[i].run(layer)
            if layer + 1 in policy.exits(layers):
                seen.append(min(rows[i].confidence(policy.measure) for i in going))
                if seen[-1] >= threshold or threshold <= 0:
                    depth = layer + 1
                    break
        logits = torch.full_like(run.logits[0], torch.nan)
        for i in going:
            rows[i].fill(range(depth, layers))
            logits[i] = rows[i].logits()
        run.logits.append(logits)
        run.depths.append(depth)
        run.confidences.append(seen)
        choose()
    return run
