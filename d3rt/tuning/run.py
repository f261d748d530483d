"""tune: halving on train, the choice on validation, one figure on test; then the policy, the report, the picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from d3rt import bench, evaluation
from d3rt.policies import Policy
from d3rt.progress import Bar
from d3rt.runtime import Runtime
from d3rt.search import block_influence, greedy_path
from d3rt.tuning.budget import Budget, Drop, Score
from d3rt.tuning.candidates import DEFAULT_FAMILIES, DROPPED, candidates, check_families
from d3rt.tuning.halving import front, halve
from d3rt.tuning.items import Item, read_items
from d3rt.tuning.report import draw, markdown
from d3rt.tuning.scorer import FULL, Scorer, seconds_per_token
from d3rt.tuning.split import Split

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
    finalists: int = 3  # of each family, that validation sees
    rounds: int = 3  # of the timing; 0 times nothing
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

    model: what the runtime was compiled from; shortgpt reads its layers on the train items. Where no candidate is
    within the budget on validation, the policy is full depth."""
    if runtime.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, and every item is text: compile(..., tokenizer=tokenizer)."
        )
    items = read_items(
        runtime, settings.task, settings.budget.metric, settings.prompt_tokens, settings.new_tokens
    )
    split = Split.of(items[: settings.limit], settings.seed)
    before = runtime.policy
    try:
        figures = _tune(runtime, model, settings, split)
    finally:
        runtime.policy = before
    settings.out.mkdir(parents=True, exist_ok=True)
    Policy.from_dict(figures["policy"]).save(settings.out / "policy.json")
    (settings.out / "tune.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (settings.out / "tune.md").write_text(markdown(figures), encoding="utf-8")
    draw(figures, settings.out / "front.png")
    return figures


def _tune(runtime: Runtime, model: Any, settings: Settings, split: Split[Item]) -> dict[str, Any]:
    scorer = Scorer(runtime, settings.budget.metric, settings.new_tokens)
    layers = runtime.config.num_hidden_layers

    @cache
    def influence() -> Sequence[float]:
        texts = [item.text for item in split.train]
        return block_influence(model, texts, tokenizer=runtime.tokenizer, progress=settings.progress)

    @cache
    def removed() -> Sequence[int]:
        texts = [item.text for item in split.train]
        keep = max(1, layers - max(DROPPED))
        path = greedy_path(model, texts, keep=keep, tokenizer=runtime.tokenizer, progress=settings.progress)
        return path.removed

    def drop(policy: Policy, part: Sequence[Item]) -> Drop:
        full: list[Score] = scorer.score(FULL, part)
        return settings.budget.drop(full, scorer.score(policy, part))

    finalists: list[Policy] = []
    tried: dict[str, int] = {}
    with Bar("train", len(settings.families) + 1, settings.progress) as bar:
        for family in settings.families:
            bar.say(family)
            arms = candidates(family, layers, settings.new_tokens, influence, removed)
            tried[family] = len(arms)

            def rank(policy: Policy, count: int) -> tuple[float, float]:
                found = drop(policy, split.train[:count])
                return max(0.0, found.drop - settings.budget.max_drop), -found.saved

            finalists += halve(arms, rank, len(split.train), settings.finalists)
            bar.advance()
        bar.say("validation")
        found = {policy: drop(policy, split.validation) for policy in (FULL, *dict.fromkeys(finalists))}
        bar.advance()

    fitting = [policy for policy in found if found[policy].drop <= settings.budget.max_drop]
    chosen = max(fitting, key=lambda policy: found[policy].saved)
    names = list(found)
    on_front = [names[at] for at in front([(found[each].drop, found[each].saved) for each in names])]
    times = {}
    if settings.rounds:
        timed = dict.fromkeys([FULL, *on_front, chosen])
        measures = {
            str(policy): lambda policy=policy: seconds_per_token(
                runtime, policy, split.validation[0], settings.new_tokens
            )
            for policy in timed
        }
        spreads = bench.interleave(measures, settings.rounds)
        times = {name: spreads[str(FULL)].over(spread).as_dict() for name, spread in spreads.items()}
    counts = {"train": len(split.train), "validation": len(split.validation), "test": split.test.count}
    final = drop(chosen, split.test.open())  # the one look at the test items
    time_front = [
        name
        for name in times
        if not any(
            found[other].drop <= found[policy].drop
            and times[str(other)]["median"] >= times[name]["median"]
            and (found[other].drop, -times[str(other)]["median"])
            != (found[policy].drop, -times[name]["median"])
            for policy in names
            if str(policy) == name
            for other in names
            if str(other) in times
        )
    ]
    return {
        "kind": "d3rt tune",
        "model": getattr(runtime._hf_config, "name_or_path", "") or "a model in memory",
        "num_layers": layers,
        "task": settings.task.name,
        "metric": settings.budget.metric,
        "max_drop": settings.budget.max_drop,
        "seed": settings.seed,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "items": counts,
        "candidates": tried,
        "policy": chosen.to_dict(),
        "policy_text": str(chosen),
        "validation": {str(policy): asdict(each) for policy, each in found.items()},
        "front": [str(policy) for policy in on_front],
        "time_front": time_front,
        "speedup": times,
        "test": asdict(final) | {"verdict": settings.budget.verdict(final)},
    }
