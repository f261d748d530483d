"""What of a runtime decides its results, the head of every journal; and what a report says of it."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from typing import Any

import torch

from d3rt import bench
from d3rt.runtime import Runtime

_PROBE = 1024  # values of each weight that go into the model's fingerprint


def conditions(runtime: Runtime) -> dict[str, Any]:
    """By name, in types that JSON knows. Threads are not among them: every number of them gives the same bits."""
    return {
        "d3rt": metadata.version("d3rt"),
        "model": _fingerprint(runtime),
        "widths": str(runtime.widths),
        "backend": runtime.backend.name,
        "kv_fill": runtime.kv_fill,
        "max_seq_len": runtime.max_seq_len,
    }


def about(runtime: Runtime) -> dict[str, Any]:
    """Of the model, and of what it was measured with."""
    return {
        "model": getattr(runtime._hf_config, "name_or_path", "") or "a model in memory",
        "runtime": f"{runtime.backend.describe()['runs']}, {runtime.backend.threads} threads, {runtime.widths}",
        "machine": bench.machine(),
        "versions": bench.versions(),
        "num_layers": runtime.config.num_hidden_layers,
    }


def digest(value: Any) -> str:
    """16 hexadecimal digits of a value of JSON's types: equal for equal ones."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _fingerprint(runtime: Runtime) -> str:
    """Of the config and the beginning of every weight."""
    found = hashlib.sha256(json.dumps(runtime._hf_config.to_dict(), sort_keys=True, default=str).encode())
    for tensor in runtime.engine.decoder.weights.tensors():
        values = tensor.flatten()[:_PROBE].cpu().contiguous()
        found.update(values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
