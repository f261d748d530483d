"""bench/perplexity.py: its figures are the model's own likelihoods, and its interval is that of a paired bootstrap."""

import json
import math
import subprocess
import sys
from pathlib import Path

import perplexity
import pytest
import tiny_models
import torch
from transformers import AutoTokenizer

import d3rt
from d3rt import bench

SCRIPT = Path(perplexity.__file__)


def hugging_face(model, rows):
    """Negative log-likelihoods [R, T - 1] by one forward call."""
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits.double()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_teacher_forcing_gives_the_models_own_likelihoods(name, backend):
    model = tiny_models.make(name)
    rows = torch.tensor([tiny_models.prompt(20, seed) for seed in range(3)])
    calls = []
    fast = tiny_models.runtime(name, backend=backend)
    losses = bench.teacher_forced(fast, rows, lambda: calls.append(1))
    assert losses.dtype == torch.float64 and len(calls) == 19
    # float32 through a few layers: roundings of logits of about 10
    assert (losses - hugging_face(model, rows)).abs().max() <= 1e-4
    again = bench.teacher_forced(fast, rows[1:2])
    assert (again - losses[1:2]).abs().max() <= 1e-4, "what was read before leaves no trace"


def test_teacher_forcing_skips_what_the_policy_skips():
    rows = torch.tensor([tiny_models.prompt(12)])
    whole, half = (
        bench.teacher_forced(tiny_models.runtime("llama", policy), rows)
        for policy in (None, "static:layers=0-2")
    )
    assert torch.equal(whole[:, 0], half[:, 0]), "the prefill is whole"
    assert (whole[:, 1:] - half[:, 1:]).abs().max() > 0.1


def test_every_token_but_the_first_is_predicted_once():
    rows = perplexity.sequences(torch.arange(23), tokens=100, context=5)
    assert rows.tolist() == [list(range(start, start + 6)) for start in (0, 5, 10, 15)]
    assert perplexity.sequences(torch.arange(4), tokens=100, context=50).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(SystemExit, match="at least 2"):
        perplexity.sequences(torch.arange(1), tokens=9, context=9)


def test_the_interval_is_of_the_difference_and_not_of_the_texts():
    hard_and_easy = torch.rand(4, 1024, generator=torch.Generator().manual_seed(0)).double() * 10
    ratio, low, high = perplexity.paired_interval(hard_and_easy + math.log(1.25), hard_and_easy)
    assert ratio == pytest.approx(1.25) and low == pytest.approx(1.25) and high == pytest.approx(1.25)
    noise = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1)).double() * 0.1
    ratio, low, high = perplexity.paired_interval(hard_and_easy[:, :1000] + noise, hard_and_easy[:, :1000])
    # the mean of 4000 differences of 0.1 is off by 0.0016; 1.96 of it either way, and windows are few
    assert low < ratio < high and 0.003 < high - low < 0.012


def test_the_script_prints_and_stores_every_width(model_folder, tmp_path):
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    model = tiny_models.fresh("llama", **tiny_models.PACKABLE, vocab_size=256)
    model.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 3, encoding="utf-8")
    command = [sys.executable, SCRIPT, "--model", tmp_path / "model", "--text", text, "--threads", "1"]
    command += ["--tokens", "40", "--context", "20", "--json", tmp_path / "figures.json"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    rows = {row["width"]: row for row in figures["rows"]}
    assert list(rows) == [width.name for width in perplexity.WIDTHS if not width.from_file]
    assert all(f"| {name} " in done.stdout for name in rows)
    ids = AutoTokenizer.from_pretrained(model_folder)(text.read_text(), return_tensors="pt").input_ids[0, :41]
    expected = hugging_face(model, perplexity.sequences(ids, 40, 20)).mean()
    assert rows["float32"]["nll"] == pytest.approx(float(expected), abs=1e-4)
    assert rows["float32"]["ratio"] == 1
    assert rows["float32, int8 K,V"]["kv_cache"] == "int8" and rows["int8"]["kv_cache"] == "bfloat16"
    assert 0 < abs(rows["float32, int8 K,V"]["ratio"] - 1) < 0.1
    assert rows["int8"]["step_megabytes"] < 0.35 * rows["float32"]["step_megabytes"]


def test_a_width_that_the_model_cannot_have_is_left_out_and_said(model_folder, tmp_path):
    report = perplexity.Report("tiny", "text", tokens=8, context=8)
    perplexity.measure(report, str(model_folder), 1, lambda tokenizer: torch.arange(9) + 3)
    assert [row.width for row in report.rows] == ["float32", "bfloat16", "float16", "float32, int8 K,V"]
    assert len(report.notes) == 2 and "multiple of 32" in report.notes[0]
    assert d3rt.UnsupportedModelError.__name__ not in report.notes[0]
