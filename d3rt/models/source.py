"""Source: where a runtime's weights come from, one parameter at a time.

A model that somebody else uses is left as it is, and its tensors are shared. A model that was only loaded to be
compiled lets go of each parameter as it is taken, so that it and what is made of it never exist both in full. Files
whose parameters are read one by one have sources of their own (loading.py, storage.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from d3rt.errors import UnsupportedModelError
from d3rt.quantize import Matrix, Width


class Source(Protocol):
    """`model` is the Hugging Face module: config, generation_config, and every parameter by name and shape. The values
    of its parameters are asked of `take` alone; they may lie on the meta device, where there are none."""

    model: nn.Module

    def take(self, name: str, width: Width) -> Matrix:
        """The parameter of that name, called once for each: a tensor of any dtype, or a PackedMatrix where the source
        has it packed. `width` is what it will be kept in, for a source that has a choice."""


class SharedModule:
    """A model that its owner goes on using: nothing of it is changed.

    UnsupportedModelError when it is neither on the CPU nor on `device`, where the weights will be.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu"):
        for parameter in model.parameters():
            if parameter.device.type != "cpu" and parameter.device != torch.device(device):
                raise UnsupportedModelError(
                    f"the model is on device '{parameter.device}'; its weights are read where they lie, so they must "
                    "be on the CPU: model.cpu()."
                )
        self.model = model
        self._parameters = parameters(model)

    def take(self, name: str, width: Width) -> torch.Tensor:
        return self._parameters[name].detach()


class OwnedModule(SharedModule):
    """A model that nobody else has: each parameter that is taken leaves it, and is empty in `model` from then on."""

    def take(self, name: str, width: Width) -> torch.Tensor:
        parameter = self._parameters[name]
        taken = parameter.detach()
        parameter.data = torch.empty(0, dtype=parameter.dtype)
        return taken


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by every name it has: a tied one has two."""
    return dict(model.named_parameters(remove_duplicate=False))


def is_tied(model: nn.Module) -> bool:
    """Whether the lm_head is the embedding: the same parameter, or one in the same memory."""
    found = parameters(model)
    head, embed = found["lm_head.weight"], found["model.embed_tokens.weight"]
    return head is embed or (head.device.type != "meta" and head.data_ptr() == embed.data_ptr() != 0)


def skeleton(hf_config: Any) -> nn.Module:
    """The Hugging Face causal LM of that config on the meta device: names and shapes, and no memory.

    UnsupportedModelError for a config that transformers has no causal LM for.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False).eval()
    except ValueError as error:
        raise UnsupportedModelError(f"transformers has no causal LM for this config: {error}") from error


def check_shapes(
    what: str, expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]
) -> None:
    """UnsupportedModelError when a file's tensors are not those that the config asks for: missing, left over, or of
    another shape. `what` is the file's name in the message."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problem = f"{name!r} is missing"
        elif name not in expected:
            problem = f"{name!r} is not part of the model"
        elif list(found[name]) != list(expected[name]):
            problem = f"{name!r} is {list(found[name])}, not {list(expected[name])}"
        else:
            continue
        raise UnsupportedModelError(f"{what}: its tensors do not match its own config: {problem}.")
