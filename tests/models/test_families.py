"""Families read a Hugging Face model whole, refuse by name what they do not know, and leave the model as it was."""

import dataclasses

import pytest
import tiny_models
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import d3rt
from d3rt.errors import UnsupportedModelError, UnsupportedOptionError
from d3rt.models import FAMILIES, family_of
from d3rt.models.source import SharedModule

# -- what is read -------------------------------------------------------------------------------------------------


def config_of(name):
    hf_config = tiny_models.config(name)
    return family_of(hf_config).config(hf_config)


def test_every_family_is_tried():
    assert {tiny_models.config(name).model_type for name in tiny_models.NAMES} == set(FAMILIES)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_the_config_is_hugging_faces_in_its_own_field_names(name):
    hf_config, config = tiny_models.config(name), config_of(name)
    for field in dataclasses.fields(config):
        if field.name not in ("head_dim", "sliding_windows"):
            assert getattr(config, field.name) == getattr(hf_config, field.name), field.name


@pytest.mark.parametrize(
    "name, head_dim",
    [("llama", 12), ("llama-head-dim", 22), ("llama-mqa", 8), ("mistral-window", 10), ("qwen3", 14)],
)
def test_head_dim_is_the_configs_own_or_hidden_size_over_heads(name, head_dim):
    config = config_of(name)
    assert config.head_dim == head_dim
    assert config.attention_scale == head_dim**-0.5


@pytest.mark.parametrize(
    "name, windows",
    [
        ("llama", (0,) * 6),
        ("mistral", (0, 0, 0, 0)),
        ("mistral-window", (6, 6, 6, 6)),
        ("qwen2", (0, 0, 0, 0)),
        ("qwen2-window", (0, 0, 5, 5)),
        ("qwen3", (0, 0, 0, 0)),
        ("qwen3-window", (0, 7, 7, 7)),
    ],
)
def test_each_layer_has_the_window_that_hugging_face_gives_it(name, windows):
    assert config_of(name).sliding_windows == windows


def test_mistrals_default_window_is_taken_over():
    hf_config = MistralConfig(num_hidden_layers=2)
    assert family_of(hf_config).config(hf_config).sliding_windows == (hf_config.sliding_window,) * 2


def test_layer_types_may_alternate():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    hf_config = Qwen2Config(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=9, max_window_layers=0, layer_types=types
    )
    assert family_of(hf_config).config(hf_config).sliding_windows == (9, 0, 9)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_parameter_of_the_model_is_in_the_weights(name):
    model = tiny_models.make(name)
    weights = family_of(model.config).weights(SharedModule(model), torch.float32, torch.float32)
    assert sum(tensor.numel() for tensor in weights.tensors()) == sum(p.numel() for p in model.parameters())


# -- what is shared, copied and left alone ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_matrices_are_the_models_own_memory_and_norms_are_copies(dtype):
    model = tiny_models.fresh("llama-biases", dtype)
    weights = d3rt.compile(model).engine.decoder.weights
    layer, theirs = weights.layers[1], model.model.layers[1]
    shared = {
        "embed": (weights.embed, model.model.embed_tokens),
        "lm_head": (weights.lm_head, model.lm_head),
        "wq": (layer.wq, theirs.self_attn.q_proj),
        "wk": (layer.wk, theirs.self_attn.k_proj),
        "wv": (layer.wv, theirs.self_attn.v_proj),
        "wo": (layer.wo, theirs.self_attn.o_proj),
        "w_gate": (layer.w_gate, theirs.mlp.gate_proj),
        "w_up": (layer.w_up, theirs.mlp.up_proj),
        "w_down": (layer.w_down, theirs.mlp.down_proj),
    }
    for name, (ours, module) in shared.items():
        assert ours.data_ptr() == module.weight.data_ptr(), name
    for ours, parameter in (
        (layer.attention_norm, theirs.input_layernorm.weight),
        (layer.bq, theirs.self_attn.q_proj.bias),
        (weights.norm, model.model.norm.weight),
    ):
        assert ours.dtype == torch.float32
        assert ours.data_ptr() != parameter.data_ptr()
        assert torch.equal(ours, parameter.float())


def test_a_tied_head_is_one_tensor_and_an_untied_head_is_two():
    for name, tied in (("llama-tied", True), ("llama", False)):
        weights = d3rt.compile(tiny_models.fresh(name)).engine.decoder.weights
        assert (weights.lm_head is weights.embed) is tied


