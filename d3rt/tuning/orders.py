"""Orders: in which order searches leave layers out, found on the train texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from d3rt.evaluation.journal import Journal
from d3rt.search import block_influence, greedy_path
from d3rt.tuning.candidates import DROPPED


class Orders:
    """What the searches find. Each runs when it is first asked for, and is kept in the journal: greedy takes long."""

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[str], journal: Journal, progress: bool):
        self._model, self._texts, self._journal = model, texts, journal
        self._options = {"tokenizer": tokenizer, "progress": progress}

    def influence(self) -> Sequence[float]:
        """Each layer's block influence."""
        return self._kept("influence", lambda: block_influence(self._model, self._texts, **self._options))

    def removed(self, num_layers: int) -> Sequence[int]:
        """The layers that a greedy search leaves out, in its order: as many as any candidate does."""
        keep = max(1, num_layers - max(DROPPED))
        return self._kept(
            "greedy", lambda: greedy_path(self._model, self._texts, keep=keep, **self._options).removed
        )

    def _kept(self, name: str, search: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        key = ("search", "train", name)
        if key not in self._journal.results:
            self._journal.add(*key, {"found": list(search())})
        return self._journal.results[key]["found"]
