"""Model families by Hugging Face model_type. A new family is one file and one line here."""

from __future__ import annotations

from typing import Any

from d3rt.errors import UnsupportedModelError
from d3rt.models.family import Family
from d3rt.models.llama import Llama
from d3rt.models.mistral import Mistral
from d3rt.models.qwen2 import Qwen2
from d3rt.models.qwen3 import Qwen3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Llama(), Mistral(), Qwen2(), Qwen3())}


def family_of(hf_config: Any) -> Family:
    """The family of a Hugging Face config; UnsupportedModelError names the model_type and what is supported."""
    model_type = getattr(hf_config, "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
