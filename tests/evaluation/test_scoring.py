"""Right or wrong: cases written out by hand, and lm-evaluation-harness itself where it is installed."""

from __future__ import annotations

import pytest

from d3rt.evaluation import data
from d3rt.evaluation.scoring import BBH_STOPS, GSM8K_STOPS, cut, flexible_number, score_bbh, score_gsm8k

GOLD = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 1,072"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 48 + 24.\n#### 1072", 1, 1),
        ("#### 1,072", 1, 1),
        ("#### $1,072", 0, 1),  # strict reads no dollar sign
        ("#### 1072.", 1, 1),
        ("#### 1072\n#### 5", 1, 0),  # strict is the first, flexible the last
        ("#### 5\n\nor rather 1072", 0, 1),
        ("The answer is $1,072.", 0, 1),
        ("1072 clips, and then 3 more", 0, 0),
        ("#### 1072.00", 0, 0),  # 1072.00 is not 1072, as in the harness
        ("#### 1072 clips...", 1, 0),  # "..." is a flexible number
        ("#### -1072", 0, 0),
        ("", 0, 0),
        ("I do not know", 0, 0),
    ],
)
def test_gsm8k_by_hand(text, strict, flexible):
    assert score_gsm8k(text, GOLD) == {"strict": strict, "flexible": flexible}


@pytest.mark.parametrize(
    ("text", "target", "exact", "harness"),
    [
        ("(A)", "(A)", 1, 1),
        (" (A)", "(A)", 1, 0),  # the space that a GPT-2 tokenizer keeps
        ("False\n", "False", 1, 0),
        (" (Q)", "(Q)", 1, 0),  # the harness stops at Q
        ("(Q)", "(Q)", 1, 0),
        (" ( Q)", "(Q)", 0, 0),
        ("(A) because", "(A)", 0, 0),
        ("", "(A)", 0, 0),
    ],
)
def test_bbh_by_hand(text, target, exact, harness):
    assert score_bbh(text, target) == {"exact_match": exact, "harness": harness}


def test_texts_end_before_the_first_stop():
    assert cut(" (Q)\n\nQ: What", BBH_STOPS) == " (Q)"
    assert cut(" yes\nQ: no\n\nQ: x", BBH_STOPS) == " yes\n"
    assert cut("#### 5<|im_end|>\nQuestion: a", GSM8K_STOPS) == "#### 5"
    assert flexible_number("a 1,000.5 b") == "1,000.5"


def test_prompts_have_the_harness_form():
    (problem, *_), train = (data.gsm8k(data._HERE / "gsm8k", 2, 3), (data._HERE / "gsm8k" / "train.jsonl"))
    assert problem.prompt.count("Question: ") == 3 and problem.prompt.endswith("\nAnswer:")
    assert (
        problem.prompt.split("\n\nQuestion: ")[0].split("Question: ")[1].split("\nAnswer: ")[0]
        in train.read_text()
    )
    questions = data.bbh(data._HERE / "bbh", None, ("navigate",))
    assert len(questions) == 2 and questions[1].item == "navigate/1"
    assert questions[0].prompt.startswith("Given a series of navigation instructions")
    assert questions[0].prompt.count("\nA:") == 4 and questions[0].prompt.endswith("\nA:")


def test_all_27_tasks_have_three_worked_examples():
    worked = data.bbh_worked_examples()
    assert len(worked) == 27 and all(len(each["samples"]) == 3 for each in worked.values())


# ---- the harness itself ----


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness (lm_eval) is not installed")


ANSWERS = [
    "#### 1072", "#### 1,072.", "#### $1,072", "#### 1072\n#### 5", "so $1,072...", "1 2 3", "", "#### ",
    "x #### -5 y 1072", "The answer is 1,072. ", "#### 1072.00", "1072 or (1072)", "####1072 #### 1072,",
    "$", "..", "-", "- 1072", "1072%", "#### 1.072", " 1072 ", "One thousand", "#### 1072 dollars",
]  # fmt: skip


def test_gsm8k_scores_are_the_harness_own(harness):
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    path = next(iter(harness.__path__)) + "/tasks/gsm8k/gsm8k.yaml"
    with open(path, encoding="utf-8") as file:
        config = yaml.safe_load(file)
    metric = config["metric_list"][0]
    options = {name: metric[name] for name in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    for ours, theirs in (("strict", "strict-match"), ("flexible", "flexible-extract")):
        given = next(each for each in config["filter_list"] if each["name"] == theirs)["filter"][0]
        made = RegexFilter(**{name: value for name, value in given.items() if name != "function"})
        for text in ANSWERS:
            ((found,),) = made.apply([[text]], [{}])
            right = exact_match_hf_evaluate([found], [GOLD], **options)["exact_match"]
            assert score_gsm8k(text, GOLD)[ours] == right, (ours, text, found)
    assert config["generation_kwargs"]["until"] == list(GSM8K_STOPS)


def test_bbh_prompts_and_stops_are_the_harness_own(harness):
    import yaml

    from d3rt.evaluation.scoring import BBH_HARNESS_STOPS

    folder = next(iter(harness.__path__)) + "/tasks/bbh/fewshot/"
    with open(folder + "_fewshot_template_yaml", encoding="utf-8") as file:
        assert tuple(yaml.safe_load(file)["generation_kwargs"]["until"]) == BBH_HARNESS_STOPS
    for task, worked in data.bbh_worked_examples().items():
        with open(folder + f"{task}.yaml", encoding="utf-8") as file:
            config = yaml.safe_load(file)
        assert config["description"] == worked["description"], task
        assert config["fewshot_config"]["samples"] == worked["samples"], task
        assert config["doc_to_text"] == "Q: {{input}}\nA:"
