"""qwen2: Llama with biases on Q, K and V, and a sliding window on the layers that layer_types names."""

from __future__ import annotations

from d3rt.models.family import Family


class Qwen2(Family):
    model_type = "qwen2"
