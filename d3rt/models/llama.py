"""llama: Llama 1-3.x, SmolLM2, TinyLlama and others of that architecture, incl. llama3 rope scaling, tied or untied
heads, attention_bias and mlp_bias."""

from __future__ import annotations

from d3rt.models.family import Family


class Llama(Family):
    model_type = "llama"

    def sliding_windows(self, hf_config):
        return (0,) * hf_config.num_hidden_layers  # Llama has no window, whatever its config may carry
