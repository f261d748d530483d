"""bench/kv_fill.py and bench/serve.py: their figures are what they say they are."""

import json

import kv_fill
import pytest
import serve
import tiny_models

import d3rt


def test_kv_fill_compares_what_each_mode_makes_of_a_second_turn():
    fast = tiny_models.runtime("llama")
    talks = [[tiny_models.prompt(6, seed), tiny_models.prompt(3, 9 + seed)] for seed in range(3)]
    report = kv_fill.Report("tiny", "float32", len(talks), 8)
    kv_fill.measure(report, fast, ["static:layers=0-2+5", "full"], talks, 4)
    rows = {(row.policy, row.mode): row for row in report.rows}
    assert list(rows) == [
        (policy, mode) for policy in ("static:layers=0-2+5", "full") for mode in kv_fill.MODES
    ]
    exact, eager, deferred = (rows["static:layers=0-2+5", mode] for mode in kv_fill.MODES)
    assert exact.kl == 0 and exact.agreement == 1 and exact.step_ratio == 1
    assert (
        eager.kl > 0.01 and abs(eager.kl - deferred.kl) < 1e-3 * eager.kl
    )  # float32: the same but for roundings
    weights = fast.engine.decoder.weights.layers
    assert eager.filled_megabytes == pytest.approx(sum(weights[layer].kv_bytes for layer in (3, 4)) / 1e6)
    assert deferred.filled_megabytes == 0 and (exact.kept_bytes, deferred.kept_bytes) == (0, 4 * 48)
    assert exact.reused == 6 and eager.reused == deferred.reused == 6 + 7
    assert all(rows["full", mode].kl == 0 for mode in kv_fill.MODES)
    assert "| static:layers" in str(_text(kv_fill.table(report)))


def _text(table):
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_serve_works_off_the_same_tokens_whoever_waits(tmp_path, capsys, monkeypatch):
    fast = tiny_models.runtime("llama", batch_size=2)
    monkeypatch.setattr(d3rt, "compile", lambda *_, **options: fast)
    serve.main(
        "--rows 2 --requests 9 --prompt 6 --new 12 --join 1,64 --rounds 1 --policy d3:alpha=0.9,start=0.4 "
        f"--json {tmp_path / 'out.json'}".split()
    )
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["policy"], row["join_every"]) for row in report["rows"]] == [
        (policy, every) for policy in ("full", "d3:alpha=0.9,start=0.4") for every in (1, 64)
    ]
    together, one_by_one = report["rows"][3], report["rows"][2]
    assert together["steps"] >= one_by_one["steps"] and together["deepest"] < one_by_one["deepest"] < 6
    assert "9 requests of" in shown
