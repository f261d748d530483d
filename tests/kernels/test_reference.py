"""kernels/reference.py, the definition that everything is held against, is what transformers computes."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from d3rt.kernels import cases, reference

# The same float32 operations, in another order at places: a few eps of the largest value.
EPS = 8 * torch.finfo(torch.float32).eps

LLAMA = LlamaConfig(
    hidden_size=60,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=77,
    attention_bias=True,
    mlp_bias=True,
    _attn_implementation="sdpa",
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=EPS * float(expected.abs().max()))


def randomised(module):
    """The module with its biases and norms, which start at 0 and 1, made to matter."""
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return module.eval()


@torch.no_grad()
def test_rms_norm_is_llamas():
    norm = LlamaRMSNorm(67, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    for scale in (1.0, 1e-4, 1e4):
        x = scale * torch.randn(3, 67)
        close(reference.rms_norm(x, norm.weight, 1e-5), norm(x))


def test_rotate_is_llamas_rope():
    position = torch.tensor([[0, 1, 77, 1000]])
    cos, sin = LlamaRotaryEmbedding(LLAMA)(torch.zeros(1), position)  # [1, T, d], both halves alike
    q, k = torch.randn(1, 6, 4, 10), torch.randn(1, 2, 4, 10)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    half = slice(None, 5)
    close(reference.rotate(q, cos[..., half], sin[..., half]), expected_q)
    close(reference.rotate(k, cos[..., half], sin[..., half]), expected_k)


@torch.no_grad()
def test_norm_gate_up_and_proj_add_are_llamas_mlp():
    mlp, norm = randomised(LlamaMLP(LLAMA)), LlamaRMSNorm(60, eps=1e-5)
    x = torch.randn(5, 60)
    expected = x + mlp(norm(x))
    h = torch.empty(5, 77)
    reference.norm_gate_up(
        h,
        x,
        norm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.gate_proj.bias,
        mlp.up_proj.bias,
        1e-5,
    )
    reference.proj_add(x, h, mlp.down_proj.weight, mlp.down_proj.bias)
    close(x, expected)


@pytest.mark.parametrize("window", [0, 1, 7, 100])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (9, 1)])
def test_attention_is_torchs_sdpa(heads, kv_heads, window):
    pos = [0, 20, 33]
    q = torch.randn(3, heads, 10)
    k, v = torch.randn(3, kv_heads, 34, 10), torch.randn(3, kv_heads, 34, 10)
    at = torch.arange(34)
    last = torch.tensor(pos)[:, None]
    mask = (at <= last) & ((at > last - window) if window else torch.ones(1, dtype=torch.bool))
    expected = scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=mask[:, None, None], scale=0.3, enable_gqa=True
    )[:, :, 0]
    out = torch.empty(3, heads, 10)
    reference.attention(out, q, k, v, torch.tensor(pos, dtype=torch.int32), 0.3, window)
    close(out, expected)


def rotary(config, positions):
    return LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(positions)[None])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_decode_step_of_attention_is_transformers_attention_at_that_position(family):
    """norm_qkv_rope, attention and o_proj, position after position, give what the module gives in one pass."""
    length = 9
    if family == "llama":
        config, module = LLAMA, randomised(LlamaAttention(LLAMA, layer_idx=0))
    else:
        config = Qwen3Config(
            hidden_size=60,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=10,
            _attn_implementation="sdpa",
        )
        module = randomised(Qwen3Attention(config, layer_idx=0))
    cos, sin = rotary(config, length)
    norm = randomised(LlamaRMSNorm(60, eps=1e-6))
    x = torch.randn(1, length, 60)
    expected = x + module(norm(x), position_embeddings=(cos, sin), attention_mask=None)[0]

    k_cache, v_cache = torch.full((2, 1, 2, length, 10), torch.nan)
    head_norms = [
        getattr(module, name).weight if family == "qwen3" else None for name in ("q_norm", "k_norm")
    ]
    projections = [module.q_proj, module.k_proj, module.v_proj]
    q, out = torch.empty(1, 6, 10), torch.empty(1, 6, 10)
    for position in range(length):
        pos = torch.tensor([position], dtype=torch.int32)
        row = x[:, position].clone()
        reference.norm_qkv_rope(
            q,
            k_cache,
            v_cache,
            row,
            norm.weight,
            *(projection.weight for projection in projections),
            *(projection.bias for projection in projections),
            *head_norms,
            cos[0, :, :5],
            sin[0, :, :5],
            pos,
            1e-6,
        )
        reference.attention(out, q, k_cache, v_cache, pos, module.scaling, 0)
        reference.proj_add(row, out.view(1, 60), module.o_proj.weight, module.o_proj.bias)
        close(row, expected[:, position])


def test_embed_and_norm_logits_are_embedding_and_linear():
    table, head = torch.nn.Embedding(11, 60), torch.nn.Linear(60, 11, bias=False)
    norm = randomised(LlamaRMSNorm(60, eps=1e-5))
    token = torch.tensor([3, 10, 0], dtype=torch.int32)
    x, logits = torch.empty(3, 60), torch.empty(3, 11)
    with torch.no_grad():
        reference.embed(x, token, table.weight)
        assert torch.equal(x, table(token))
        reference.norm_logits(logits, x, norm.weight, head.weight, 1e-5)
        close(logits, head(norm(x)))


def test_weights_in_bfloat16_are_widened_and_nothing_else_is_rounded():
    case = cases.Case("proj_add", "direct", torch.bfloat16, B=2, D=9, K=33)
    arguments = cases.make(case)
    expected = arguments["x"] + arguments["a"] @ arguments["w"].float().T
    cases.call(reference, case, arguments)
    close(arguments["x"], expected)


def test_advance_moves_the_slots_that_had_not_finished():
    token = torch.tensor([1, 2, 3], dtype=torch.int32)
    pos = torch.tensor([10, 20, 30], dtype=torch.int32)
    reference.advance(token, pos, torch.tensor([4, 5, 6]), torch.tensor([False, True, False]))
    assert token.tolist() == [4, 5, 6] and pos.tolist() == [11, 20, 31]
