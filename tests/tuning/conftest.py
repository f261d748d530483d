"""The tiny model of tune's tests, and what it is tuned for: twenty short prompts, half of the tokens."""

from __future__ import annotations

import json

import pytest
from byte_models import fast, model, tokenizer

from d3rt.tuning import Budget, Settings

__all__ = ["fast", "model", "settings", "tokenizer"]


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "task.jsonl"
    lines = [json.dumps({"prompt": f"number {at} is a number"}) for at in range(20)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return Settings(
        path,
        Budget("agreement", 0.5),
        ("d3", "unified"),
        tmp_path / "out",
        new_tokens=8,
        rounds=0,
        progress=False,
    )
