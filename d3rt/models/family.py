"""Family: from a Hugging Face model to DecoderConfig and DecoderWeights, with nothing dropped silently.

Llama, Mistral, Qwen2 and Qwen3 share their module tree, so the walk over it is here; a family's own file says what it
adds and refuses. Every parameter of the model must be taken up by the walk: one that is left over is a feature we do
not know, and the model is refused with its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d3rt.config import DecoderConfig
from d3rt.errors import UnsupportedModelError
from d3rt.kernels.packing import PackedMatrix
from d3rt.models.decoder import DecoderWeights, LayerWeights
from d3rt.quantize import Matrix, Width, convert

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

    def weights(
        self,
        model: nn.Module,
        width: Width,
        head_width: Width,
        packed: Mapping[str, PackedMatrix] | None = None,
    ) -> DecoderWeights:
        """The model's weights in `width`, the embedding and the lm_head in `head_width`: its own tensors where they
        are that already and contiguous, else copies, made one by one.

        packed: matrices by name that come packed already (from a GGUF file) and are taken as they are where the
        width is theirs. Norms and biases are copied to float32 (some kB): every kernel reads them so.
        """
        taken: set[str] = set()

        def matrix(name: str, width: Width = width) -> Matrix:
            taken.add(name)
            ready = (packed or {}).get(name)
            return (
                ready
                if ready is not None and ready.format == width
                else convert(name, parameters[name], width)
            )

        def vector(name: str) -> Tensor | None:
            if name not in parameters:
                return None
            taken.add(name)
            return parameters[name].detach().to(torch.float32, copy=True).contiguous()

        parameters = dict(model.named_parameters(remove_duplicate=False))
        layers = []
        for index in range(model.config.num_hidden_layers):
            at = f"model.layers.{index}."
            attention, mlp = at + "self_attn.", at + "mlp."
            layers.append(
                LayerWeights(
                    attention_norm=vector(at + "input_layernorm.weight"),
                    wq=matrix(attention + "q_proj.weight"),
                    wk=matrix(attention + "k_proj.weight"),
                    wv=matrix(attention + "v_proj.weight"),
                    bq=vector(attention + "q_proj.bias"),
                    bk=vector(attention + "k_proj.bias"),
                    bv=vector(attention + "v_proj.bias"),
                    q_norm=vector(attention + "q_norm.weight"),
                    k_norm=vector(attention + "k_norm.weight"),
                    wo=matrix(attention + "o_proj.weight"),
                    bo=vector(attention + "o_proj.bias"),
                    mlp_norm=vector(at + "post_attention_layernorm.weight"),
                    w_gate=matrix(mlp + "gate_proj.weight"),
                    w_up=matrix(mlp + "up_proj.weight"),
                    b_gate=vector(mlp + "gate_proj.bias"),
                    b_up=vector(mlp + "up_proj.bias"),
                    w_down=matrix(mlp + "down_proj.weight"),
                    b_down=vector(mlp + "down_proj.bias"),
                )
            )
        embed = matrix("model.embed_tokens.weight", head_width)
        tied = parameters["lm_head.weight"] is parameters["model.embed_tokens.weight"]
        head = embed if tied else matrix("lm_head.weight", head_width)
        taken.add("lm_head.weight")
        norm = vector("model.norm.weight")
        left = sorted(set(parameters) - taken)
        if left:
            raise UnsupportedModelError(
                f"model_type {self.model_type!r}: unsupported parameters {', '.join(left[:4])}"
                + (f" and {len(left) - 4} more" if len(left) > 4 else "")
            )
        return DecoderWeights(embed=embed, layers=tuple(layers), norm=norm, lm_head=head)

    def rope_tables(self, model: nn.Module, max_seq_len: int) -> tuple[Tensor, Tensor]:
        """cos, sin [S, d/2] float32, from the model's own rotary module made afresh: a model cast to bfloat16 would
        hand out rounded frequencies."""
        rotary = type(model.model.rotary_emb)(model.config)
        angles = torch.arange(max_seq_len)[:, None].float() * rotary.inv_freq.float()
        return (
            (angles.cos() * rotary.attention_scaling).contiguous(),
            (angles.sin() * rotary.attention_scaling).contiguous(),
        )


def rope_parameters(hf_config: Any) -> dict[str, Any]:
    """The RoPE settings of a config, whether it keeps them as rope_parameters or as rope_scaling."""
    return getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
