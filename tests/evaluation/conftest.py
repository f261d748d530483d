"""The tiny model of the evaluation's tests, and a text for it."""

from __future__ import annotations

import pytest
from byte_models import fast, model, tokenizer

__all__ = ["fast", "model", "text_file", "tokenizer"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
    return path
