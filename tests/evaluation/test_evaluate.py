"""evaluate against the oracle and Hugging Face; stopped and continued; and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import oracle
import pytest
import tiny_models
import torch
from torch.nn import functional as F

import d3rt
from d3rt.evaluation import Settings, data, evaluate
from d3rt.evaluation.journal import Journal, SettingsChangedError
from d3rt.evaluation.scoring import GSM8K_STOPS
from d3rt.evaluation.until import answer

D3, UP_AND_DOWN = "d3:alpha=0.9,start=0.4", "schedule:sets=0-5/0+5/0-2+5,cycle=true"
SMALL = Settings(
    policies=(D3, UP_AND_DOWN), texts=5, prompt_tokens=9, continued_tokens=14, limit=3, shots=2, max_new_tokens=12,
    bbh_limit=1, bbh_tasks=("boolean_expressions", "sports_understanding"), gsm8k=data._HERE / "gsm8k",
    bbh=data._HERE / "bbh", progress=False,
)  # fmt: skip


@pytest.fixture
def settings(tmp_path, text_file):
    return replace(SMALL, out=tmp_path / "eval", text=text_file)


def results(settings):
    """What the journal holds, by (task, item, arm)."""
    lines = (settings.out / "results.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    return {(one["task"], one["item"], one["arm"]): one["result"] for one in map(json.loads, lines)}


def passages(settings, tokenizer):
    """The pieces of the text, by counting."""
    ids = tokenizer(settings.text.read_text(encoding="utf-8")).input_ids
    length = settings.prompt_tokens + settings.continued_tokens
    there = len(ids) // length
    return [ids[at * there // settings.texts * length :][:length] for at in range(settings.texts)]


def oracle_logits(model, policy, prompt, tokens):
    plans = d3rt.parse(policy, num_layers=6).schedule(6, len(tokens)).plans()
    return oracle.generate(model, prompt, plans, forced=tokens).logits.double()


@pytest.mark.parametrize("arm", ["full", D3, UP_AND_DOWN])
def test_ppl_is_the_oracles_likelihood_at_the_depth_of_each_position(model, tokenizer, fast, settings, arm):
    evaluate(fast, replace(settings, tasks=("ppl",)))
    found = results(settings)
    for at, passage in enumerate(passages(settings, tokenizer)[:3]):
        prompt, tokens = passage[:9], passage[9:]
        expected = F.cross_entropy(
            oracle_logits(model, arm, prompt, tokens), torch.tensor(tokens), reduction="none"
        )
        assert found["ppl", f"text/{at}", arm]["nll"] == pytest.approx(expected.tolist(), abs=1e-4)
        own = model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False)[0, 9:].tolist()
        expected = F.cross_entropy(
            oracle_logits(model, arm, prompt, own), torch.tensor(own), reduction="none"
        )
        assert found["ppl", f"own/{at}", arm]["nll"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_agreement_and_kl_are_the_oracles(model, tokenizer, fast, settings):
    report = evaluate(fast, replace(settings, tasks=("agreement",)))
    found = results(settings)
    agreed = []
    for at, passage in enumerate(passages(settings, tokenizer)):
        prompt = passage[:9]
        own = model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False)[0, 9:].tolist()
        full, skipping = (
            oracle_logits(model, policy, prompt, own).log_softmax(-1) for policy in ("full", D3)
        )
        result = found["agreement", str(at), D3]
        assert result["agree"] == (skipping.argmax(-1) == torch.tensor(own)).int().tolist()
        assert result["kl"] == pytest.approx((full.exp() * (full - skipping)).sum(-1).tolist(), abs=1e-4)
        agreed += result["agree"]
        assert found["agreement", str(at), "full"]["agree"] == [1] * 14
        assert max(map(abs, found["agreement", str(at), "full"]["kl"])) < 1e-5
    figure = report.figures["tasks"]["agreement"]["metrics"]["agree"][D3]
    assert figure["mean"] == pytest.approx(sum(agreed) / len(agreed)) and 0 < figure["mean"] < 1
    assert figure["low"] <= figure["mean"] <= figure["high"]


def test_the_own_text_ends_with_end_of_sequence(model, tokenizer, settings):
    ending = tiny_models.upcast(model, torch.float32)
    prompt = passages(settings, tokenizer)[0][:9]
    own = model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False)[0, 9:].tolist()
    ending.generation_config.eos_token_id = own[6]
    fast = d3rt.compile(ending, threads=1, batch_size=4, tokenizer=tokenizer)
    evaluate(fast, replace(settings, tasks=("agreement",)))
    result = results(settings)["agreement", "0", D3]
    assert len(result["kl"]) == own.index(own[6]) + 1 == result["cost"]["steps"]


@pytest.mark.parametrize("stop", [None, "mid", "beyond"])
def test_an_answer_is_hugging_faces_up_to_the_stop(model, tokenizer, fast, stop):
    prompt = torch.tensor([tokenizer("The quick brown fox").input_ids])
    whole = model.generate(prompt, max_new_tokens=30, do_sample=False)[0, prompt.shape[1] :].tolist()
    text = tokenizer.decode(whole)
    stops = {None: (), "mid": (text[7:10], "~never~"), "beyond": ("~never~",)}[stop]
    fast.policy = d3rt.parse(D3, num_layers=6)
    skipping = fast.generate(prompt, max_new_tokens=30, do_sample=False)[0, prompt.shape[1] :].tolist()
    for policy, tokens in ((d3rt.FullDepth(), whole), (fast.policy, skipping)):
        fast.policy = policy
        given = answer(fast, prompt, stops, max_new_tokens=30)
        text = tokenizer.decode(tokens)
        ended = next(
            (n for n in range(1, 31) if any(each in tokenizer.decode(tokens[:n]) for each in stops)), 30
        )
        assert given.text == text.split(stops[0])[0] if stops else text
        assert given.tokens == given.cost.steps == ended
        assert given.cost.depth == sum(policy.schedule(6, ended).depths) + (
            6 - policy.schedule(6, 1).depths[0]
        )
        assert given.cost.seconds > 0


def test_answers_are_scored_on_the_same_prompts_for_every_arm(model, tokenizer, fast, settings):
    report = evaluate(fast, replace(settings, tasks=("gsm8k", "bbh")))
    found = results(settings)
    for question in data.gsm8k(settings.gsm8k, 2, 3):
        ids = torch.tensor([tokenizer(question.prompt).input_ids])
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(out)
        for stop in GSM8K_STOPS:
            text = text.split(stop)[0]
        assert found["gsm8k", question.item, "full"]["text"] == text
    figures = report.figures["tasks"]
    assert figures["bbh"]["items"] == 2 and set(figures["bbh"]["groups"]) == set(settings.bbh_tasks)
    assert figures["gsm8k"]["metrics"]["strict"][D3]["against_full"]["p"] == 1
    assert any("hardly tell policies apart" in note for note in report.figures["notes"])


def test_depth_and_bytes_are_those_of_the_real_lengths(fast, settings):
    report = evaluate(fast, replace(settings, tasks=("gsm8k",)))
    cost = report.figures["tasks"]["gsm8k"]["cost"]
    lengths = [each["cost"]["steps"] for (_, _, arm), each in results(settings).items() if arm == D3]
    policy = d3rt.parse(D3, num_layers=6)
    depths = [sum(policy.schedule(6, length).depths) for length in lengths]
    assert cost[D3]["mean_depth"] == pytest.approx(sum(depths) / sum(lengths))
    assert cost["full"]["mean_depth"] == 6 and cost["full"]["weight_share"] == 1
    assert cost[D3]["bytes_per_token"] < cost["full"]["bytes_per_token"] and cost[D3]["over_full"] > 1


def without_times(report):
    """The figures less what the clock says."""
    figures = json.loads(json.dumps(report.figures))
    for task in figures["tasks"].values():
        for cost in task["cost"].values():
            cost.pop("tokens_per_second")
    return figures


def test_what_was_stopped_anywhere_continues_without_loss(fast, settings, monkeypatch):
    whole = without_times(evaluate(fast, replace(settings, out=settings.out / "whole")))
    add, calls = Journal.add, 0

    def stop_at_times(self, *arguments):
        nonlocal calls
        calls += 1
        if calls % 11 == 0:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(Journal, "add", stop_at_times)
    stops = 0
    while True:
        try:
            report = evaluate(fast, settings)
            break
        except KeyboardInterrupt:
            stops += 1
            path = settings.out / "results.jsonl"
            if stops % 2:  # as a power cut may leave it
                path.write_bytes(path.read_bytes() + b'{"task": "ppl", "item": "te')
    assert stops > 3
    assert without_times(report) == whole
    lines = (settings.out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    keys = [tuple(json.loads(line).get(name) for name in ("task", "item", "arm")) for line in lines]
    assert len(set(keys)) == len(keys), "nothing is kept twice"


def test_a_finished_evaluation_runs_nothing_again(fast, settings, monkeypatch):
    first = evaluate(fast, settings)
    monkeypatch.setattr(type(fast.engine), "prefill", lambda *_: pytest.fail("ran again"))
    assert evaluate(fast, settings).figures == first.figures
    assert fast.policy == d3rt.FullDepth(), "the runtime has its own policy back"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(policies=(D3,)), "policies was .*is"),
        (dict(shots=1), "gsm8k shots was 2, is 1"),
        (dict(max_new_tokens=11), "gsm8k max_new_tokens was 12, is 11"),
        (dict(limit=2), "gsm8k questions was"),
        (dict(tasks=("gsm8k", "bbh")), "tasks was"),
    ],
)
def test_other_settings_are_refused_by_name(fast, settings, change, words):
    settings = replace(settings, tasks=("gsm8k",))
    evaluate(fast, settings)
    kept = (settings.out / "results.jsonl").read_bytes()
    with pytest.raises(SettingsChangedError, match=words):
        evaluate(fast, replace(settings, **change))
    assert (settings.out / "results.jsonl").read_bytes() == kept
    evaluate(fast, replace(settings, restart=True, **change))


def test_another_model_is_refused(fast, settings, tokenizer):
    settings = replace(settings, tasks=("ppl",), texts=1)
    evaluate(fast, settings)
    other = tiny_models.fresh("llama", vocab_size=256, max_position_embeddings=4096, eos_token_id=None)
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(SettingsChangedError, match="model was"):
        evaluate(d3rt.compile(other, threads=1, batch_size=4, tokenizer=tokenizer), settings)


def test_files_that_are_missing_or_no_journal(fast, settings, model, tmp_path):
    with pytest.raises(OSError, match="--gsm8k"):
        evaluate(fast, replace(settings, tasks=("gsm8k",), gsm8k=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no task 'chess'"):
        evaluate(fast, replace(settings, tasks=("bbh",), bbh_tasks=("chess",)))
    with pytest.raises(ValueError, match="one passage takes"):
        evaluate(fast, replace(settings, tasks=("ppl",), continued_tokens=3000))
    with pytest.raises(ValueError, match="no tokenizer"):
        evaluate(d3rt.compile(model, threads=1), settings)
    with pytest.raises(ValueError, match="task 'mmlu'"):
        Settings(tasks=("mmlu",))
    settings.out.mkdir(parents=True)
    (settings.out / "results.jsonl").write_text("something else\n")
    with pytest.raises(SettingsChangedError, match="no journal"):
        evaluate(fast, settings)


def test_a_too_long_prompt_loses_its_beginning_and_the_report_says_so(model, tokenizer, settings):
    fast = d3rt.compile(model, threads=1, max_seq_len=100, tokenizer=tokenizer)
    report = evaluate(fast, replace(settings, tasks=("gsm8k",)))
    assert results(settings)["gsm8k", "0", "full"]["prompt_tokens"] == 88
    assert any("3 prompts were too long" in note for note in report.figures["notes"])


def test_prompts_of_a_file_with_and_without_chat(fast, tokenizer, settings, tmp_path, model):
    lines = [{"prompt": "Hello there"}, {"question": "Why?"}, {"turns": ["First", "second"]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    evaluate(fast, replace(settings, tasks=("agreement",), prompts=path))
    prompt = tokenizer("First").input_ids
    own = model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False)[
        0, len(prompt) :
    ].tolist()
    expected = oracle_logits(model, D3, prompt, own).argmax(-1) == torch.tensor(own)
    assert results(settings)["agreement", "2", D3]["agree"] == expected.int().tolist()
    path.write_text('{"title": "no prompt"}\n')
    with pytest.raises(ValueError, match="line 1"):
        evaluate(fast, replace(settings, tasks=("agreement",), prompts=path, out=tmp_path / "other"))


def test_report_as_markdown_and_pictures(fast, settings):
    report = evaluate(fast, settings)
    written = {path.name: path.stat().st_size for path in settings.out.iterdir()}
    assert {"report.json", "report.md", "quality.png", "positions.png", "results.jsonl"} <= set(written)
    assert min(written.values()) > 1000
    text = report.markdown()
    for words in (
        "## gsm8k",
        "## bbh",
        "## ppl",
        "## agreement",
        "strict match",
        "KL",
        D3,
        "McNemar",
        "MB a token",
    ):
        assert words in text + json.dumps(report.figures), words
    assert json.loads((settings.out / "report.json").read_text()) == report.figures
    widths = {
        len(line.split(" | "))
        for line in text.splitlines()
        if line.startswith("| ") and "NLL of the text" in line
    }
    assert widths and all(math.isfinite(each) for each in widths)


def test_forced_logits_of_ragged_rows_are_the_oracles(model, fast):
    prompts = [torch.tensor(tiny_models.prompt(length, length)) for length in (3, 11, 6)]
    tokens = torch.tensor([tiny_models.prompt(8, 50 + row) for row in range(3)])
    fast.policy = d3rt.parse(UP_AND_DOWN, num_layers=6)
    logits = torch.stack(list(fast.forced_logits(prompts, tokens)), dim=1)
    for row, prompt in enumerate(prompts):
        expected = oracle_logits(model, UP_AND_DOWN, prompt.tolist(), tokens[row].tolist())
        assert (logits[row] - expected).abs().max() < 1e-3
    assert fast.last_run.steps == 8 and fast.last_run.batch == 3
    with pytest.raises(ValueError, match="batch_size"):
        next(fast.forced_logits(prompts * 2, tokens.repeat(2, 1)))
    with pytest.raises(ValueError, match="max_seq_len"):
        next(fast.forced_logits(prompts[:1], torch.zeros(1, 4095, dtype=torch.int64)))
    assert next(fast.forced_logits(prompts[:1], torch.zeros(1, 4094, dtype=torch.int64))).shape == (1, 256)
