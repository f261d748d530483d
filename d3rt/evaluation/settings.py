"""Settings: what an evaluation is. They are written above its results, and are what a continued one must share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TASKS = ("gsm8k", "bbh", "ppl", "agreement")
QUICK_POLICY = "d3:alpha=0.998,start=0.5"

QUICK_BBH = (  # those with the shortest prompts
    *("boolean_expressions", "dyck_languages", "hyperbaton", "movie_recommendation"),
    *("multistep_arithmetic_two", "navigate", "object_counting", "sports_understanding"),
)


@dataclass(frozen=True)
class Settings:
    """What `evaluate` is asked for. A path that is None is taken from the library `datasets`, where that is
    installed."""

    tasks: tuple[str, ...] = TASKS
    policies: tuple[str, ...] = (QUICK_POLICY,)  # beside full depth, which always runs
    out: Path = Path("out/eval")
    shots: int = 5  # worked examples before a GSM8K problem; BBH has 3 always
    limit: int | None = 100  # GSM8K problems, the first ones; None is all
    bbh_limit: int | None = 10  # items of each of the 27 BBH tasks
    bbh_tasks: tuple[str, ...] | None = None  # None is all 27
    texts: int = 32  # passages of ppl and of agreement
    max_new_tokens: int = 256  # of an answer
    prompt_tokens: int = 128  # of a passage, read at full depth
    continued_tokens: int = 256  # of a passage, after these
    gsm8k: Path | None = None  # a folder with test.jsonl and train.jsonl
    bbh: Path | None = None  # a folder with a JSON file for each task
    text: Path | None = None  # a text file
    prompts: Path | None = None  # of agreement, instead of passages: JSON lines with a field of PROMPT_FIELDS
    chat: bool = False  # the prompts go through the tokenizer's chat template
    restart: bool = False  # throws away what is in `out`
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("texts", 1), ("max_new_tokens", 1), ("prompt_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least {least}.")
        if self.continued_tokens < 1:
            raise ValueError(f"continued_tokens={self.continued_tokens}: it must be at least 1.")
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"task {task!r}: there are {', '.join(TASKS)}.")
        if not self.tasks:
            raise ValueError(f"no task: choose of {', '.join(TASKS)}.")

    def quick(self, **changes: Any) -> Settings:
        """The same tasks on the few items that come with d3rt: under two minutes on the embedded model."""
        here = Path(__file__).parent / "data"
        few = dict(
            shots=2,
            limit=4,
            bbh_limit=2,
            bbh_tasks=QUICK_BBH,
            texts=4,
            max_new_tokens=64,
            prompt_tokens=64,
            continued_tokens=64,
        )
        files = dict(gsm8k=here / "gsm8k", bbh=here / "bbh", text=here / "wikitext2.txt", prompts=None)
        return replace(self, **(few | files | changes))
