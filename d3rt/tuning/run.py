"""tune: halving on train, the choice on validation, one figure on test; then the policy, the report, the picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from d3rt import bench, evaluation
from d3rt.evaluation.conditions import about, conditions, digest
from d3rt.evaluation.journal import Journal
from d3rt.evaluation.tasks import ROWS
from d3rt.policies import Policy
from d3rt.progress import Bar
from d3rt.runtime import Runtime
from d3rt.tuning.budget import Budget, Drop, saved
from d3rt.tuning.candidates import DEFAULT_FAMILIES, candidates, check_families
from d3rt.tuning.choice import choose
from d3rt.tuning.halving import front, halve
from d3rt.tuning.items import Item, read_items
from d3rt.tuning.orders import Orders
from d3rt.tuning.pictures import draw
from d3rt.tuning.report import markdown
from d3rt.tuning.scorer import FULL, Scorer, seconds_per_token
from d3rt.tuning.split import Split

JOURNAL = "scores.jsonl"
QUICK_TEXT = Path(evaluation.__file__).parent / "data" / "wikitext2.txt"


@dataclass(frozen=True)
class Settings:
    """What `tune` is asked for. limit: items at most, the first ones."""

    task: Path
    budget: Budget
    families: tuple[str, ...] = DEFAULT_FAMILIES
    out: Path = Path("out/tune")
    limit: int = 160
    prompt_tokens: int = 64
    new_tokens: int = 96
    seed: int = 0
    finalists: int = 3  # of each family, that validation sees: the best for the budget, for half of it, ...
    rounds: int = 3  # of the timing; 0 times nothing
    restart: bool = False  # throws away what is in `out`
    progress: bool = True

    def __post_init__(self) -> None:
        check_families(self.families)
        for name, least in (
            ("limit", 1),
            ("prompt_tokens", 1),
            ("new_tokens", 2),
            ("finalists", 1),
            ("rounds", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least {least}.")


def tune(runtime: Runtime, model: Any, settings: Settings) -> dict[str, Any]:
    """The figures of tune.json, with the files written to settings.out.

    model: what the runtime was compiled from; shortgpt reads its layers on the train items. The policy is the one that
    saves the most bytes of those whose drop is within the budget by its upper bound on validation; where there is none,
    by its mean, which the report says; where there is none, full depth. An interruption (Ctrl-C) loses what was being
    scored, no more: the same call continues. SettingsChangedError when `settings.out` holds other settings."""
    if runtime.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, and every item is text: compile(..., tokenizer=tokenizer)."
        )
    items = read_items(
        runtime, settings.task, settings.budget.metric, settings.prompt_tokens, settings.new_tokens
    )[: settings.limit]
    split = Split.of(items, settings.seed)
    before = runtime.policy
    try:
        with Journal(settings.out / JOURNAL, _kept(runtime, settings, items), settings.restart) as journal:
            figures = _tune(runtime, model, settings, split, journal)
    finally:
        runtime.policy = before
    Policy.from_dict(figures["policy"]).save(settings.out / "policy.json")
    (settings.out / "tune.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (settings.out / "tune.md").write_text(markdown(figures), encoding="utf-8")
    draw(figures, settings.out / "front.png")
    return figures


def _kept(runtime: Runtime, settings: Settings, items: Sequence[Item]) -> dict[str, Any]:
    """Everything that decides a score, and everything that decides the choice: with another budget or other policies
    the test items of a finished run would be read for a second choice."""
    return conditions(runtime) | {
        "rows": min(ROWS, runtime.batch_size),
        "task": settings.task.name,
        "items": f"{len(items)}, {digest([item.key for item in items])}",
        "limit": settings.limit,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "seed": settings.seed,
        "metric": settings.budget.metric,
        "max_drop": settings.budget.max_drop,
        "policies": list(settings.families),
        "finalists": settings.finalists,
        "rounds": settings.rounds,
    }


def _tune(
    runtime: Runtime, model: Any, settings: Settings, split: Split[Item], journal: Journal
) -> dict[str, Any]:
    scorer = Scorer(runtime, settings.budget.metric, settings.new_tokens, journal)
    layers, budget = runtime.config.num_hidden_layers, settings.budget
    orders = Orders(model, runtime.tokenizer, [item.text for item in split.train], journal, settings.progress)

    def drop(policy: Policy, part: Sequence[Item], among: int = 1) -> Drop:
        full = scorer.score(FULL, part)
        found = budget.drop(full, scorer.score(policy, part), among)
        return replace(found, low=0.0, high=0.0, bound=0.0) if policy == FULL else found  # by definition

    def rank(goal: float, policy: Policy, count: int) -> tuple[float, float]:
        full, arm = (scorer.score(each, split.train[:count]) for each in (FULL, policy))
        return max(0.0, budget.lost(full, arm) - goal), -saved(full, arm)

    # What just fits on train is seldom bounded by the budget on validation: half of it, and a quarter, are goals too.
    goals = [budget.max_drop / 2**at for at in range(settings.finalists)]
    ranks = [partial(rank, goal) for goal in goals]
    finalists: list[Policy] = []
    tried: dict[str, int] = {}
    with Bar("train", len(settings.families) + 1, settings.progress) as bar:
        for family in settings.families:
            bar.say(family)
            arms = candidates(
                family, layers, settings.new_tokens, orders.influence, lambda: orders.removed(layers)
            )
            tried[family] = len(arms)
            finalists += halve(arms, ranks, len(split.train), settings.finalists)
            bar.advance()
        bar.say("validation")
        seen = list(dict.fromkeys(finalists))  # none, where no candidate fits so few layers
        found = {policy: drop(policy, split.validation, max(1, len(seen))) for policy in (FULL, *seen)}
        bar.advance()

    choice = choose(found, FULL, budget)
    chosen = choice.arm
    names = list(found)
    on_front = [names[at] for at in front([(found[each].drop, found[each].saved) for each in names])]
    times = _times(runtime, settings, [FULL, *on_front, chosen], split.validation[0], journal)
    timed = [policy for policy in found if str(policy) in times]
    by_time = front([(found[each].drop, times[str(each)]["median"]) for each in timed])
    counts = {"train": len(split.train), "validation": len(split.validation), "test": split.test.count}
    # The one look at the test items. The choice was made from the other two parts alone: a run that is continued after
    # some of these were scored makes it again, and makes the same.
    final = drop(chosen, split.test.open())
    verdict = "this is full depth: nothing is lost" if chosen == FULL else budget.verdict(final)
    return {
        "kind": "d3rt tune",
        **about(runtime),
        "task": settings.task.name,
        "metric": budget.metric,
        "max_drop": budget.max_drop,
        "seed": settings.seed,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "items": counts,
        "candidates": tried,
        "policy": chosen.to_dict(),
        "policy_text": str(chosen),
        "chosen": {"by": choice.by, "words": choice.words},
        "validation": {str(policy): asdict(each) for policy, each in found.items()},
        "front": [str(policy) for policy in on_front],
        "time_front": [str(timed[at]) for at in by_time],
        "speedup": times,
        "test": asdict(final) | {"verdict": verdict},
    }


def _times(
    runtime: Runtime, settings: Settings, policies: Sequence[Policy], item: Item, journal: Journal
) -> dict[str, Any]:
    """By policy, how many times as fast as full depth its decode steps are: a spread over the rounds."""
    key = ("speedup", item.key, "all")
    if settings.rounds and key not in journal.results:
        measures = {
            str(policy): lambda policy=policy: seconds_per_token(runtime, policy, item, settings.new_tokens)
            for policy in dict.fromkeys(policies)
        }
        spreads = bench.interleave(measures, settings.rounds)
        full = spreads[str(FULL)]
        journal.add(*key, {name: full.over(spread).as_dict() for name, spread in spreads.items()})
    return journal.results.get(key, {})
