"""Static layer sets found on texts: the rivals that a schedule has to beat at equal bytes.

    d3rt.search.shortgpt(model, texts, keep=22)      the layers that change their input most (block influence)
    d3rt.search.greedy(model, texts, keep=22)        removes, again and again, the layer whose loss hurts least
    d3rt.search.layerdrop(30, p=0.25)                every floor(1 / p)-th layer dropped; needs no model

Each returns a `StaticLayers` policy and is deterministic. model: a Hugging Face causal LM, or what `d3rt.load_model`
takes. texts: strings (with the model's tokenizer), token ids, or a tokenizer's padded batch. What is searched on must
not be what the result is judged on: `d3rt eval` is for that.
"""

from __future__ import annotations

from d3rt.search.greedy import GreedyPath, greedy, greedy_path
from d3rt.search.influence import block_influence, shortgpt
from d3rt.search.layerdrop import layerdrop

__all__ = ["GreedyPath", "block_influence", "greedy", "greedy_path", "layerdrop", "shortgpt"]
