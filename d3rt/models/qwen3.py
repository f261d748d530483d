"""qwen3: Llama with an RMSNorm over each query and key head, and its own head_dim."""

from __future__ import annotations

from d3rt.models.family import Family


class Qwen3(Family):
    model_type = "qwen3"
