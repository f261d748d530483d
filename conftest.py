"""Keeps the repository root off sys.path while tests run.

`python -m pytest` and PYTHONPATH=. put it there, and then the top-level folder kernels/ stands where
transformers looks for Hugging Face's package of that name. d3rt itself comes from its (editable)
installation, kernels/ as d3rt.kernels.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.resolve()

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

if importlib.util.find_spec("d3rt") is None:
    raise pytest.UsageError("d3rt is not installed in this Python: run `make venv` and use .venv/bin/pytest.")
