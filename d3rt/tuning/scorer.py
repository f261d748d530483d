"""Scores of policies on items; each pair is run once, and kept in a journal at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from d3rt.evaluation.journal import Journal
from d3rt.evaluation.scoring import BBH_STOPS, GSM8K_STOPS, score_bbh, score_gsm8k
from d3rt.evaluation.tasks import ROWS, continued, losses
from d3rt.evaluation.until import Cost, answer
from d3rt.policies import FullDepth, Policy
from d3rt.runtime import Runtime
from d3rt.tuning.budget import Score
from d3rt.tuning.items import Item

FULL = FullDepth()
_SCORES, _PATH = "scores", "path"  # kinds of results in the journal


class Scorer:
    """Scores by one metric. `new_tokens` bounds what is generated of an item. What the journal holds is not run again.

    Rows that run side by side share the K,V's bytes. So the journal has them as one result: were some of them lost,
    those that are run again would stand in another group, and cost other bytes."""

    def __init__(self, runtime: Runtime, metric: str, new_tokens: int, journal: Journal):
        self._runtime, self._metric, self._new_tokens = runtime, metric, new_tokens
        self._journal = journal
        self._known: dict[tuple[str, str], Score] = {}  # by policy and item
        for (kind, keys, arm), result in journal.results.items():
            if kind == _SCORES:
                for key, score in zip(keys.split(), result["scores"], strict=True):
                    self._known[arm, key] = Score(**score)

    def score(self, policy: Policy, items: Sequence[Item]) -> list[Score]:
        """A score of each item, in their order."""
        arm = str(policy)
        todo = [item for item in items if (arm, item.key) not in self._known]
        rows = min(ROWS, self._runtime.batch_size)
        if self._metric == "exact_match" or policy.name == "calm":  # a batch's exits wait for its last row
            rows = 1
        for at in range(0, len(todo), rows):
            group = todo[at : at + rows]
            scores = self._run(policy, group)
            keys = [item.key for item in group]
            self._journal.add(_SCORES, " ".join(keys), arm, {"scores": [asdict(score) for score in scores]})
            self._known.update({(arm, key): score for key, score in zip(keys, scores, strict=True)})
        return [self._known[arm, item.key] for item in items]

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
        paths = [self._path(item) for item in group]
        tokens = torch.tensor([path["tokens"] for path in paths])
        lengths = [path["length"] for path in paths]
        self._runtime.policy = policy
        steps = zip(self._runtime.forced_logits(heads, tokens), tokens.T, strict=True)
        other = torch.stack([logits.argmax(dim=-1) != chosen for logits, chosen in steps], dim=1)
        stats = self._runtime.last_run
        return [
            _score(int(row[:length].sum()), asdict(Cost.of(stats, length, timed=False)))
            for row, length in zip(other, lengths, strict=True)
        ]

    def _path(self, item: Item) -> dict[str, Any]:
        """Full depth's greedy tokens after the item's head, and how many of them count."""
        key = (_PATH, item.key, str(FULL))
        if key not in self._journal.results:
            head = torch.tensor(item.head)
            tokens, lengths, _ = continued(self._runtime, [head], self._new_tokens, logits=False)
            self._journal.add(*key, {"tokens": tokens[0].tolist(), "length": lengths[0]})
        return self._journal.results[key]

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


def _score(loss: float, cost: dict) -> Score:
    return Score(
        float(loss), int(cost["steps"]), cost["weight_bytes"] + cost["kv_bytes"], cost["depth"], cost["steps"]
    )
