"""Forced tokens: what a policy would have chosen from, and at which cost, along a given continuation.

A policy's steps are those of `generate`: token i runs at the depth that token i has in use. Items with long prompts go
through a session, so that a prompt is read once, however many policies go on from it; others side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor

import d3rt
from d3rt.evaluation.intervals import bootstrap
from d3rt.evaluation.journal import Journal, Key
from d3rt.evaluation.scoring import cut
from d3rt.evaluation.until import Cost
from d3rt.policies import EarlyExit, FullDepth, Policy
from d3rt.progress import Bar

FULL = "full"
SHORT_PROMPT = 256  # tokens
PLAIN = {"do_sample": False, "repetition_penalty": 1.0}
Result = dict[str, Any]


class Forced(LogitsProcessor):
    """Makes step i choose tokens[i], and keeps the log-probabilities [V] that it would have chosen from."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens = iter(tokens)
        self.logs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logs.append(F.log_softmax(scores[0].float(), dim=-1))
        forced = torch.full_like(scores, -torch.inf)
        forced[0, next(self._tokens)] = 0
        return forced


@dataclass(frozen=True)
class Item:
    """A prompt, and what is forced after it."""

    name: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


class Teacher:
    """Forces tokens on one runtime; the prompt before is kept from call to call."""

    def __init__(self, fast: d3rt.Runtime):
        self._runtime = fast
        self._session = fast.session(FullDepth())

    def greedy(
        self, prompt: Sequence[int], new: int, stops: Sequence[str] = (), policy: Policy | None = None
    ) -> tuple[tuple[int, ...], str]:
        """Greedy tokens up to end-of-sequence, a stop string or `new`, those that end it among them; and the text."""
        self._session.policy = policy or FullDepth()
        text = ""
        with closing(self._session.stream(list(prompt), whole=True, max_new_tokens=new, **PLAIN)) as pieces:
            for piece in pieces:
                text += piece
                if any(stop in text for stop in stops):
                    break
        return self._session.last_reply.tokens, cut(text, stops)

    def logs(self, items: Sequence[Item], policy: Policy) -> list[tuple[Tensor, Cost]]:
        """Of each item the log-probabilities [N, V] of each step along its tokens, and what the steps cost."""
        if len(items) == 1 or isinstance(policy, EarlyExit):  # a batch would exit by its worst row
            return [self._alone(item, policy) for item in items]
        self._runtime.policy = policy
        longest = max(len(item.tokens) for item in items)
        tokens = torch.zeros(len(items), longest, dtype=torch.int64)
        for row, item in enumerate(items):
            tokens[row, : len(item.tokens)] = torch.tensor(item.tokens)
        prompts = [torch.tensor(item.prompt) for item in items]
        steps = [F.log_softmax(each, dim=-1) for each in self._runtime.forced_logits(prompts, tokens)]
        stats = self._runtime.last_run
        return [
            (torch.stack([step[row] for step in steps[:length]]), Cost.of(stats, length, timed=False))
            for row, length in enumerate(len(item.tokens) for item in items)
        ]

    def _alone(self, item: Item, policy: Policy) -> tuple[Tensor, Cost]:
        self._session.policy = policy
        forced = Forced(item.tokens)
        reply = self._session.send(
            list(item.prompt),
            whole=True,
            max_new_tokens=len(item.tokens),
            eos_token_id=None,
            logits_processor=[forced],
            **PLAIN,
        )
        return torch.stack(forced.logs), Cost.of(reply.stats, len(item.tokens), timed=False)

    def compare(
        self, items: Sequence[Item], arms: Mapping[str, Policy], missing: Iterable[str]
    ) -> Iterable[tuple[str, Item, Result]]:
        """(arm, item, result) for each of the missing arms: nll of the tokens, and agree and kl(full depth || arm), by
        position; cost."""
        full = [logs for logs, _ in self.logs(items, FullDepth())]
        for arm in missing:
            for item, truth, (logs, cost) in zip(items, full, self.logs(items, arms[arm]), strict=True):
                result = {
                    "nll": (-logs.gather(1, torch.tensor(item.tokens)[:, None])[:, 0]).tolist(),
                    "agree": (logs.argmax(-1) == truth.argmax(-1)).int().tolist(),
                    "kl": (truth.exp() * (truth - logs)).sum(-1, dtype=torch.float64).tolist(),
                    "cost": asdict(cost),
                }
                yield arm, item, result


def compare_all(
    fast: d3rt.Runtime,
    arms: Mapping[str, Policy],
    items: Mapping[str, Sequence[Item]],
    journal: Path,
    settings: Mapping[str, Any],
    more: Callable[[Teacher, str, Item, Policy], Result] | None = None,
) -> dict[Key, Result]:
    """Every item of every task with every arm, kept in a journal: the same call goes on where one was stopped.

    arms must have FULL. more: what else a result holds."""
    teacher = Teacher(fast)
    known = {"arms": list(arms), "items": {task: [asdict(each) for each in of] for task, of in items.items()}}
    with Journal(journal, {**settings, **known}) as kept, Bar("", sum(map(len, items.values()))) as bar:
        for task, of in items.items():
            for group in _groups(of, fast.batch_size):
                bar.say(task)
                missing = [
                    arm for arm in arms if any((task, item.name, arm) not in kept.results for item in group)
                ]
                for arm, item, result in teacher.compare(group, arms, missing) if missing else ():
                    if (task, item.name, arm) not in kept.results:
                        extra = more(teacher, task, item, arms[arm]) if more else {}
                        kept.add(task, item.name, arm, result | extra)
                for _ in group:
                    bar.advance()
        return dict(kept.results)


def _groups(items: Sequence[Item], rows: int) -> list[list[Item]]:
    """Items that run side by side: a batch reads each weight once for all of its rows, but its prompts once for every
    policy, so those with long prompts run alone."""
    short = [item for item in items if len(item.prompt) <= SHORT_PROMPT]
    groups = [short[at : at + rows] for at in range(0, len(short), rows)]
    return groups + [[item] for item in items if len(item.prompt) > SHORT_PROMPT]


def figure(results: Sequence[Result], full: Sequence[Result], metric: str) -> dict[str, float]:
    """Mean of a metric over all tokens of these items, with its interval; for "nll" of the difference to full depth."""
    counts = [len(each[metric]) for each in results]
    sums = [sum(each[metric]) for each in results]
    if metric == "nll":
        sums = [a - sum(each[metric]) for a, each in zip(sums, full, strict=True)]
    low, high = bootstrap(sums, counts)
    return {"mean": sum(sums) / sum(counts), "low": low, "high": high}


def figures(results: Mapping[Key, Result], task: str, arm: str, num_layers: int) -> dict[str, Any]:
    """kl, agree, nll (to full depth), mean depth and share of weight bytes of an arm on a task; bytes are those of the
    decode steps."""
    names = [item for (of, item, which) in results if (of, which) == (task, arm)]
    mine = [results[task, name, arm] for name in names]
    full = [results[task, name, FULL] for name in names]
    cost = {
        name: sum(each["cost"][name] for each in mine)
        for name in ("steps", "depth", "weight_bytes", "full_weight_bytes")
    }
    return {
        "items": len(names),
        "tokens": cost["steps"],
        **{metric: figure(mine, full, metric) for metric in ("kl", "agree", "nll")},
        "mean_depth": cost["depth"] / cost["steps"],
        "bytes": cost["weight_bytes"] / cost["full_weight_bytes"] if cost["full_weight_bytes"] else 1.0,
    }
