"""tune stopped and continued: the same figures, nothing run twice, no second choice, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import tiny_models
import torch

import d3rt
from d3rt.evaluation.journal import Journal, SettingsChangedError
from d3rt.tuning import Budget, orders, tune
from d3rt.tuning.scorer import Scorer
from d3rt.tuning.split import Sealed


@pytest.fixture
def settings(settings):
    return replace(settings, families=("unified", "shortgpt", "greedy", "calm"), limit=16)


def journal_lines(settings):
    return [
        json.loads(line) for line in (settings.out / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture
def runs(monkeypatch):
    """How often each policy ran on each item, and each search."""
    counted, run = Counter(), Scorer._run

    def count(self, policy, group):
        scores = run(self, policy, group)
        counted.update((str(policy), item.text) for item in group)
        return scores

    monkeypatch.setattr(Scorer, "_run", count)
    for name in ("block_influence", "greedy_path"):
        search = getattr(orders, name)
        monkeypatch.setattr(
            orders,
            name,
            lambda *args, name=name, search=search, **options: (
                counted.update([name]) or search(*args, **options)
            ),
        )
    return counted


@pytest.mark.parametrize("lost", [False, True], ids=["between results", "before a result is kept"])
@pytest.mark.parametrize("metric", ["agreement", "nll"])
def test_what_was_stopped_anywhere_continues_without_loss(
    fast, model, settings, monkeypatch, runs, metric, lost
):
    if metric == "nll":  # answers of unequal lengths: rows of a group share their K,V's bytes
        lines = [json.dumps({"question": f"{at}?", "answer": "is " + "no " * (at % 3)}) for at in range(16)]
        settings.task.write_text("\n".join(lines), encoding="utf-8")
    settings = replace(settings, budget=Budget(metric, 0.5))
    whole = tune(fast, model, replace(settings, out=settings.out / "whole"))
    once = dict(runs)
    runs.clear()
    add, calls = Journal.add, 0

    def stop_at_times(self, *arguments):
        nonlocal calls
        calls += 1
        stop = calls % 11 == 0
        if not (stop and lost):
            add(self, *arguments)
        if stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", stop_at_times)
    stops = 0
    while True:
        try:
            figures = tune(fast, model, settings)
            break
        except KeyboardInterrupt:
            stops += 1
            if lost:  # as a power cut may leave it
                path = settings.out / "scores.jsonl"
                path.write_bytes(path.read_bytes() + b'{"task": "scores", "item": "te')
    assert stops > 5
    assert figures == whole
    assert set(runs) == set(once) and set(once.values()) == {1}
    if not lost:
        assert runs == once, "nothing ran twice"
    kept = [
        (line["task"], key, line["arm"])
        for line in journal_lines(settings)[1:]
        for key in line["item"].split()
    ]
    assert len(set(kept)) == len(kept), "nothing is kept twice"


def test_a_finished_run_runs_nothing_again(fast, model, settings, monkeypatch):
    settings = replace(settings, rounds=1)
    figures = tune(fast, model, settings)
    assert figures["speedup"]
    monkeypatch.setattr(type(fast.engine), "prefill", lambda *_: pytest.fail("ran again"))
    monkeypatch.setattr(orders, "greedy_path", lambda *_, **__: pytest.fail("searched again"))
    monkeypatch.setattr(orders, "block_influence", lambda *_, **__: pytest.fail("searched again"))
    assert tune(fast, model, settings) == figures
    assert fast.policy == d3rt.FullDepth(), "the runtime has its own policy back"


def test_what_was_chosen_stays_chosen_whatever_the_test_items_said(fast, model, settings, monkeypatch):
    opened, open_ = [], Sealed.open
    monkeypatch.setattr(Sealed, "open", lambda self: opened.append(open_(self)) or opened[-1])
    before = tune(fast, model, settings)
    assert before["policy_text"] != "full" and before["test"]["drop"] < 1
    test = {item.key for item in opened[0]}
    lines = journal_lines(settings)
    for line in lines[1:]:
        if (
            line["task"] == "scores"
            and line["arm"] == before["policy_text"]
            and test & set(line["item"].split())
        ):
            for score in line["result"]["scores"]:
                score["loss"] = score["count"]  # every token another one
    (settings.out / "scores.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    after = tune(fast, model, settings)
    assert after["test"]["drop"] == 1
    assert {**after, "test": None} == {**before, "test": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(budget=Budget("agreement", 0.25)), "max_drop was 0.5, is 0.25"),
        (dict(budget=Budget("nll", 0.5)), "metric was 'agreement', is 'nll'"),
        (dict(families=("d3",)), "policies was"),
        (dict(seed=1), "seed was 0, is 1"),
        (dict(limit=17), "items was .* limit was 16, is 17"),
        (dict(new_tokens=7), "new_tokens was 8, is 7"),
    ],
)
def test_other_settings_are_refused_by_name_until_a_restart(fast, model, settings, change, words):
    settings = replace(settings, families=("unified",))
    if "budget" in change and change["budget"].metric == "nll":
        lines = [json.dumps({"question": f"{at}?", "answer": "it is"}) for at in range(16)]
        settings.task.write_text("\n".join(lines), encoding="utf-8")
    tune(fast, model, settings)
    kept = (settings.out / "scores.jsonl").read_bytes()
    with pytest.raises(SettingsChangedError, match=words):
        tune(fast, model, replace(settings, **change))
    assert (settings.out / "scores.jsonl").read_bytes() == kept
    tune(fast, model, replace(settings, restart=True, **change))
    assert (settings.out / "scores.jsonl").read_bytes() != kept


def test_other_items_and_another_model_are_refused(fast, model, settings, tokenizer):
    settings = replace(settings, families=("unified",))
    tune(fast, model, settings)
    other = tiny_models.upcast(model, torch.float32)
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(SettingsChangedError, match="model was"):
        tune(d3rt.compile(other, threads=1, batch_size=4, tokenizer=tokenizer), other, settings)
    settings.task.write_text(settings.task.read_text(encoding="utf-8").replace("7", "x"), encoding="utf-8")
    with pytest.raises(SettingsChangedError, match="items was"):
        tune(fast, model, settings)
