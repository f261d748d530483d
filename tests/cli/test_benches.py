"""The benchmarks of bench/ run: each file once, untimed, since nothing else would notice that one has broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_decode.py", "int8-half or bfloat16-transformers"),
        ("test_generate.py", "bfloat16"),
        ("test_ops.py", "SmolLM2 and proj_add"),
        ("test_overhead.py", "int4"),
        ("test_scaling.py", "batch and bfloat16"),
    ],
)
def test_a_benchmark_runs(file, chosen):
    command = [
        sys.executable,
        "-m",
        "pytest",
        ROOT / "bench" / file,
        "--benchmark-disable",
        "-q",
        "-k",
        chosen,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


def test_the_comparison_with_peers_runs(tmp_path):
    """Two engines that are always there; llama.cpp and ONNX Runtime are compared by hand."""
    figures = tmp_path / "peers.json"
    command = [
        sys.executable,
        ROOT / "bench" / "peers.py",
        "--engines",
        "d3rt,transformers",
        "--widths",
        "16bit",
    ]
    command += ["--rounds", "2", "--prompt", "4", "--tokens", "3", "--prefill", "8", "--json", figures]
    done = subprocess.run([*command, "--work", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| 16bit | transformers | bfloat16 |" in done.stdout
    engines = json.loads(figures.read_text())["results"][0]["engines"]
    assert {name: len(of["decode"]) for name, of in engines.items()} == {"d3rt": 2, "transformers": 2}
