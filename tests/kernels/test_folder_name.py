"""The folder kernels/ has the name of a package of Hugging Face's. Python started in the repository root finds ours
first; it must step aside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = "import kernels, transformers, d3rt.runtime, d3rt.kernels.reference; print(getattr(kernels, 'whose', None))"


def run_in_root(code: str, *path: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def theirs(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    return tmp_path


def test_python_started_in_the_repository_root_loads_transformers_and_d3rt():
    done = run_in_root(CODE)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


def test_an_installed_package_of_that_name_is_the_one_that_is_imported(theirs):
    done = run_in_root(CODE, theirs)
    assert (done.returncode, done.stdout) == (0, "theirs\n"), done.stderr


def test_our_modules_are_not_to_be_had_under_that_name():
    done = run_in_root("import kernels.reference")
    assert "No module named 'kernels.reference'" in done.stderr
