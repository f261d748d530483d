"""ShortGPT's block influence (arXiv 2403.03853): a layer that hardly turns its input is one to leave out.

Two traps of the authors' code are avoided. It counts pad tokens; here each text runs alone, so there are none. And it
takes the last layer's output from Hugging Face's hidden states, where that one stands behind the final norm; here it is
what the norm reads.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from d3rt.policies import StaticLayers
from d3rt.progress import Bar
from d3rt.search.stack import MAX_TOKENS, Stack, check_keep


def block_influence(
    model: nn.Module | str | os.PathLike[str] | None,
    texts: Any,
    *,
    tokenizer: Any = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> tuple[float, ...]:
    """BI_l = mean over all tokens of all texts of 1 - cos(h_l, h_{l+1}), for each layer l: h_l is what it reads."""
    return _influence(Stack(model, texts, tokenizer, max_tokens), progress)


def _influence(stack: Stack, progress: bool) -> tuple[float, ...]:
    total = torch.zeros(len(stack), dtype=torch.float64)
    with stack.running(), Bar("block influence", len(stack.texts), progress) as bar:
        for ids in stack.texts:
            states = [state[0].double() for state in stack.read(ids).states]
            turned = (
                1 - F.cosine_similarity(before, after, dim=-1)
                for before, after in zip(states, states[1:], strict=False)
            )
            total += torch.tensor([float(each.sum()) for each in turned], dtype=torch.float64)
            bar.advance()
    return tuple((total / sum(map(len, stack.texts))).tolist())


def shortgpt(
    model: nn.Module | str | os.PathLike[str] | None,
    texts: Any,
    *,
    keep: int,
    prompt: str = "full",
    tokenizer: Any = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> StaticLayers:
    """The `keep` layers of highest block influence on `texts`; of equal ones the lower goes first.

    prompt: "full" runs the prompt through all layers, "skipped" as ShortGPT does, which deletes the others.
    """
    stack = Stack(model, texts, tokenizer, max_tokens)
    count = check_keep("shortgpt", keep, len(stack))
    influence = _influence(stack, progress)
    dropped = sorted(range(len(stack)), key=lambda layer: (influence[layer], layer))[: len(stack) - count]
    return StaticLayers.without(dropped, len(stack), prompt)
