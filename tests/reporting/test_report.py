"""d3rt report: the page says what the files say, needs nothing else, and refuses what does not belong together."""

import copy
import html
import json
import re

import pytest
from typer.testing import CliRunner

from d3rt.cli import app
from d3rt.reporting import ReportInputError, page

POLICY = "d3:alpha=0.9,start=0.4"
SPREAD = {"median": 20.0, "min": 18.0, "max": 25.0, "values": [18.0, 20.0, 25.0]}
MACHINE = {"cpu": "A CPU", "cores": 2, "system": "Linux x86_64"}


def run(engine, weights, policy, **more):
    empty = dict.fromkeys(
        ("bytes_per_token", "mean_depth", "bandwidth_share", "expected_speedup", "measured_speedup")
    )
    return {
        **{"name": f"{engine} {weights} {policy}", "engine": engine, "weights": weights, "policy": policy},
        **{"decode": SPREAD, "prefill": SPREAD, "over_transformers": None, "transformers": None},
        **{"peak_bytes": None, **empty, **more},
    }


@pytest.fixture
def timed():
    gain = {"median": 1.21, "min": 1.1, "max": 1.3, "values": [1.1, 1.21, 1.3]}
    ratio = {"median": 3.5, "min": 3.0, "max": 4.0, "values": [3.0, 3.5, 4.0]}
    ms = lambda value: {"median": value, "min": value, "max": value, "values": [value]}  # noqa: E731
    return {
        "kind": "d3rt bench",
        "settings": {
            **{"model": "m", "num_layers": 6, "weights": ["int8"], "prompt_tokens": 8, "new_tokens": 16},
            **{"rounds": 3, "threads": 2, "backend": "cpu", "runs": "C++ avx2", "machine": MACHINE},
            **{"versions": {"d3rt": "0.1.0"}, "bandwidth_probe": "a probe"},
        },
        "bandwidth": {"median": 30.0, "min": 29.0, "max": 31.0, "values": [30.0]},
        "runs": [
            run("d3rt", "int8", "full", mean_depth=6.0, over_transformers=ratio, transformers="bfloat16"),
            run("d3rt", "int8", POLICY, mean_depth=4.2, expected_speedup=1.25, measured_speedup=gain),
            run("transformers", "bfloat16", None),
        ],
        "depths": [
            {
                "weights": "int8",
                "depth": depth,
                "layers": "",
                "bytes": 100 * depth,
                "milliseconds": ms(depth / 2),
            }
            for depth in (6, 3)
        ],
        "parts": [
            {"weights": "int8", "depth": depth, "op": op, "milliseconds": ms(depth / 6)}
            for depth in (6, 3)
            for op in ("norm_qkv_rope", "attention")
        ],
        "process_peak_bytes": 1,
        "notes": ["llama.cpp is not installed."],
    }


@pytest.fixture
def evaluated():
    mean = lambda value, **more: {"mean": value, "low": value - 0.1, "high": value + 0.1, "count": 4} | more  # noqa: E731
    against = {"difference": 0.3, "low": 0.1, "high": 0.5, "p": 0.01}
    cost = {"full": {"over_full": None}, POLICY: {"over_full": 1.25}}
    bins = [{"mean": 0.2, "difference": 0.2, "low": 0.1, "high": 0.3}, None]
    return {
        "about": {
            **{"model": "m", "runtime": "C++ avx2, 2 threads, bfloat16", "machine": MACHINE, "num_layers": 6},
            "versions": {"d3rt": "0.1.0"},
        },
        "arms": ["full", POLICY],
        "notes": ["few texts"],
        "tasks": {
            "ppl": {
                **{"title": "4 passages", "items": 4, "longest": 32, "cost": cost},
                "metrics": {"text": {"full": mean(3.1), POLICY: mean(3.437, against_full=against)}},
            },
            "agreement": {
                **{"title": "own text", "items": 4, "longest": 32, "cost": cost},
                "metrics": {
                    "kl": {"full": mean(0.0), POLICY: mean(0.262)},
                    "agree": {"full": mean(1.0), POLICY: mean(0.86)},
                },
                "positions": {"kl": {"edges": [0, 16, 32], "arms": {"full": bins, POLICY: bins}}},
            },
        },
    }


