"""mistral: Llama with a sliding window over all layers where the config sets one."""

from __future__ import annotations

from d3rt.models.family import Family


class Mistral(Family):
    model_type = "mistral"
