"""Stack: a Hugging Face decoder taken apart, so that any of its layers can be left out of a run over a text.

The layers are called with the very arguments (mask, rotary embeddings, positions) that the model itself gave them, so
that nothing of a family's own is repeated here; a layer that is left out keeps every other layer's mask its own, also
where windows differ between layers. One text at a time and without a cache: nothing is padded, so no pad is counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d3rt.errors import PolicyError
from d3rt.models import family_of
from d3rt.models.loading import load_model
from d3rt.policies.base import check_integer

MAX_TOKENS = 512


class Stack:
    """The layers of a model, and the texts they are tried on.

    texts: strings, token ids (lists or tensors), or a tokenizer's batch of input_ids and attention_mask, whose pads are
        left out. Of each no more than max_tokens are read.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str] | None,
        texts: Any,
        tokenizer: Any = None,
        max_tokens: int = MAX_TOKENS,
    ):
        if not isinstance(model, nn.Module):
            model, found = load_model(model)
            tokenizer = tokenizer or found
        family_of(getattr(model, "config", None))  # refuses by name what has other layers than these
        self.model = model
        self.layers = model.model.layers
        self.texts = [ids.to(model.device) for ids in token_ids(texts, tokenizer, max_tokens)]

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without gradients and without dropout."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.train(training)

    def read(self, ids: Tensor) -> Walk:
        """One run of ids [T] through the whole model."""
        calls: list[tuple[tuple, dict]] = []

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.append((args, kwargs))

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self.layers]
        hooks.append(self.model.model.norm.register_forward_pre_hook(note, with_kwargs=True))
        try:
            self.model.model(ids[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return Walk(self, ids, calls)


class Walk:
    """A text's way through the layers. states[l] is what layer l reads, states[L] what the final norm reads: not
    Hugging Face's last hidden state, which is taken after that norm."""

    def __init__(self, stack: Stack, ids: Tensor, calls: Sequence[tuple[tuple, dict]]):
        self._stack, self._ids = stack, ids
        self._calls = [(args[1:], kwargs) for args, kwargs in calls]
        self.states: list[Tensor] = [args[0] for args, _ in calls]

    def through(self, layers: Iterable[int], state: Tensor) -> Iterator[Tensor]:
        """The states before each of `layers` and after the last, from `state` on."""
        yield state
        for layer in layers:
            args, kwargs = self._calls[layer]
            state = self._stack.layers[layer](state, *args, **kwargs)
            yield state

    def loss(self, state: Tensor) -> float:
        """Summed negative log-likelihood of the text's tokens but the first, from the state after the last layer."""
        model = self._stack.model
        logits = model.get_output_embeddings()(model.model.norm(state))[0, :-1]
        return float(F.cross_entropy(logits.float(), self._ids[1:], reduction="none").double().sum())


def token_ids(texts: Any, tokenizer: Any, max_tokens: int) -> list[Tensor]:
    """Each text as int64 [T], T in 2..max_tokens; ValueError for one that is shorter, or when there is none."""
    if isinstance(texts, str):
        raise ValueError("texts is one string: pass a list of them.")
    if isinstance(texts, Mapping):
        rows, masks = texts["input_ids"], texts.get("attention_mask")
        rows = [torch.as_tensor(row) for row in rows]
        if masks is not None:
            rows = [row[torch.as_tensor(mask).bool()] for row, mask in zip(rows, masks, strict=True)]
    else:
        rows = [_encode(text, tokenizer) for text in texts]
    rows = [row.flatten()[:max_tokens] for row in rows]
    if not rows:
        raise ValueError("texts is empty: there is nothing to search on.")
    for at, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(
                f"texts[{at}] has {len(row)} tokens: at least 2 are needed, so that one is predicted."
            )
    return rows


def _encode(text: Any, tokenizer: Any) -> Tensor:
    if not isinstance(text, str):
        return torch.as_tensor(text)
    if tokenizer is None:
        raise ValueError("texts are strings, and there is no tokenizer: pass tokenizer=..., or token ids.")
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids


def check_keep(owner: str, keep: int, num_layers: int) -> int:
    """`keep` if a model of `num_layers` layers can keep that many; PolicyError otherwise."""
    if not 1 <= check_integer(owner, "keep", keep) <= num_layers:
        raise PolicyError(
            f"{owner}(keep={keep}): keep is how many of the model's {num_layers} layers remain, so it must be in "
            f"1..{num_layers}."
        )
    return keep