@pytest.fixture
def tuned():
    of = lambda drop, saved: {  # noqa: E731
        **{"drop": drop, "low": 0.0, "high": drop + 0.02, "bound": drop + 0.01, "saved": saved},
        **{"mean_depth": 5.0, "items": 40},
    }
    policy = "unified:ratio=1.25"
    return {
        "kind": "d3rt tune",
        **{"model": "m", "num_layers": 6, "runtime": "C++ avx2, 2 threads, int8", "machine": MACHINE},
        **{"versions": {"d3rt": "0.1.0"}, "task": "tickets.jsonl", "metric": "agreement", "max_drop": 0.05},
        **{"seed": 3, "prompt_tokens": 64, "new_tokens": 96, "candidates": {"d3": 51, "unified": 4}},
        "items": {"train": 80, "validation": 40, "test": 40},
        "policy_text": policy,
        "chosen": {"by": "bound", "words": "Chosen by its bound, say."},
        "validation": {"full": of(0.0, 0.0), policy: of(0.03, 0.15), POLICY: of(0.2, 0.3)},
        **{
            "front": ["full", policy, POLICY],
            "time_front": [policy],
            "speedup": {"full": SPREAD, policy: SPREAD},
        },
        "test": {**of(0.0423, 0.152), "verdict": "within the budget"},
    }


def words_of(text):
    """What a reader sees, in single spaces."""
    return html.unescape(" ".join(re.sub(r"<svg.*?</svg>|<[^>]+>", " ", text, flags=re.DOTALL).split()))


def test_the_page_says_what_the_files_say(evaluated, timed):
    text = page(evaluated, timed)
    row = re.search(rf"<tr><td><code>{POLICY}</code>.*?</tr>", text, re.DOTALL)[0]
    cells = [
        " ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)
    ]
    assert cells == [
        *(POLICY, "int8", "4.2", "20.0 (18-25)", "1.21x (1.10-1.30)", "1.25x"),
        *("0.262 (0.162-0.362)", "3.437 (3.337-3.537)"),
    ]
    assert "1.21x at int8 (expected 1.25x)" in text
    assert "another token than full depth at 14.0% of the steps" in text
    assert "is worse in NLL of a text (p 0.01, 4 items)" in text
    for caution in (
        "few texts",
        "fewer than 30 items",
        "llama.cpp is not installed.",
        "speed with weights in int8",
    ):
        assert caution in text
    for setting in ("C++ avx2 (cpu)", "30 GB/s (29-31), a probe", "3 interleaved rounds", "A CPU, 2 cores"):
        assert setting in text
    assert text.count("<svg") == 5


def test_the_tuned_policy_stands_with_its_question_and_its_one_figure(tuned):
    text = page(None, None, tuned)
    shown = words_of(text)
    section = shown[shown.index("A policy for your task") : shown.index("Depth over position")]
    for words in (
        "task tickets.jsonl",
        "drop of agreement: tokens whose choice differs from full depth's",
        "budget 5.00%",
        "items 80 searched on, 40 chosen on, 40 for one figure after the choice",
        "unified:ratio=1.25 . Chosen by its bound, say.",
        "Test (40 items, read once, after the choice): a drop of 4.23% (0.00% to 6.23%), 15.2% of the bytes saved, "
        "mean depth 5.0 of 6. Within the budget.",
        "These figures flatter what was chosen",
    ):
        assert words in section, words
    assert (
        "For tickets.jsonl, with a drop of at most 5.00% (agreement), tuning chose unified:ratio=1.25: on 40 untouched"
    ) in shown
    assert "C++ avx2, 2 threads, int8; 64 prompt tokens of a text, 96 new tokens; seed 3" in shown
    assert "No speed here" in shown and "No quality here" in shown and "Speed against quality" not in shown
    assert text.count("<svg") == 2, "the candidates, and the depth of what was chosen"


def test_a_tuned_policys_few_items_and_full_depth_are_said(tuned):
    tuned["test"]["items"] = 4
    few = "The tuned policy's figure is of 4 items, fewer than 30"
    assert few in words_of(page(None, None, tuned))
    tuned["policy_text"] = "full"
    shown = words_of(page(None, None, tuned))
    assert "Full depth . Chosen by its bound, say." in shown and "tuning chose full depth: on 4" in shown
    assert few not in shown, "what nothing is lost by needs no items"


