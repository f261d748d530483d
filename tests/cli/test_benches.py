"""The benchmarks of bench/ run: each file once, untimed, since nothing else would notice that one has broken."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_decode.py", "int8-half or bfloat16-transformers"),
        ("test_ops.py", "SmolLM2 and proj_add"),
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
