"""Every op of a decode step in plain PyTorch: its definition.

Boring on purpose. The native kernels (csrc/cpu) and the Triton kernels are held against these functions, the
`reference` backend runs them, and nobody writes them twice. An op writes into its out buffers and returns nothing;
token and pos are read from buffers. Arithmetic is float32 whatever the weights and the cache are kept in.

Shape letters: B slots, S max_seq_len, D hidden_size, H num_attention_heads, G num_key_value_heads, d head_dim,
F intermediate_size, V vocab_size. `lines` [B] int32 says which line of a cache of more than B lines is whose; without
it, slot b has line b. A weight W is float32, bfloat16, float16 or packed; the cache is a float dtype, or
int8 with lines of d + 4 (kv_line.py); biases, norms, cos, sin and activations are float32; token and pos are int32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from d3rt.kernels import kv_line
from d3rt.kernels.packing import GROUP, PackedMatrix, quantise_activations


class FillLayer(NamedTuple):
    """What kv_fill needs of one skipped layer: its cache lines and the weights that make K and V."""

    k_cache: Tensor  # [B, G, S, d] out, at pos
    v_cache: Tensor
    norm: Tensor  # [D]
    wk: Tensor  # [G d, D] W
    wv: Tensor
    bk: Tensor | None  # [G d]
    bv: Tensor | None
    k_norm: Tensor | None  # [d]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467); float32 in and out."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) in Hugging Face's half-split layout: pair (j, j + d/2) of x [..., d] turns by the angle
    whose cos and sin [..., d/2] are given."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def linear(x: Tensor, w: Tensor | PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """x [.., K] float32 times w [N, K]^T, plus bias [N]; the product in float32. A packed w meets int8 activations:
    group by group of 32 columns, the integer products are summed exactly, then scaled. (Not so in kernels/cuda: there
    float32 activations meet w.dequantize().)"""
    if isinstance(w, PackedMatrix):
        codes, scales = quantise_activations(x)
        x, dense = codes.unflatten(-1, (-1, GROUP)) * scales[..., None], w.dequantize()
        return torch.nn.functional.linear(x.flatten(-2), dense, bias)
    return torch.nn.functional.linear(x, w.float(), bias)


def embed(x: Tensor, token: Tensor, table: Tensor) -> None:
    """x [B, D] = table [V, D] at token [B]."""
    rows = token.long()
    x.copy_(table.take(rows) if isinstance(table, PackedMatrix) else table[rows])


def norm_qkv_rope(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    x: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    bq: Tensor | None,
    bk: Tensor | None,
    bv: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pos: Tensor,
    eps: float,
    lines: Tensor | None = None,
) -> None:
    """q [B, H, d] = RoPE(norm(RMSNorm(x) wq^T + bq)); K likewise and V, written at pos [B] of k_cache, v_cache
    [B, G, S, d]. x [B, D], norm [D], wq [H d, D], wk and wv [G d, D], q_norm and k_norm [d], cos and sin [S, d/2]."""
    batch, heads, head_dim = q.shape
    n = rms_norm(x, norm, eps)
    queries = linear(n, wq, bq).view(batch, heads, head_dim)
    if q_norm is not None:
        queries = rms_norm(queries, q_norm, eps)
    at = pos.long()
    q.copy_(rotate(queries, cos[at, None], sin[at, None]))
    write_kv(k_cache, v_cache, n, wk, wv, bk, bv, k_norm, cos, sin, at, eps, lines)


def write_kv(k_cache, v_cache, n, wk, wv, bk, bv, k_norm, cos, sin, at, eps, lines=None) -> None:
    """K,V of the normed hidden state n [B, D], written at positions at [B] (int64)."""
    batch, kv_heads = len(n), k_cache.shape[1]
    keys, values = (linear(n, w, bias).view(batch, kv_heads, -1) for w, bias in ((wk, bk), (wv, bv)))
    if k_norm is not None:
        keys = rms_norm(keys, k_norm, eps)
    slots = _lines_of(batch, lines)
    k_cache[slots, :, at] = kv_line.kept_as(rotate(keys, cos[at, None], sin[at, None]), k_cache.dtype)
    v_cache[slots, :, at] = kv_line.kept_as(values, v_cache.dtype)


def _lines_of(batch: int, lines: Tensor | None) -> Tensor:
    return torch.arange(batch) if lines is None else lines.long()


def attention(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pos: Tensor,
    scale: float,
    window: int,
    lines: Tensor | None = None,
) -> None:
    """out [B, H, d] = softmax(scale q K^T) V over positions max(0, pos + 1 - window) .. pos of each slot; window 0 is
    no window. Query head h reads key-value head h // (H / G).

    Kernels that multiply 16-bit numbers as they are (tensor cores; AVX-512 BF16) may round q and the softmax's weights
    to the cache's dtype, as FlashAttention does."""
    group = q.shape[1] // k_cache.shape[1]
    for slot, (line, last) in enumerate(zip(_lines_of(len(q), lines).tolist(), pos.tolist(), strict=True)):
        first = max(0, last + 1 - window) if window else 0
        keys = kv_line.read(k_cache[line, :, first : last + 1]).repeat_interleave(group, dim=0)  # [H, T, d]
        values = kv_line.read(v_cache[line, :, first : last + 1]).repeat_interleave(group, dim=0)
        weights = torch.softmax(torch.einsum("hd,htd->ht", q[slot], keys) * scale, dim=-1)
        out[slot] = torch.einsum("ht,htd->hd", weights, values)


