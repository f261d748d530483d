"""Greedy search: the layer whose removal hurts the likelihood of the texts least goes first, then the next.

One pass over the texts for each candidate. What a candidate changes begins above it, so its pass starts from the kept
state below: half of the work of a whole pass, on average, and the same numbers. Every set found on the way is part of
the one before: what is found for keep=20 is found for keep=24, minus four layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from d3rt.policies import StaticLayers
from d3rt.policies.base import check_integer
from d3rt.progress import Bar
from d3rt.search.stack import MAX_TOKENS, Stack, check_keep


@dataclass(frozen=True)
class GreedyPath:
    """The layers in the order in which they went, and what was left."""

    num_layers: int
    removed: tuple[int, ...]
    nll: tuple[float, ...]  # nats a token with the first n of `removed` gone: one more than those

    def policy(self, keep: int, prompt: str = "full") -> StaticLayers:
        """The set of `keep` layers on this path."""
        fewest = self.num_layers - len(self.removed)
        if not fewest <= check_integer("GreedyPath.policy", "keep", keep) <= self.num_layers:
            raise ValueError(
                f"GreedyPath.policy(keep={keep}): this path has the sets of {fewest} to {self.num_layers} layers; "
                "search again with a smaller keep."
            )
        return StaticLayers.without(self.removed[: self.num_layers - keep], self.num_layers, prompt)


def greedy_path(
    model: nn.Module | str | os.PathLike[str] | None,
    texts: Any,
    *,
    keep: int,
    tokenizer: Any = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> GreedyPath:
    """The path from all layers down to `keep`; of equally good candidates the lower layer goes.

    The whole text runs through the remaining layers, as through a model from which the others were deleted.
    """
    stack = Stack(model, texts, tokenizer, max_tokens)
    count = check_keep("greedy", keep, len(stack))
    left = list(range(len(stack)))
    predicted = sum(len(ids) - 1 for ids in stack.texts)
    passes = sum(len(stack) - gone for gone in range(len(stack) - count))
    removed: list[int] = []
    with stack.running(), Bar("greedy search", passes * len(stack.texts), progress) as bar:
        nll = [_base_loss(stack) / predicted]
        while len(left) > count:
            losses = _losses_without_each(stack, left, bar)
            at = min(range(len(left)), key=lambda each: (losses[each], each))
            removed.append(left.pop(at))
            nll.append(losses[at] / predicted)
    return GreedyPath(len(stack), tuple(removed), tuple(nll))


def greedy(
    model: nn.Module | str | os.PathLike[str] | None,
    texts: Any,
    *,
    keep: int,
    prompt: str = "full",
    tokenizer: Any = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> StaticLayers:
    """The `keep` layers that `greedy_path` leaves; prompt as in `shortgpt`."""
    found = greedy_path(
        model, texts, keep=keep, tokenizer=tokenizer, max_tokens=max_tokens, progress=progress
    )
    return found.policy(keep, prompt)


def _base_loss(stack: Stack) -> float:
    walks = (stack.read(ids) for ids in stack.texts)
    return sum(walk.loss(walk.states[-1]) for walk in walks)


def _losses_without_each(stack: Stack, left: list[int], bar: Bar) -> list[float]:
    """Summed loss over all texts with each of the layers in `left` gone, the others of `left` in place."""
    losses = [0.0] * len(left)
    for ids in stack.texts:
        walk = stack.read(ids)
        before = list(walk.through(left, walk.states[0]))
        for at in range(len(left)):
            *_, last = walk.through(left[at + 1 :], before[at])
            losses[at] += walk.loss(last)
            bar.advance()
    return losses
