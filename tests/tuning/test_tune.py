"""tune on a tiny model: what it reads, what it writes, and that its figures are another scorer's."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import exit_oracle
import oracle
import pytest
import tiny_models
import torch

import d3rt
from d3rt.evaluation.scoring import BBH_STOPS, cut
from d3rt.policies import D3, FullDepth, StaticLayers
from d3rt.tuning import Budget, transferred, tune
from d3rt.tuning.budget import Drop, Score
from d3rt.tuning.halving import front, halve
from d3rt.tuning.scorer import Scorer
from d3rt.tuning.split import Sealed, Split


def test_test_items_are_scored_after_everything_else_and_with_two_arms_only(
    fast, model, settings, monkeypatch
):
    calls, real = [], Scorer.score
    monkeypatch.setattr(
        Scorer,
        "score",
        lambda self, policy, items: calls.append((policy, items)) or real(self, policy, items),
    )
    opened, open_ = [], Sealed.open
    monkeypatch.setattr(
        Sealed, "open", lambda self: opened.append((len(calls), open_(self))) or opened[-1][1]
    )
    figures = tune(fast, model, settings)
    ((before, test),) = opened
    assert not {item for _, items in calls[:before] for item in items} & set(test)
    assert [set(items) for _, items in calls[before:]] == [set(test)] * 2
    assert {policy for policy, _ in calls[before:]} == {FullDepth(), d3rt.Policy.from_dict(figures["policy"])}


def test_sealed_items_are_read_once():
    sealed = Sealed([1, 2])
    assert sealed.open() == (1, 2)
    with pytest.raises(RuntimeError, match="read already"):
        sealed.open()


def test_a_split_is_the_seeds_and_no_item_is_in_two_parts():
    items = [at % 40 for at in range(80)]
    one, again, other = (Split.of(items, seed) for seed in (1, 1, 2))
    assert (one.train, one.validation) == (again.train, again.validation) != (other.train, other.validation)
    assert sorted((*one.train, *one.validation, *one.test.open())) == list(range(40))


def test_halving_keeps_the_best_arm_where_few_items_do_not_mislead():
    seen = []

    def rank(arm, count):
        seen.append((arm, count))
        return abs(arm - 5)

    assert halve(range(16), [rank], items=32, keep=1) == [5]
    assert sum(count == 32 for _, count in seen) <= 2 and sum(count == 4 for _, count in seen) == 16


def test_halving_keeps_the_best_of_each_rank():
    ranks = [lambda arm, count, goal=goal: abs(arm - goal) for goal in (12, 6, 3)]
    assert halve(range(16), ranks, items=32, keep=3) == [12, 6, 3]
    assert halve(range(16), ranks, items=32, keep=1) == [12]


def test_the_front_is_that_of_brute_force():
    draw = random.Random(0)
    for _ in range(50):
        points = [(draw.randrange(6), draw.randrange(6)) for _ in range(12)]
        beaten = {
            at
            for (at, a), b in itertools.product(enumerate(points), points)
            if b != a and b[0] <= a[0] and b[1] >= a[1]
        }
        assert set(front(points)) == set(range(12)) - beaten


def test_the_file_is_what_generate_runs(fast, model, settings):
    figures = tune(fast, model, settings)
    policy = d3rt.parse(str(settings.out / "policy.json"), num_layers=6)
    assert str(policy) == figures["policy_text"] != "full"
    ids = torch.tensor([[5, 6, 7]])
    fast.policy = policy
    fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert fast.last_run.depths[1:] == policy.schedule(6, 8).depths[1:]


def test_the_printed_drop_is_that_of_the_oracle_on_the_test_items(fast, model, settings, monkeypatch):
    opened, open_ = [], Sealed.open
    monkeypatch.setattr(Sealed, "open", lambda self: opened.append(open_(self)) or opened[-1])
    figures = tune(fast, model, settings)
    policy, different = d3rt.parse(figures["policy_text"]), 0
    for item in opened[0]:
        head = torch.tensor([item.head])
        whole = model.generate(head, attention_mask=torch.ones_like(head), max_new_tokens=8, do_sample=False)
        path = whole[0, head.shape[1] :].tolist()
        plans = policy.schedule(6, len(path)).plans()
        logits = oracle.generate(model, list(item.head), plans, forced=path).logits
        different += sum(int(a) != b for a, b in zip(logits.argmax(-1), path, strict=True))
    assert figures["test"]["drop"] == pytest.approx(different / (8 * len(opened[0])))
    assert different > 0, "a policy that changes nothing would prove nothing"


def test_a_drop_of_nll_is_that_of_the_oracle_on_the_answers(fast, model, settings, monkeypatch):
    lines = [json.dumps({"question": f"number {at}?", "answer": f"it is {at * at}!"}) for at in range(20)]
    settings.task.write_text("\n".join(lines), encoding="utf-8")
    opened, open_ = [], Sealed.open
    monkeypatch.setattr(Sealed, "open", lambda self: opened.append(open_(self)) or opened[-1])
    figures = tune(fast, model, replace(settings, budget=Budget("nll", 0.5), families=("unified",)))
    loss = {}
    for policy in ("full", figures["policy_text"]):
        loss[policy] = 0.0
        for item in opened[0]:
            tokens = list(item.forced)
            assert (
                fast.tokenizer.decode(tokens) == f" {json.loads(lines[int(item.text[7:-1])])['answer']}"[:8]
            )
            plans = d3rt.parse(policy, num_layers=6).schedule(6, len(tokens)).plans()
            logs = (
                oracle.generate(model, list(item.head), plans, forced=tokens).logits.double().log_softmax(-1)
            )
            loss[policy] -= float(logs.gather(1, torch.tensor(tokens)[:, None]).sum())
    assert figures["policy_text"] != "full"
    drop = loss[figures["policy_text"]] / loss["full"] - 1
    assert figures["test"]["drop"] == pytest.approx(drop, rel=1e-3, abs=1e-5) and abs(drop) > 1e-4


def test_exact_match_counts_the_answers_that_are_no_longer_right(fast, model, settings):
    prompts = [f"number {at} is" for at in range(20)]
    fast.policy = FullDepth()
    lines = []
    for at, prompt in enumerate(prompts):
        ids = fast.tokenizer(prompt, return_tensors="pt").input_ids
        out = fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        said = cut(fast.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), BBH_STOPS)
        lines.append({"prompt": prompt, "answer": said.strip() or "-" if at % 4 else "never said"})
    settings.task.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    settings = replace(settings, budget=Budget("exact_match", 0.99), new_tokens=4, families=("unified",))
    figures = tune(fast, model, settings)
    assert figures["validation"]["full"]["drop"] == 0
    worst = max(each["drop"] for each in figures["validation"].values())
    assert 0 < worst <= 1 and abs(5 * worst - round(5 * worst)) < 1e-9, "whole answers of five"


def test_a_greedy_search_leaves_out_what_search_greedy_does(fast, model, settings):
    figures = tune(fast, model, replace(settings, families=("greedy",), limit=16))
    assert figures["candidates"] == {"greedy": 4}, "1, 2, 3 and 4 of 6 layers: 8 there are not, 6 leaves none"
    texts = [f"number {at} is a number" for at in range(16)]
    split = Split.of(texts, settings.seed)
    path = d3rt.search.greedy_path(model, list(split.train), keep=1, tokenizer=fast.tokenizer, progress=False)
    known = {str(StaticLayers.without(path.removed[:n], 6)) for n in (1, 2, 3, 4)} | {"full"}
    assert set(figures["validation"]) <= known


def test_shortgpts_sets_are_those_of_the_search_on_the_train_items(fast, model, settings):
    figures = tune(fast, model, replace(settings, families=("shortgpt",), limit=16, finalists=4))
    texts = [f"number {at} is a number" for at in range(16)]
    train = list(Split.of(texts, settings.seed).train)
    found = {
        str(d3rt.search.shortgpt(model, train, keep=keep, tokenizer=fast.tokenizer, progress=False))
        for keep in (5, 4, 3, 2)
    }
    assert set(figures["validation"]) == found | {"full"} and len(found) == 4


def test_calms_drop_and_depth_are_those_of_the_oracle_on_the_test_items(
    model, tokenizer, settings, monkeypatch
):
    calm = tiny_models.upcast(model, torch.float32)
    with torch.no_grad():
        # states that turn less and less, so that steps end at several depths
        for layer, share in zip(calm.model.layers[2:], (0.6, 0.5, 0.4, 0.3), strict=True):
            layer.self_attn.o_proj.weight *= share
            layer.mlp.down_proj.weight *= share
    fast = d3rt.compile(calm, threads=1, batch_size=4, tokenizer=tokenizer)
    opened, open_ = [], Sealed.open
    monkeypatch.setattr(Sealed, "open", lambda self: opened.append(open_(self)) or opened[-1])
    figures = tune(fast, calm, replace(settings, families=("calm",)))
    policy, different, depths = d3rt.parse(figures["policy_text"]), 0, []
    assert policy.name == "calm"
    for item in opened[0]:
        head = torch.tensor([item.head])
        path = calm.generate(head, attention_mask=torch.ones_like(head), max_new_tokens=8, do_sample=False)
        path = path[0, head.shape[1] :].tolist()
        run = exit_oracle.generate(calm, [list(item.head)], policy, 8, forced=[path])
        different += sum(
            int(logits.argmax()) != token for logits, token in zip(run.logits, path, strict=True)
        )
        depths += run.depths
    assert figures["test"]["drop"] == pytest.approx(different / len(depths)) and different > 0
    assert figures["test"]["mean_depth"] == pytest.approx(sum(depths) / len(depths))
    assert len(set(depths)) > 2, "one depth would prove little"


def test_tuning_twice_gives_the_same_figures(fast, model, settings):
    assert tune(fast, model, settings) == tune(fast, model, replace(settings, restart=True))


def test_no_drop_allowed_and_nothing_that_agrees_gives_full_depth(fast, model, settings):
    figures = tune(fast, model, replace(settings, families=("unified",), budget=Budget("agreement", 0.0)))
    candidates = {name: each for name, each in figures["validation"].items() if name != "full"}
    assert candidates and all(each["drop"] > 0 for each in candidates.values()), (
        "none of these layers does nothing"
    )
    assert figures["policy_text"] == "full" and figures["chosen"]["by"] == "none"
    assert d3rt.parse(str(settings.out / "policy.json"), num_layers=6) == FullDepth()
    assert (figures["test"]["drop"], figures["test"]["high"]) == (0, 0)
    text = (settings.out / "tune.md").read_text(encoding="utf-8")
    assert "No candidate is within the budget on validation." in text
    assert "This is full depth: nothing is lost." in text


def test_no_drop_allowed_and_layers_that_do_nothing_gives_the_policy_of_fewest_bytes(
    model, tokenizer, settings
):
    idle = tiny_models.upcast(model, torch.float32)
    with torch.no_grad():
        for layer in idle.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    fast = d3rt.compile(idle, threads=1, batch_size=4, tokenizer=tokenizer)
    figures = tune(fast, idle, replace(settings, families=("unified",), budget=Budget("agreement", 0.0)))
    found = figures["validation"]
    assert {each["drop"] for each in found.values()} == {0.0}
    assert figures["policy_text"] == max(found, key=lambda name: found[name]["saved"]) != "full"
    assert figures["chosen"]["by"] == "mean" and figures["test"]["drop"] == 0


def test_few_items_or_an_interval_around_the_budget_cannot_tell():
    budget = Budget("agreement", 0.01)
    found = Drop(drop=0.005, low=0, high=0.009, bound=0.008, saved=0.1, mean_depth=5, items=40)
    assert budget.verdict(found) == "within the budget"
    assert budget.verdict(replace(found, items=4)).startswith("cannot tell")
    assert budget.verdict(replace(found, high=0.02)).startswith("cannot tell")
    assert budget.verdict(replace(found, low=0.011, high=0.02)) == "beyond the budget"
    same = [Score(0, 1, 10, 6, 1)] * 40
    assert (
        Budget("exact_match", 0.01).verdict(Budget("exact_match", 0.01).drop(same, same)).startswith("cannot")
    )


def test_a_drop_of_nll_is_relative_and_one_of_agreement_a_share_of_tokens():
    full, arm = [Score(2.0, 4, 100, 24, 4)] * 2, [Score(3.0, 4, 75, 20, 4)] * 2
    assert Budget("nll", 0.1).drop(full, arm).drop == pytest.approx(0.5)
    found = Budget("agreement", 0.1).drop(full, arm)
    assert (found.drop, found.saved, found.mean_depth) == pytest.approx((0.25, 0.25, 5.0))


@pytest.mark.parametrize("text", ["1", "x%", "-1%", "100%", "nan%"])
def test_a_drop_that_is_no_percentage_is_refused(text):
    with pytest.raises(ValueError, match="percentage"):
        Budget.of("nll", text)


def test_unknown_names_few_items_and_lacking_answers_are_refused(fast, model, settings):
    with pytest.raises(ValueError, match="metric 'f1'"):
        Budget("f1", 0.1)
    with pytest.raises(ValueError, match="family 'magic'"):
        replace(settings, families=("magic",))
    with pytest.raises(ValueError, match="at least 16"):
        tune(fast, model, replace(settings, limit=15))
    with pytest.raises(ValueError, match="line 1: exact_match needs a right answer"):
        tune(fast, model, replace(settings, budget=Budget("exact_match", 0.1)))
    assert not settings.out.exists()


def test_layer_sets_move_by_relative_depth():
    assert transferred(StaticLayers.without([3], 6), 6, 12) == StaticLayers.without([6, 7], 12)
    assert transferred(D3(alpha=0.99, start=0.5), 30, 80) == D3(alpha=0.99, start=0.5)
    with pytest.raises(d3rt.errors.PolicyError, match="no form by relative depth"):
        transferred(d3rt.parse("schedule:sets=0-5/0-4"), 6, 12)
