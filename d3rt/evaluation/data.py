"""Where the items come from: local files, the few that come with d3rt, or the library `datasets` where it is
installed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from d3rt.errors import D3rtError

GSM8K_SEED = 1234  # lm-evaluation-harness' own for its worked examples
PROMPT_FIELDS = ("prompt", "question", "text", "input", "turns")
_HERE = Path(__file__).parent / "data"


class DataMissingError(D3rtError, OSError):
    """Items that are at no place where they were looked for."""


@dataclass(frozen=True)
class Question:
    """One item of gsm8k or bbh: the whole prompt, worked examples included, and what is right."""

    item: str
    group: str  # the BBH task; empty for GSM8K
    prompt: str
    target: str


def gsm8k(folder: Path | None, shots: int, limit: int | None) -> list[Question]:
    """The first `limit` problems. Before each, `shots` other worked examples, drawn as the harness draws them."""
    if folder is None:
        test, train = (_dataset("gsm8k", "openai/gsm8k", "main", split) for split in ("test", "train"))
    else:
        test, train = (json_lines(folder / f"{split}.jsonl", "--gsm8k") for split in ("test", "train"))
    if shots > len(train):
        raise ValueError(f"shots={shots}: there are {len(train)} worked examples.")
    draw = random.Random(GSM8K_SEED)
    questions = []
    for at, problem in enumerate(test[:limit]):
        worked = draw.sample(train, shots) if shots else []
        before = "".join(f"Question: {each['question']}\nAnswer: {each['answer']}\n\n" for each in worked)
        prompt = f"{before}Question: {problem['question']}\nAnswer:"
        questions.append(Question(str(at), "", prompt, problem["answer"]))
    return questions


def bbh(folder: Path | None, limit: int | None, tasks: Sequence[str] | None = None) -> list[Question]:
    """The first `limit` items of each of `tasks` (None is all 27), three worked examples before each, without chains of
    thought."""
    questions = []
    known = bbh_worked_examples()
    for task in known if tasks is None else tasks:
        if task not in known:
            raise ValueError(f"BBH has no task {task!r}; there are: {', '.join(known)}.")
        worked = known[task]
        if folder is None:
            examples = _dataset("bbh", "SaylorTwift/bbh", task, "test")
        else:
            path = (
                folder / "tasks" / f"{task}.json" if (folder / "tasks").is_dir() else folder / f"{task}.json"
            )
            examples = _json(path, "--bbh")["examples"]
        before = worked["description"] + "".join(
            f"Q: {each['input']}\nA: {each['target']}\n\n" for each in worked["samples"]
        )
        for at, example in enumerate(examples[:limit]):
            prompt = f"{before}Q: {example['input']}\nA:"
            questions.append(Question(f"{task}/{at}", task, prompt, example["target"]))
    return questions


@cache
def bbh_worked_examples() -> dict[str, Any]:
    """Description and samples of each BBH task, by name: those of the harness' bbh_fewshot."""
    return json.loads((_HERE / "bbh_fewshot.json").read_text(encoding="utf-8"))


def text(path: Path | None) -> str:
    """The text of which ppl and agreement take their passages."""
    if path is None:
        return "".join(
            row["text"] for row in _dataset("text", "Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        )
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataMissingError(f"--text {str(path)!r} cannot be read: {error}.") from error


def prompts(path: Path) -> list[str]:
    """A prompt of each line: the first of PROMPT_FIELDS that it has; of a list, the first entry."""
    found = []
    for at, line in enumerate(json_lines(path, "--prompts"), 1):
        value = next((line[name] for name in PROMPT_FIELDS if name in line), None)
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{path}, line {at}: none of the fields {', '.join(PROMPT_FIELDS)} holds a text."
            )
        found.append(value)
    return found


def json_lines(path: Path, option: str) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; errors name `option`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise DataMissingError(f"{option}: {str(path)!r} cannot be read: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{option}: {str(path)!r} is not JSON lines: {error}.") from error


def _json(path: Path, option: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataMissingError(f"{option}: {str(path)!r} cannot be read: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{option}: {str(path)!r} is not JSON: {error}.") from error


def _dataset(option: str, name: str, part: str, split: str) -> Sequence[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataMissingError(
            f"no --{option} was given, and the library `datasets`, which would load {name}, is not installed: give a "
            "local copy, pip install datasets, or take the few items that come with d3rt (--quick)."
        ) from error
    try:
        return load_dataset(name, part, split=split).to_list()
    except Exception as error:  # whatever it raises offline: many kinds, none of them its own
        raise DataMissingError(
            f"{name} ({part}) could not be loaded; give a local copy (--{option}): {error}"
        ) from error
