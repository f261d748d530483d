"""CachedSequence: which tokens one line of the K,V cache holds, and how each position came about.

From that follows what a next turn may use of it: positions whose K,V is there, those that can be filled from hidden
states that were kept, and those that must run through the layers again. What is really in memory is KVCache's business,
how far each layer's K,V is complete its `filled`; who runs and fills is session.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from d3rt.plan import Action, LayerSet, Plan


class Fill(NamedTuple):
    """K,V of `layer` at positions start .. stop - 1, to be made of the hidden states that were kept in `gap`."""

    layer: int
    gap: int
    start: int
    stop: int


@dataclass
class CachedSequence:
    """tokens[p] was consumed at position p by a step of plans[p], the prefill's included."""

    tokens: list[int] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_gaps(self) -> int:
        """Gaps in which hidden states of some position are kept."""
        return max((plan.num_gaps for plan in set(self.plans)), default=0)

    def shared(self, tokens: Sequence[int]) -> int:
        """How many tokens at the start are the same."""
        for at, (ours, theirs) in enumerate(zip(self.tokens, tokens, strict=False)):
            if ours != theirs:
                return at
        return min(len(self.tokens), len(tokens))

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on."""
        del self.tokens[length:], self.plans[length:]

    def append(self, tokens: Sequence[int], plans: Sequence[Plan]) -> None:
        """Positions that were written; as many plans as tokens."""
        if len(tokens) != len(plans):
            raise ValueError(f"{len(tokens)} tokens and {len(plans)} plans: each position has one of both.")
        self.tokens += tokens
        self.plans += plans

    def copy(self) -> CachedSequence:
        return CachedSequence(list(self.tokens), list(self.plans))

    def exact(self, prompt_set: LayerSet, stop: int) -> int:
        """How many positions at the start, up to `stop`, are what a prefill through prompt_set makes of these tokens:
        every one of them ran exactly these sublayers."""
        for at, plan in enumerate(self.plans[:stop]):
            if plan.layer_set != prompt_set:
                return at
        return min(stop, len(self.plans))

    def repairs(self, reads: Sequence[int], filled: Sequence[int], stop: int) -> tuple[int, list[Fill]]:
        """(limit, fills): once `fills` are done, the layers in `reads` have K,V of positions 0 .. limit - 1; limit is
        at most `stop`, and less where a hole has no hidden state to be filled from. filled[layer]: see KVCache."""
        limit = stop
        for layer in reads:
            for at in range(filled[layer], limit):
                if self.plans[at].attention[layer] is not Action.KEEP:
                    limit = at
                    break
        fills: list[Fill] = []
        gap_of = {plan: plan.gaps for plan in set(self.plans)}
        for layer in reads:
            for at in range(filled[layer], limit):
                gap = gap_of[self.plans[at]][layer]
                last = fills[-1] if fills else None
                if last and (last.layer, last.gap, last.stop) == (layer, gap, at):
                    fills[-1] = last._replace(stop=at + 1)
                else:
                    fills.append(Fill(layer, gap, at, at + 1))
        return limit, fills
