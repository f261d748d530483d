"""The items of a task file: JSON lines, or pieces of a plain text."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

from d3rt.evaluation import data
from d3rt.evaluation.conditions import digest
from d3rt.evaluation.until import prompt_ids
from d3rt.runtime import Runtime

TARGETS = ("answer", "target")


@dataclass(frozen=True)
class Item:
    """Ids of what is read at full depth; for nll the ids that are forced after it; for exact_match what is right."""

    text: str
    head: tuple[int, ...]
    forced: tuple[int, ...] = ()
    target: str | None = None

    @cached_property
    def key(self) -> str:
        """What a journal knows it by: a digest of all of it."""
        return digest(astuple(self))


def read_items(runtime: Runtime, path: Path, metric: str, prompt_tokens: int, new_tokens: int) -> list[Item]:
    """The items of the file. ValueError where a line lacks what the metric needs.

    nll of JSON lines: the line's answer after its prompt, or else what follows the first prompt_tokens of the text."""
    if path.suffix not in (".jsonl", ".json"):
        if metric == "exact_match":
            raise ValueError(
                f"--task {str(path)!r}: exact_match needs JSON lines with {' or '.join(TARGETS)}."
            )
        return _pieces(runtime, data.text(path), prompt_tokens, new_tokens)
    items = []
    prompts, lines = data.prompts(path), data.json_lines(path, "--task")
    for at, (prompt, line) in enumerate(zip(prompts, lines, strict=True), 1):
        target = next((str(line[name]) for name in TARGETS if name in line), None)
        if metric == "exact_match" and not target:
            raise ValueError(f"{path}, line {at}: exact_match needs a right answer: {' or '.join(TARGETS)}.")
        head = prompt_ids(runtime, prompt, new_tokens)[0][0].tolist()
        forced: list[int] = []
        if metric == "nll":
            if target:
                forced = runtime.tokenizer(f" {target}", add_special_tokens=False).input_ids[:new_tokens]
            else:
                head, forced = head[:prompt_tokens], head[prompt_tokens : prompt_tokens + new_tokens]
            if len(forced) < 2:
                raise ValueError(
                    f"{path}, line {at}: nll needs at least 2 tokens after the prompt ({prompt_tokens} tokens of the "
                    "text where there is no answer); lower --prompt-tokens or give answers."
                )
        items.append(Item(prompt, tuple(head), tuple(forced), target))
    return items


def _pieces(runtime: Runtime, text: str, prompt_tokens: int, new_tokens: int) -> list[Item]:
    ids = runtime.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    length = prompt_tokens + new_tokens
    return [
        Item(
            runtime.tokenizer.decode(ids[at : at + length]),
            tuple(ids[at : at + prompt_tokens]),
            tuple(ids[at + prompt_tokens : at + length]),
        )
        for at in range(0, len(ids) - length + 1, length)
    ]
