"""evaluate: every task's items at full depth and with each policy, item by item, kept in a journal, then the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d3rt.evaluation.conditions import about, conditions, digest
from d3rt.evaluation.journal import Journal
from d3rt.evaluation.report import Report, summarise
from d3rt.evaluation.settings import Settings
from d3rt.evaluation.tasks import FULL, Task, make_task
from d3rt.policies import FullDepth, Policy, parse
from d3rt.progress import Bar
from d3rt.runtime import Runtime

JOURNAL = "results.jsonl"


def evaluate(runtime: Runtime, settings: Settings) -> Report:
    """Runs what of the tasks is not in `settings.out` yet, and writes report.json, report.md and pictures there.

    The runtime's own policy plays no part, and is as before afterwards. An interruption (Ctrl-C) loses the item that
    was being done, no more: the same call continues. SettingsChangedError when `settings.out` holds other settings;
    DataMissingError when there are no items."""
    if runtime.tokenizer is None:
        raise ValueError(
            "the runtime has no tokenizer, and every task reads text: compile(..., tokenizer=tokenizer)."
        )
    arms = _arms(runtime, settings)
    before = runtime.policy
    try:
        tasks = [make_task(name, runtime, arms, settings) for name in dict.fromkeys(settings.tasks)]
        with Journal(
            settings.out / JOURNAL, _kept(runtime, arms, tasks, settings), settings.restart
        ) as journal:
            _run(tasks, journal, settings.progress)
            results = dict(journal.results)
    finally:
        runtime.policy = before
    report = summarise(about(runtime), [task.name for task in tasks], arms, results, settings)
    report.write(settings.out)
    return report


def _arms(runtime: Runtime, settings: Settings) -> dict[str, Policy]:
    """Full depth and the policies, by name."""
    layers = runtime.config.num_hidden_layers
    policies = [parse(text, num_layers=layers) for text in settings.policies]
    return {FULL: FullDepth()} | {str(policy): policy for policy in policies if policy != FullDepth()}


def _run(tasks: list[Task], journal: Journal, progress: bool) -> None:
    units = [(task.name, unit) for task in tasks for unit in task.units]
    with Bar("", len(units), progress) as bar:
        for name, unit in units:
            bar.say(name)
            if not all((name, item, arm) in journal.results for item, arm in unit.keys):
                for item, arm, result in unit.run():  # of a unit that was cut short, what was kept stands
                    if (name, item, arm) not in journal.results:
                        journal.add(name, item, arm, result)
            bar.advance()


def _kept(
    runtime: Runtime, arms: Mapping[str, Policy], tasks: list[Task], settings: Settings
) -> dict[str, Any]:
    """Everything that decides a result."""
    kept: dict[str, Any] = conditions(runtime) | {
        "tasks": [task.name for task in tasks],
        "policies": {name: policy.to_dict() for name, policy in arms.items()},
    }
    for task in tasks:
        for name, value in task.about.items():
            told = value if isinstance(value, int | float | str) else f"{len(value)}, {digest(value)}"
            kept[f"{task.name} {name}"] = told
    if "gsm8k" in kept["tasks"]:
        kept["gsm8k shots"] = settings.shots
    return kept
