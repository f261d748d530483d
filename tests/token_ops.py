"""sample and advance against kernels/reference.py: what both interpreters, Triton's and that of PTX, are held to."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from d3rt.backends.reference import choose
from d3rt.errors import NotFiniteError
from d3rt.kernels import reference
from d3rt.sampling import SamplingParams


def chosen(logits: Tensor, params: SamplingParams, seen: Set[int], step: int, slot: int) -> int:
    """The reference's token of one slot, or what `sample` leaves where there is none (tokens.py)."""
    try:
        return choose(logits, params, seen, step, slot)
    except NotFiniteError as error:
        return -2 if "temperature" in str(error) else -1


def assert_advance_is_the_references(ops: Any) -> None:
    finished = torch.tensor([False, True, False])
    token, pos = torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([7, 8, 9], dtype=torch.int32)
    next_token = torch.tensor([4, 5, 6], dtype=torch.int32)
    expected = token.clone(), pos.clone()
    reference.advance(*expected, next_token, finished)
    ops.advance(token, pos, next_token, finished)
    assert torch.equal(token, expected[0]) and torch.equal(pos, expected[1])
    assert finished.tolist() == [False, True, False]


def assert_advance_finishes_at_an_end_token_and_hands_the_tokens_on(ops: Any) -> None:
    state = dict(
        token=torch.zeros(3, dtype=torch.int32),
        pos=torch.tensor([5, 6, 7], dtype=torch.int32),
        finished=torch.zeros(3, dtype=torch.bool),
        eos=torch.tensor([2, 9], dtype=torch.int32),
        pad=torch.tensor([11], dtype=torch.int32),
        step=torch.zeros(1, dtype=torch.int32),
        ring=torch.full((2, 3), -7, dtype=torch.int32),
    )
    for tokens in ([4, 9, 4], [4, 4, -1], [2, 4, 4]):
        ops.advance(next_token=torch.tensor(tokens, dtype=torch.int32), **state)
    assert state["ring"].tolist() == [[2, 11, 11], [4, 11, -1]]  # steps 2 and 1; 0 is overwritten
    assert state["pos"].tolist() == [8, 7, 9] and state["step"].item() == 3
    assert state["token"].tolist() == [2, 11, 11] and state["finished"].all()