def proj_add(x: Tensor, a: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """x [B, N] += a [B, K] w^T + bias [N]: o_proj or down_proj with its residual. w [N, K]."""
    x.add_(linear(a, w, bias))


def norm_gate_up(
    h: Tensor,
    x: Tensor,
    norm: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    eps: float,
) -> None:
    """h [B, F] = silu(n w_gate^T + b_gate) * (n w_up^T + b_up), n = RMSNorm(x [B, D]); w_gate, w_up [F, D]."""
    n = rms_norm(x, norm, eps)
    h.copy_(torch.nn.functional.silu(linear(n, w_gate, b_gate)) * linear(n, w_up, b_up))


def kv_fill(
    layers: Sequence[FillLayer],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pos: Tensor,
    eps: float,
    lines: Tensor | None = None,
) -> None:
    """K,V of every skipped layer in `layers`, all from the last computed hidden state x [B, D]: each layer's own norm,
    K,V projection and RoPE, scattered at pos [B]."""
    for layer in layers:
        n = rms_norm(x, layer.norm, eps)
        write_kv(layer.k_cache, layer.v_cache, n, *layer[3:], cos, sin, pos.long(), eps, lines)


def keep_hidden(hidden: Tensor, x: Tensor, pos: Tensor, lines: Tensor | None = None) -> None:
    """hidden [B, S, D], of a float dtype, takes x [B, D] at pos [B]: what a later kv_fill of these positions starts
    from."""
    hidden[_lines_of(len(x), lines), pos.long()] = x.to(hidden.dtype)


def norm_logits(logits: Tensor, x: Tensor, norm: Tensor, w: Tensor, eps: float) -> None:
    """logits [B, V] = RMSNorm(x [B, D]) w^T; w [V, D]."""
    logits.copy_(linear(rms_norm(x, norm, eps), w))


def copy_hidden(out: Tensor, x: Tensor) -> None:
    """out [B, D] = x [B, D]: a hidden state as it is before it changes."""
    out.copy_(x)


def hidden_cosine(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [B] = the cosine of the angle between a and b [B, D], in [-1, 1]: the "state" confidence of early exit
    (CALM, arXiv 2207.07061), a and b being the hidden state before and after a layer. 0 where one of them is 0."""
    norms = (a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt()).clamp(min=1e-30)
    out.copy_(((a * b).sum(-1) / norms).clamp(-1, 1))


def top2_margin(out: Tensor, logits: Tensor) -> None:
    """out [B] = largest less second largest probability of softmax(logits [B, V]), in [0, 1]: the "softmax" confidence
    of early exit (CALM, arXiv 2207.07061). NaN where there is no distribution; 1 where V is 1."""
    top = torch.softmax(logits, dim=-1).topk(min(2, logits.shape[-1]), dim=-1).values
    out.copy_(top[:, 0] - top[:, 1:].sum(-1))


def confident(confidence: Tensor, finished: Tensor, threshold: float) -> bool:
    """Whether a step may end: each slot's confidence [B], but those of slots that have finished, is at least the
    threshold. Always at a threshold of 0 or less; never by a NaN."""
    return threshold <= 0 or bool((finished | (confidence.double() >= threshold)).all())


def philox_uniform(seed: int, step: int, slot: int) -> float:
    """Philox4x32-10 (Salmon et al. 2011), key = seed, counter = (step, slot, 0, 0), as a double in [0, 1)."""
    counter, key = [step, slot, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            b >> 32 ^ counter[1] ^ key[0],
            b & 0xFFFFFFFF,
            a >> 32 ^ counter[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return ((counter[0] << 32 | counter[1]) >> 11) * 2.0**-53


def penalise(logits: Tensor, seen: Iterable[int], repetition_penalty: float) -> Tensor:
    """logits [V] with those of the tokens in `seen` divided by the penalty when positive, multiplied when negative
    (CTRL, arXiv 1909.05858, as Hugging Face applies it)."""
    tokens = torch.tensor(sorted(seen), dtype=torch.long)
    if repetition_penalty == 1.0 or not len(tokens):
        return logits
    scores = logits.clone()
    old = logits[tokens]
    scores[tokens] = torch.where(old < 0, old * repetition_penalty, old / repetition_penalty)
    return scores


def warp(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Scores [V] to draw from: logits / temperature, with -inf where top_k, then top_p, then min_p cuts, as Hugging
    Face's warpers do. top_k keeps ties with the k-th; top_p keeps the shortest prefix of the tokens sorted by
    probability that reaches top_p, of equal tokens the larger first (HF's sort leaves that open); min_p keeps
    p >= min_p * max p."""
    scores = logits / temperature
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    if top_p < 1.0:
        order = scores.sort(stable=True).indices.flip(0)
        reached = torch.exp(scores[order].double() - scores.max().double()).cumsum(0)
        kept = 1 + int((reached / reached[-1] < top_p).sum())
        scores = scores.index_fill(0, order[kept:], -torch.inf)
    if min_p > 0.0:
        scores = scores.masked_fill(scores.double() - scores.max().double() < math.log(min_p), -torch.inf)
    return scores


def sample(scores: Tensor, seed: int, step: int, slot: int) -> int:
    """One token drawn from softmax(scores [V]) by inverse CDF in token order; tokens at -inf are never drawn. The
    random number depends on (seed, step, slot) alone."""
    weights = torch.exp(scores.double() - scores.max().double())
    cumulative = weights.cumsum(0)
    target = philox_uniform(seed, step, slot) * cumulative[-1]
    token = int(torch.searchsorted(cumulative, target, right=True))
    return min(token, int(weights.nonzero()[-1]))  # a rounding error must not fall off the end


def advance(token: Tensor, pos: Tensor, next_token: Tensor, finished: Tensor) -> None:
    """Puts next_token [B] into token [B] and moves pos [B] on by one, except in slots that had finished before."""
    pos.add_((~finished).to(pos.dtype))
    token.copy_(next_token)
