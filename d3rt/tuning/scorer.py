"""Scores of policies on items; each pair is run once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from d3rt.evaluation.scoring import BBH_STOPS, GSM8K_STOPS, score_bbh, score_gsm8k
from d3rt.evaluation.tasks import ROWS, continued, losses
from d3rt.evaluation.until import Cost, answer
from d3rt.policies import FullDepth, Policy
from d3rt.runtime import Runtime
from d3rt.tuning.budget import Score
from d3rt.tuning.items import Item


class Scorer:
    """Scores by one metric. `new_tokens` bounds what is generated of an item."""

    def __init__(self, runtime: Runtime, metric: str, new_tokens: int):
        self._runtime, self._metric, self._new_tokens = runtime, metric, new_tokens
        self._known: dict[tuple[Policy, Item], Score] = {}
        self._paths: dict[Item, tuple[Tensor, int]] = {}  # full depth's tokens [1, N], and how many count

    def score(self, policy: Policy, items: Sequence[Item]) -> list[Score]:
        """A score of each item, in their order."""
        todo = [item for item in items if (policy, item) not in self._known]
        rows = min(ROWS, self._runtime.batch_size)
        if self._metric == "exact_match" or policy.name == "calm":  # a batch's exits wait for its last row
            rows = 1
        for at in range(0, len(todo), rows):
            group = todo[at : at + rows]
            for item, score in zip(group, self._run(policy, group), strict=True):
                self._known[policy, item] = score
        return [self._known[policy, item] for item in items]

    def _run(self, policy: Policy, group: Sequence[Item]) -> list[Score]:
        if self._metric == "exact_match":
            return [self._answered(policy, item) for item in group]
        heads = [torch.tensor(item.head) for item in group]
        if self._metric == "nll":
            lengths = [len(item.forced) for item in group]
            tokens = torch.zeros(len(group), max(lengths), dtype=torch.int64)
            for row, item in enumerate(group):
                tokens[row, : lengths[row]] = torch.tensor(item.forced)
            self._runtime.policy = policy
            results = losses(self._runtime, heads, tokens, lengths)
            return [_score(sum(each["nll"]), each["cost"]) for each in results]
        for item, head in zip(group, heads, strict=True):
            if item not in self._paths:
                path, lengths, _ = continued(self._runtime, [head], self._new_tokens, logits=False)
                self._paths[item] = path, lengths[0]
        tokens = torch.cat([self._paths[item][0] for item in group])
        lengths = [self._paths[item][1] for item in group]
        self._runtime.policy = policy
        steps = zip(self._runtime.forced_logits(heads, tokens), tokens.T, strict=True)
        other = torch.stack([logits.argmax(dim=-1) != chosen for logits, chosen in steps], dim=1)
        stats = self._runtime.last_run
        return [
            _score(int(row[:length].sum()), asdict(Cost.of(stats, length, timed=False)))
            for row, length in zip(other, lengths, strict=True)
        ]

    def _answered(self, policy: Policy, item: Item) -> Score:
        """Numbers after "####" are compared as GSM8K's (flexible), other targets as BBH's."""
        assert item.target is not None
        number = "####" in item.target
        self._runtime.policy = policy
        given = answer(
            self._runtime, torch.tensor([item.head]), GSM8K_STOPS if number else BBH_STOPS, self._new_tokens
        )
        right = (
            score_gsm8k(given.text, item.target)["flexible"]
            if number
            else score_bbh(given.text, item.target)["exact_match"]
        )
        cost = given.cost
        return Score(1 - right, 1, cost.weight_bytes + cost.kv_bytes, cost.depth, cost.steps)


def seconds_per_token(runtime: Runtime, policy: Policy, item: Item, new_tokens: int) -> float:
    """Of one generation's decode steps."""
    runtime.policy = policy
    ids = torch.tensor([item.head])
    runtime.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    times = runtime.last_run.step_seconds[1:]
    return sum(times) / len(times)


FULL = FullDepth()


def _score(loss: float, cost: dict) -> Score:
    return Score(
        float(loss), int(cost["steps"]), cost["weight_bytes"] + cost["kv_bytes"], cost["depth"], cost["steps"]
    )
