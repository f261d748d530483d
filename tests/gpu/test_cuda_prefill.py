"""How a GPU's prefill multiplies and attends, on the CPU: what it hands to torch and to flash-attn means what the cpu
backend's does."""

from __future__ import annotations

import pytest
import torch

from d3rt.backends.base import causal_attention, typed_linear
from d3rt.backends.cuda_prefill import CudaPrefill, flash_attention
from d3rt.kernels.packing import pack

SHAPES = [(5, 5, 0), (3, 9, 0), (6, 6, 4), (4, 11, 3), (1, 1, 0), (1, 7, 7)]  # queries, keys, window


def tensors(queries, keys, dtype):
    draw = torch.Generator().manual_seed(3)
    q = torch.randn(queries, 6, 8, generator=draw)
    return q, *(torch.randn(2, keys, 8, generator=draw).to(dtype) for _ in range(2))


def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size):
    """As flash-attn documents it: the last query at the last key; window_size (left, right) are positions beside it."""
    assert causal
    heads = q.shape[2] // k.shape[2]
    k, v = (each.repeat_interleave(heads, dim=2).float() for each in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * softmax_scale
    distance = torch.arange(q.shape[1])[:, None] + (k.shape[1] - q.shape[1]) - torch.arange(k.shape[1])
    left = window_size[0] if window_size[0] >= 0 else k.shape[1]
    scores = scores.masked_fill((distance < 0) | (distance > left), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).to(q.dtype)


@pytest.mark.parametrize(("queries", "keys", "window"), SHAPES)
@pytest.mark.parametrize("arch", [70, 80])
def test_torchs_attention_with_heads_expanded_is_the_same(arch, queries, keys, window):
    q, k, v = tensors(queries, keys, torch.float32)
    ours = CudaPrefill(arch, None).attend(q, k, v, 0.3, window)
    torch.testing.assert_close(ours, causal_attention(q, k, v, 0.3, window))


@pytest.mark.parametrize(("queries", "keys", "window"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_flash_attention_is_asked_for_the_same(dtype, queries, keys, window):
    q, k, v = tensors(queries, keys, dtype)
    ours = CudaPrefill(80, flash_attn_func).attend(q, k, v, 0.3, window)
    assert ours.dtype is torch.float32
    exact = causal_attention(q.to(dtype).float(), k.float(), v.float(), 0.3, window)
    torch.testing.assert_close(ours, exact, atol=2 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("head_dim", "times"), [(256, 1), (264, 0)])
def test_flash_attention_is_left_alone_with_heads_that_it_refuses(head_dim, times):
    calls = []
    flash = lambda q, k, v, **named: calls.append(q.shape) or flash_attn_func(q, k, v, **named)  # noqa: E731
    q, kept = torch.ones(2, 2, head_dim), torch.ones(1, 2, head_dim, dtype=torch.float16)
    assert bool((CudaPrefill(80, flash).attend(q, kept, kept, 0.1, 0) == 1).all())
    assert len(calls) == times


@pytest.mark.parametrize("arch", [70, 75])
def test_flash_attention_is_not_looked_for_below_sm_80(arch):
    assert flash_attention(arch) is None


@pytest.mark.parametrize(("arch", "dtype"), [(70, torch.float16), (80, torch.bfloat16)])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_weights_are_multiplied_as_the_floats_they_stand_for(monkeypatch, format, arch, dtype):
    monkeypatch.setattr("d3rt.backends.cuda_prefill.SLAB_VALUES", 64 * 32)  # two tiles of rows at a time
    draw = torch.Generator().manual_seed(3)
    prefill, x = CudaPrefill(arch, None), torch.randn(7, 64, generator=draw)
    for rows in (100, 40):  # the second takes the first one's memory
        w = pack(torch.randn(rows, 64, generator=draw), format)
        assert torch.equal(prefill.linear(x, w), typed_linear(x, w.dequantize(dtype)))
        assert prefill.linear_bytes(w) == 2 * rows * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plain_weights_are_multiplied_in_their_own_dtype(dtype):
    x, w = torch.randn(3, 16), torch.randn(5, 16).to(dtype)
    assert torch.equal(CudaPrefill(80, None).linear(x, w), typed_linear(x, w))
