"""The D3 paper, re-examined: its averages from the formulas, its grid, its premise, and its rivals at equal bytes.

What docs/paper.md reports is what this prints. Results are kept in --out as they come: the same command goes on where
one was stopped. Data are local files; without them, the few items that come with d3rt (a try-out, no figures to quote).

    python bench/paper.py averages
    python bench/paper.py grid --gsm8k DIR --bbh DIR --text FILE
    python bench/paper.py premise --text FILE --new 256 --texts 24
    python bench/paper.py equal --text FILE --new 128 --texts 24
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from reexamined import averages, equal_bytes, grid, premise

import d3rt
from d3rt import bench
from d3rt.evaluation.settings import QUICK_BBH, Settings

PARTS = {"averages": averages, "grid": grid, "premise": premise, "equal": equal_bytes}
QUESTIONS = Path(__file__).parents[1] / "tests" / "data" / "mt_bench.jsonl"


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's; data that is not given is what comes with d3rt."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", help="folder, GGUF file or hub id; the embedded model if not given")
    parser.add_argument("--weights", default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--gsm8k", type=Path, help="folder with test.jsonl and train.jsonl")
    parser.add_argument("--bbh", type=Path, help="folder with the tasks' JSON files")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--prompts", type=Path, default=QUESTIONS, help="JSON lines: chat prompts")
    parser.add_argument("--shots", type=int, default=2, help="worked examples before a GSM8K problem")
    parser.add_argument("--gsm8k-items", type=int, default=4)
    parser.add_argument("--bbh-items", type=int, default=1, help="of each task")
    parser.add_argument("--bbh-new", type=int, default=24, help="tokens of a BBH answer, at most")
    parser.add_argument("--texts", type=int, default=4, help="passages, and chat prompts")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a passage at full depth")
    parser.add_argument("--new", type=int, default=64, help="tokens after these; of an answer, at most")
    parser.add_argument("--out", type=Path, default=Path("out/paper"))
    given = parser.parse_args(arguments)
    quick = Settings().quick()
    given.bbh_tasks = QUICK_BBH if given.bbh is None else None
    for name in ("gsm8k", "bbh", "text"):
        if getattr(given, name) is None:
            setattr(given, name, getattr(quick, name))
    if given.new < 16 or given.texts < 1:
        parser.error(f"--new {given.new} --texts {given.texts}: at least 16 tokens and 1 text are needed.")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one part; prints its tables, writes JSON and picture."""
    given = options(arguments)
    part = PARTS[given.part]
    given.out.mkdir(parents=True, exist_ok=True)
    about = {
        "arguments": {name: str(value) for name, value in vars(given).items()},
        "versions": bench.versions(),
    }
    if part is averages:
        found = averages.measure()
    else:
        given.model_object, tokenizer = d3rt.load_model(given.model)  # the searches run Hugging Face's layers
        fast = d3rt.compile(
            given.model_object,
            weights=given.weights,
            kv_cache_dtype="bfloat16",
            threads=given.threads,
            tokenizer=tokenizer,
            max_seq_len=4096,
            batch_size=8,
        )
        found = part.measure(fast, given)
    print(part.markdown(found))
    path = given.out / f"{given.part}.json"
    path.write_text(json.dumps({"about": about, **found}, indent=2) + "\n", encoding="utf-8")
    if part is not averages:
        print(f"\nwrote {path} and {part.draw(found, given.out / f'{given.part}.png')}")


if __name__ == "__main__":
    main()