def test_another_dtype_makes_copies_and_leaves_the_models_dtype():
    model = tiny_models.fresh("llama")
    fast = d3rt.compile(model, dtype="bfloat16")
    assert (
        fast.dtype == fast.engine.cache.k.dtype == fast.engine.decoder.weights.embed.dtype == torch.bfloat16
    )
    assert model.dtype == torch.float32
    assert fast.memory().shared_weights == 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["same dtype", "bf16"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-biases", "mistral-window", "qwen2-window", "qwen3"])
def test_compiling_and_generating_leave_the_model_as_it_was(name, dtype, backend):
    model = tiny_models.fresh(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = tiny_models.left_padded(tiny_models.ragged((7, 2)))
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    said = model.generate(**inputs, **options)
    settings = model.config.to_dict(), model.generation_config.to_dict()
    fast = d3rt.compile(model, d3rt.D3(alpha=0.9, start=0.3), backend, dtype, batch_size=2, kv_fill="eager")
    fast.generate(**inputs, **options)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == settings
    assert not model.training and all(weight.requires_grad for weight in model.parameters())
    assert torch.equal(model.generate(**inputs, **options), said)


def test_a_change_of_the_models_matrices_is_seen_because_they_are_shared():
    model = tiny_models.fresh("llama")
    fast = d3rt.compile(model, threads=1)
    inputs = tiny_models.left_padded([tiny_models.prompt(7)])
    options = dict(max_new_tokens=12, eos_token_id=None)
    before = fast.generate(**inputs, **options)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(-2)
    after = fast.generate(**inputs, **options)
    assert not torch.equal(after, before)
    assert torch.equal(after, model.generate(**inputs, do_sample=False, **options))


def test_a_model_in_training_mode_is_compiled_as_it_would_infer():
    model = tiny_models.fresh("llama")
    inputs = tiny_models.left_padded([tiny_models.prompt(7)])
    options = dict(max_new_tokens=8, eos_token_id=None)
    said = model.generate(**inputs, do_sample=False, **options)
    model.train()
    assert torch.equal(d3rt.compile(model).generate(**inputs, **options), said)
    assert model.training


# -- RoPE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_the_rope_tables_are_hugging_faces(name):
    model = tiny_models.make(name)
    cos, sin = family_of(model.config).rope_tables(model, 160)
    theirs = model.model.rotary_emb(torch.zeros(1), torch.arange(160)[None])
    for ours, (table,) in zip((cos, sin), theirs, strict=True):
        assert torch.equal(torch.cat((ours, ours), dim=-1), table)


def test_the_rope_tables_of_a_bfloat16_model_are_not_rounded():
    exact, rounded = (
        tiny_models.fresh("llama-llama3-rope", dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    family = family_of(exact.config)
    for a, b in zip(family.rope_tables(exact, 160), family.rope_tables(rounded, 160), strict=True):
        assert torch.equal(a, b)


# -- what is refused, by name -------------------------------------------------------------------------------------

SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def test_an_unknown_model_type_is_refused_with_those_that_are_known():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    gemma = GemmaForCausalLM(GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8))
    for model, name in ((gpt2, "gpt2"), (gemma, "gemma")):
        with pytest.raises(
            UnsupportedModelError,
            match=f"model_type '{name}' is not supported; supported are llama, mistral, qwen2, qwen3",
        ):
            d3rt.compile(model)


def test_a_module_without_a_config_is_refused():
    with pytest.raises(UnsupportedModelError, match="model_type None is not supported"):
        d3rt.compile(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(hidden_act="gelu"), r"hidden_act='gelu' \(supported: 'silu'\)"),
        (
            dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            r"rope_type='dynamic' \(supported: default, linear, llama3, yarn\)",
        ),
        (
            dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            r"partial_rotary_factor=0.5 \(supported: 1.0\)",
        ),
    ],
    ids=["activation", "rope type", "partial rope"],
)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_unknown_setting_is_refused_with_its_value(name, setting, message):
    kind = tiny_models.MODELS[name][0][0]
    with pytest.raises(UnsupportedModelError, match=f"model_type '{name}': unsupported .*{message}"):
        family_of(kind(**SMALL)).config(kind(**SMALL, **setting))


def test_everything_unsupported_is_named_at_once():
    hf_config = LlamaConfig(**SMALL, hidden_act="gelu")
    hf_config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UnsupportedModelError, match="hidden_act='gelu'.*; weights quantised"):
        family_of(hf_config).config(hf_config)


def test_an_unknown_layer_type_is_refused_by_name():
    hf_config = tiny_models.config("qwen2")
    hf_config.layer_types = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(UnsupportedModelError, match=r"layer_types \['chunked_attention'\]"):
        family_of(hf_config).config(hf_config)


def test_parameters_that_nothing_reads_are_refused_by_name():
    model = tiny_models.fresh("llama")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UnsupportedModelError, match="unsupported parameters model.layers.1.self_attn.sinks"):
        d3rt.compile(model)


def test_float64_is_refused_with_the_choices():
    with pytest.raises(UnsupportedOptionError, match="float64.*choose one of float32"):
        d3rt.compile(tiny_models.fresh("llama", torch.float64))
    assert d3rt.compile(tiny_models.fresh("llama", torch.float64), dtype="fp32").dtype == torch.float32


def test_a_model_on_another_device_is_refused_with_the_way_out():
    model = tiny_models.fresh("llama").to("meta")
    with pytest.raises(UnsupportedModelError, match=r"device 'meta'.*model.cpu\(\)"):
        d3rt.compile(model)