def test_the_page_needs_nothing_else(evaluated, timed, tuned):
    text = page(evaluated, timed, tuned)
    assert not re.search(r"<(script|link|iframe|img)\b", text)
    fetched = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert fetched and all(each.startswith("#") for each in fetched), "only parts of the pictures themselves"


def test_names_are_text_and_nothing_else(evaluated, timed, tuned):
    for of in (evaluated["about"], timed["settings"]):
        of["model"] = "<script>alert(1)</script>"
    evaluated["notes"] = ["<b>bold</b>"]
    tuned["model"], tuned["task"] = evaluated["about"]["model"], "<b>bold</b>"
    text = page(evaluated, timed, tuned)
    assert "<script>" not in text and "<b>" not in text
    assert "&lt;script&gt;alert(1)" in text and "&lt;b&gt;bold" in text


def test_what_is_not_there_is_named_with_the_command_that_makes_it(evaluated, timed):
    assert "No speed here: <code>d3rt bench --json FILE" in page(evaluated, None)
    assert "No policy for your task here: <code>d3rt tune --task FILE" in page(evaluated, None)
    alone = page(None, timed)
    assert "No quality here: <code>d3rt eval" in alone and "No speed here" not in alone
    with pytest.raises(ReportInputError, match="nothing to report"):
        page(None, None)


def test_files_of_different_models_are_refused(evaluated, timed, tuned):
    other = copy.deepcopy(timed)
    other["settings"]["model"] = "another"
    with pytest.raises(ReportInputError, match="different models .*'m'.*'another'"):
        page(evaluated, other)
    other = copy.deepcopy(timed)
    other["settings"]["num_layers"] = 7
    with pytest.raises(ReportInputError, match="different numbers of layers"):
        page(evaluated, other)
    words = r"different models \(d3rt eval: 'm', d3rt tune: 'another'\)"
    with pytest.raises(ReportInputError, match=words):
        page(evaluated, None, tuned | {"model": "another"})
    words = r"different numbers of layers \(d3rt bench: 6, d3rt tune: 7\)"
    with pytest.raises(ReportInputError, match=words):
        page(None, timed, tuned | {"num_layers": 7})


def test_another_machine_and_a_busy_one_are_said(evaluated, timed):
    evaluated["about"]["machine"] = MACHINE | {"cpu": "Another"}
    timed["runs"][0]["decode"] = SPREAD | {"min": 5.0}
    text = page(evaluated, timed)
    assert "come from two machines (Another, A CPU)" in text
    assert "The machine was busy: one run&#39;s speeds differ by 5.0x" in text


def test_the_command_writes_the_page_or_one_line(evaluated, timed, tuned, tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "report.json").write_text(json.dumps(evaluated))
    (tmp_path / "bench.json").write_text(json.dumps(timed))
    out = tmp_path / "new" / "page.html"
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "tune.json").write_text(json.dumps(tuned))
    files = ["--eval", str(tmp_path / "eval"), "--bench", str(tmp_path / "bench.json")]
    files += ["--tune", str(tmp_path / "tune")]
    done = CliRunner().invoke(app, ["report", *files, "--out", str(out)])
    assert done.exit_code == 0 and out.read_text(encoding="utf-8") == page(evaluated, timed, tuned)
    (tmp_path / "bench.json").write_text("{}")
    for arguments, words in (
        (files, "has no settings, runs, depths; d3rt bench --json FILE writes such a file."),
        (["--bench", str(tmp_path / "none.json")], "cannot be read"),
        (
            ["--tune", str(tmp_path / "eval")],
            "tune.json' cannot be read (No such file or directory); d3rt tune writes it.",
        ),
        (["--tune", str(tmp_path / "eval" / "report.json")], "has no model, num_layers, runtime, machine"),
        (["--quick", "--tune", str(tmp_path / "tune")], "--quick with --eval, --bench or --tune"),
        ([], "nothing to report"),
        (["--quick", *files], "--quick with --eval, --bench or --tune"),
        (["--policy", "full"], "--policy and --model are for --quick"),
        (["--quick", "--policy", "d4"], "policy 'd4'"),
    ):
        done = CliRunner().invoke(app, ["report", *arguments, "--out", str(tmp_path / "x.html")])
        assert done.exit_code == 2 and words in " ".join(done.output.split()), done.output
    assert not (tmp_path / "x.html").exists()
