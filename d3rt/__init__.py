"""d3rt: LLM decoding whose depth changes from token to token, at the speed the skipped work promises.

    fast = d3rt.compile(model, policy=d3rt.D3(alpha=0.999, start=0.5))
    out = fast.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=256)

Policies and errors need the standard library only; torch is loaded when `compile` or a model is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from d3rt.errors import (
    BackendUnavailableError,
    D3rtError,
    HoleError,
    ModelNotFoundError,
    PolicyError,
    SaveError,
    UnsupportedModelError,
    UnsupportedOptionError,
)
from d3rt.policies import (
    CALM,
    D3,
    FullDepth,
    LayerSchedule,
    LayerSet,
    Policy,
    Schedule,
    SkipDecode,
    StaticLayers,
    UnifiedSkip,
    parse,
)

if TYPE_CHECKING:
    from d3rt import evaluation, search
    from d3rt.compiling import compile, load
    from d3rt.models.loading import demo_model, load_model
    from d3rt.result import GenerateOutput, GenerationStats
    from d3rt.row_batch import RowBatch
    from d3rt.runtime import Runtime
    from d3rt.session import Reply, Session

__version__ = "0.1.0"

# Loaded on first use, because they bring torch and transformers with them.
_LAZY = {
    "compile": "d3rt.compiling",
    "Runtime": "d3rt.runtime",
    "load": "d3rt.compiling",
    "demo_model": "d3rt.models.loading",
    "load_model": "d3rt.models.loading",
    "Reply": "d3rt.session",
    "RowBatch": "d3rt.row_batch",
    "Session": "d3rt.session",
    "GenerateOutput": "d3rt.result",
    "GenerationStats": "d3rt.result",
    "search": "d3rt.search",
    "evaluation": "d3rt.evaluation",
    "lm_eval": "d3rt.lm_eval",
}

__all__ = [
    "CALM",
    "D3",
    "BackendUnavailableError",
    "D3rtError",
    "FullDepth",
    "GenerateOutput",
    "GenerationStats",
    "HoleError",
    "LayerSchedule",
    "LayerSet",
    "ModelNotFoundError",
    "Policy",
    "PolicyError",
    "Reply",
    "RowBatch",
    "Runtime",
    "SaveError",
    "Schedule",
    "Session",
    "SkipDecode",
    "StaticLayers",
    "UnifiedSkip",
    "UnsupportedModelError",
    "UnsupportedOptionError",
    "compile",
    "demo_model",
    "evaluation",
    "load",
    "load_model",
    "parse",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'd3rt' has no attribute {name!r}")
    module = import_module(_LAZY[name])
    value = module if module.__name__ == f"d3rt.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
