"""Family: from a Hugging Face model to DecoderConfig and DecoderWeights, with nothing dropped silently.

Llama, Mistral, Qwen2 and Qwen3 share their module tree, so the names in it are here; a family's own file says what it
adds and refuses. Every parameter of the model must become a weight: one that is left over is a feature we do not know,
and the model is refused with its name. Where the parameters come from is the source's business (source.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from d3rt.config import DecoderConfig
from d3rt.errors import UnsupportedModelError
from d3rt.kernels.packing import PackedMatrix
from d3rt.models.decoder import DecoderWeights, LayerWeights
from d3rt.models.source import Source, is_tied, parameters
from d3rt.quantize import Matrix, Pack, Width, check_columns, convert, on_device, pack_in_slabs

# Hugging Face's names: of a layer's parameters by the field of LayerWeights that they become, and of the others.
MATRICES = {
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
}
VECTORS = {
    "attention_norm": "input_layernorm.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "bo": "self_attn.o_proj.bias",
    "mlp_norm": "post_attention_layernorm.weight",
    "b_gate": "mlp.gate_proj.bias",
    "b_up": "mlp.up_proj.bias",
    "b_down": "mlp.down_proj.bias",
}
EMBED, NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

# RoPE variants whose frequencies do not depend on the sequence length, so that one table serves every step.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Family:
    """What all supported families have in common. Subclasses set model_type and override what differs."""

    model_type: str

    def refusals(self, hf_config: Any) -> list[str]:
        """What of this config is not supported, one sentence each; empty when everything is."""
        reasons = []
        activation = getattr(hf_config, "hidden_act", "silu")
        if activation != "silu":
            reasons.append(f"hidden_act={activation!r} (supported: 'silu')")
        rope_type = rope_parameters(hf_config).get("rope_type", "default")
        if rope_type not in STATIC_ROPE_TYPES:
            reasons.append(f"rope_type={rope_type!r} (supported: {', '.join(STATIC_ROPE_TYPES)})")
        partial = rope_parameters(hf_config).get("partial_rotary_factor", 1.0)
        if partial != 1.0:
            reasons.append(f"partial_rotary_factor={partial} (supported: 1.0)")
        if getattr(hf_config, "quantization_config", None) is not None:
            reasons.append("weights quantised by another library (load the model unquantised)")
        return reasons

    def config(self, hf_config: Any) -> DecoderConfig:
        """The DecoderConfig of a Hugging Face config; UnsupportedModelError lists everything that is unsupported."""
        reasons = self.refusals(hf_config)
        if reasons:
            raise UnsupportedModelError(f"model_type {self.model_type!r}: unsupported {'; '.join(reasons)}")
        heads = hf_config.num_attention_heads
        return DecoderConfig(
            model_type=self.model_type,
            hidden_size=hf_config.hidden_size,
            num_hidden_layers=hf_config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
            intermediate_size=hf_config.intermediate_size,
            vocab_size=hf_config.vocab_size,
            max_position_embeddings=hf_config.max_position_embeddings,
            rms_norm_eps=hf_config.rms_norm_eps,
            sliding_windows=self.sliding_windows(hf_config),
        )

    def sliding_windows(self, hf_config: Any) -> tuple[int, ...]:
        """Each layer's window, 0 for none: Hugging Face's layer_types where it is given, else sliding_window."""
        window = getattr(hf_config, "sliding_window", None) or 0
        types = getattr(hf_config, "layer_types", None)
        if types is None:
            return (window,) * hf_config.num_hidden_layers
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise UnsupportedModelError(
                f"model_type {self.model_type!r}: unsupported layer_types {sorted(unknown)} "
                "(supported: full_attention, sliding_attention)"
            )
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)

    def widths(self, model: nn.Module, width: Width, head_width: Width) -> dict[str, Width]:
        """Every parameter of the model, in the order in which `weights` takes them, and the width it is kept in:
        matrices in `width`, the embedding and the lm_head in `head_width`, norms and biases in float32. A tied lm_head
        is not among them.

        UnsupportedModelError for a parameter that no weight is made of, and for a matrix that cannot be packed.
        """
        existing = parameters(model)
        names = {}
        for layer in range(model.config.num_hidden_layers):
            names |= {name_in(layer, part): width for part in MATRICES.values()}
            names |= {name_in(layer, part): torch.float32 for part in VECTORS.values()}
        names |= {EMBED: head_width, NORM: torch.float32, LM_HEAD: head_width}
        left = sorted(existing.keys() - names.keys())
        if left:
            raise UnsupportedModelError(
                f"model_type {self.model_type!r}: unsupported parameters {', '.join(left[:4])}"
                + (f" and {len(left) - 4} more" if len(left) > 4 else "")
            )
        if is_tied(model):
            del names[LM_HEAD]
        kept = {name: width for name, width in names.items() if name in existing}
        for name, width in kept.items():
            check_columns(name, existing[name].shape, width)
        return kept

    def weights(
        self,
        source: Source,
        width: Width,
        head_width: Width,
        device: torch.device | str = "cpu",
        pack: Pack = pack_in_slabs,
    ) -> DecoderWeights:
        """The source's weights on `device` in `width`, the embedding and the lm_head in `head_width`: the very tensors
        that it hands out where they are that already and contiguous, else made of them, packed by `pack`, and moved
        one by one.

        Norms and biases are copied to float32 (some kB): every kernel reads them so. Raises as `widths`, before
        anything is taken.
        """
        made: dict[str, Matrix] = {}
        for name, kept in self.widths(source.model, width, head_width).items():
            taken = source.take(name, kept)
            is_matrix = isinstance(taken, PackedMatrix) or taken.dim() == 2
            weight = convert(name, taken, kept, pack) if is_matrix else taken.to(kept, copy=True).contiguous()
            made[name] = on_device(weight, torch.device(device))
            del taken, weight  # before the next one is read
        layers = tuple(
            LayerWeights(
                **{field: made.get(name_in(layer, part)) for field, part in (MATRICES | VECTORS).items()}
            )
            for layer in range(source.model.config.num_hidden_layers)
        )
        return DecoderWeights(made[EMBED], layers, made[NORM], made.get(LM_HEAD, made[EMBED]))

    def named(self, weights: DecoderWeights) -> dict[str, Matrix]:
        """The weights by their Hugging Face names, as `weights` made them; a tied lm_head is left out."""
        named = {EMBED: weights.embed, NORM: weights.norm}
        if weights.lm_head is not weights.embed:
            named[LM_HEAD] = weights.lm_head
        for layer, lw in enumerate(weights.layers):
            parts = {name_in(layer, part): getattr(lw, field) for field, part in (MATRICES | VECTORS).items()}
            named |= {name: weight for name, weight in parts.items() if weight is not None}
        return named

    def rope_tables(self, model: nn.Module, max_seq_len: int) -> tuple[Tensor, Tensor]:
        """cos, sin [S, d/2] float32, from the model's own rotary module made afresh: a model cast to bfloat16 would
        hand out rounded frequencies."""
        rotary = type(model.model.rotary_emb)(model.config)
        angles = torch.arange(max_seq_len)[:, None].float() * rotary.inv_freq.float()
        return (
            (angles.cos() * rotary.attention_scaling).contiguous(),
            (angles.sin() * rotary.attention_scaling).contiguous(),
        )


def name_in(layer: int, part: str) -> str:
    """The name of a layer's parameter."""
    return f"model.layers.{layer}.{part}"


def rope_parameters(hf_config: Any) -> dict[str, Any]:
    """The RoPE settings of a config, whether it keeps them as rope_parameters or as rope_scaling."""
    return getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
