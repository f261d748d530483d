"""d3rt.lm_eval.D3RT: the harness' own Hugging Face model at full depth, `d3rt eval`'s answers with a policy."""

from __future__ import annotations

import json

import pytest
import torch

import d3rt
from d3rt.evaluation import Settings, data, evaluate

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (lm_eval) is not installed")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from d3rt.lm_eval import D3RT  # noqa: E402

HERE = data._HERE
POLICY = "d3:alpha=0.95,start=0.4"


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


@pytest.fixture(scope="module")
def ending_tokenizer(tokenizer):
    tokenizer.eos_token = tokenizer.pad_token = "~"  # the harness wants one
    return tokenizer


@pytest.fixture(scope="module")
def both(model, ending_tokenizer):
    fast = d3rt.compile(model, threads=1, max_seq_len=256, tokenizer=ending_tokenizer)
    return D3RT(fast), HFLM(pretrained=model, tokenizer=ending_tokenizer, max_length=256, batch_size=1)


def test_likelihoods_are_those_of_the_harness_own_model(both):
    ours, theirs = both
    pairs = [("The quick", " brown fox"), ("", "jumps over"), ("a " * 200, "b"), ("trailing ", "space")]
    for found, expected in zip(
        ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True),
        theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True),
        strict=True,
    ):
        assert found[0] == pytest.approx(expected[0], abs=1e-3) and found[1] == expected[1]


def test_rolling_likelihoods_cover_a_text_longer_than_the_model(both):
    ours, theirs = both
    texts = [("short",), ("The quick brown fox jumps over the lazy dog. " * 14,)]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)


def test_answers_are_those_of_the_harness_own_model(both):
    ours, theirs = both
    greedy = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 20}
    arguments = [("The quick", {"until": ["\n\n"], **greedy}), ("x" * 300, {"until": "e", **greedy})]
    found = ours.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert found == theirs.generate_until(requests("generate_until", arguments), disable_tqdm=True)


def test_what_is_not_greedy_is_refused(both):
    for options, words in (({"do_sample": True}, "do_sample=True"), ({"top_k": 5}, "top_k")):
        with pytest.raises(ValueError, match=words):
            both[0].generate_until(requests("generate_until", [("a", options)]), disable_tqdm=True)
    with pytest.raises(ValueError, match="compiled already"):
        D3RT(both[0].runtime, policy="full")


def task_file(folder, name, upstream, **changes):
    import lm_eval
    import yaml

    path = next(iter(lm_eval.__path__)) + f"/tasks/{upstream}"
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({"include": path, "task": name, "tag": None, **changes})
    )


def test_the_harness_gives_d3rt_evals_prompts_answers_and_scores(model, ending_tokenizer, tmp_path):
    fast = d3rt.compile(model, policy=POLICY, threads=1, tokenizer=ending_tokenizer)
    settings = Settings(
        tasks=("gsm8k", "bbh"), policies=(POLICY,), out=tmp_path / "out", shots=2, limit=3, max_new_tokens=24,
        bbh_tasks=("navigate",), gsm8k=HERE / "gsm8k", bbh=HERE / "bbh", progress=False,
    )  # fmt: skip
    report = evaluate(fast, settings)
    lines = (settings.out / "results.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    ours = {
        (one["task"], one["item"]): one["result"] for one in map(json.loads, lines) if one["arm"] != "full"
    }

    examples = json.loads((HERE / "bbh" / "tasks" / "navigate.json").read_text())["examples"]
    (tmp_path / "navigate.jsonl").write_text("\n".join(map(json.dumps, examples)))
    local = {"dataset_path": "json", "dataset_name": None}
    cache = {"cache_dir": str(tmp_path / "cache")}
    gsm8k_files = {split: str(HERE / "gsm8k" / f"{split}.jsonl") for split in ("test", "train")}
    task_file(
        tmp_path,
        "gsm8k_here",
        "gsm8k/gsm8k.yaml",
        **local,
        dataset_kwargs={"data_files": gsm8k_files, **cache},
    )
    task_file(
        tmp_path, "navigate_here", "bbh/fewshot/navigate.yaml", **local,
        dataset_kwargs={"data_files": {"test": str(tmp_path / "navigate.jsonl")}, **cache},
    )  # fmt: skip
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = dict(task_manager=manager, limit=3, log_samples=True, bootstrap_iters=0)
    made = D3RT(fast, max_gen_toks=24)
    gsm8k = simple_evaluate(model=made, tasks=["gsm8k_here"], num_fewshot=2, **options)
    bbh = simple_evaluate(model=made, tasks=["navigate_here"], **options)

    questions = {question.item: question for question in data.gsm8k(HERE / "gsm8k", 2, 3)}
    samples = gsm8k["samples"]["gsm8k_here"]
    assert len(samples) == 6  # a sample for each of the two filters
    for sample in samples:
        item = str(sample["doc_id"])
        assert sample["arguments"][0][0] == questions[item].prompt
        assert sample["resps"][0][0] == ours["gsm8k", item]["text"]
        kind = "strict" if sample["filter"] == "strict-match" else "flexible"
        assert sample["exact_match"] == ours["gsm8k", item]["scores"][kind]
    figures = report.figures["tasks"]["gsm8k"]["metrics"]["flexible"][POLICY]
    assert gsm8k["results"]["gsm8k_here"]["exact_match,flexible-extract"] == figures["mean"]

    by_item = {question.item: question for question in data.bbh(HERE / "bbh", None, ("navigate",))}
    for sample in bbh["samples"]["navigate_here"]:
        item = f"navigate/{sample['doc_id']}"
        assert sample["arguments"][0][0] == by_item[item].prompt
        assert ours["bbh", item]["text"].startswith(sample["resps"][0][0])
        assert sample["exact_match"] == ours["bbh", item]["scores"]["harness"]


def test_a_likelihood_has_the_depth_of_its_step(model, ending_tokenizer):
    fast = d3rt.compile(model, policy=POLICY, threads=1, tokenizer=ending_tokenizer)
    ((found, _),) = D3RT(fast).loglikelihood(
        requests("loglikelihood", [("The quick", " brown")]), disable_tqdm=True
    )
    ids, tokens = (torch.tensor(ending_tokenizer(text).input_ids) for text in ("The quick", " brown"))
    steps = zip(fast.forced_logits([ids], tokens[None]), tokens, strict=True)
    assert found == pytest.approx(
        sum(float(torch.log_softmax(logits[0], -1)[token]) for logits, token in steps)
    )
    assert fast.last_run.mean_depth < 6
