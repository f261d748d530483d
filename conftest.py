"""Keeps the repository root off sys.path while tests run.

`python -m pytest` and PYTHONPATH=. put it there, where the folder kernels/ has the name of a package of Hugging
Face's. d3rt itself comes from its (editable) installation, kernels/ as d3rt.kernels.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.resolve()

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

if importlib.util.find_spec("d3rt") is None:
    raise pytest.UsageError("d3rt is not installed in this Python: run `make venv` and use .venv/bin/pytest.")
