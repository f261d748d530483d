"""Decoder: the one decoder of every family: its weights, one decode step, and the prefill.

`decode_step` is written once over the fused ops: a backend runs them at once or records them. `prefill` is
compute-bound and belongs to the library: torch's GEMM and SDPA, writing K,V straight into our cache.
What differs between families is in the weights (a bias or a head norm that is there or not) and in the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from d3rt.backends.base import causal_attention
from d3rt.config import DecoderConfig
from d3rt.kernels import kv_line, reference
from d3rt.kernels.packing import PackedMatrix
from d3rt.kernels.reference import FillLayer, rms_norm, rotate
from d3rt.kv_cache import KVCache
from d3rt.plan import Action, LayerSet, Plan
from d3rt.quantize import Matrix, tensors_of


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Matrices are [out, in], plain or packed; norms and biases are float32; None is absent."""

    attention_norm: Tensor  # [D]
    wq: Matrix  # [H d, D]
    wk: Matrix  # [G d, D]
    wv: Matrix
    bq: Tensor | None
    bk: Tensor | None
    bv: Tensor | None
    q_norm: Tensor | None  # [d]
    k_norm: Tensor | None
    wo: Matrix  # [D, H d]
    bo: Tensor | None
    mlp_norm: Tensor  # [D]
    w_gate: Matrix  # [F, D]
    w_up: Matrix
    b_gate: Tensor | None
    b_up: Tensor | None
    w_down: Matrix  # [D, F]
    b_down: Tensor | None

    def parts(self, *names: str) -> list[Matrix]:
        """The named weights that exist; all of them when none is named."""
        values = (getattr(self, name) for name in names or self.__dataclass_fields__)
        return [value for value in values if value is not None]

    def matrices(self) -> list[Matrix]:
        return self.parts("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")

    @property
    def kv_bytes(self) -> int:
        """Bytes that a kv_fill of this layer reads."""
        return nbytes(self.parts("attention_norm", "wk", "wv", "bk", "bv", "k_norm"))

    @property
    def attention_bytes(self) -> int:
        return self.kv_bytes + nbytes(self.parts("wq", "bq", "q_norm", "wo", "bo"))

    @property
    def mlp_bytes(self) -> int:
        return nbytes(self.parts("mlp_norm", "w_gate", "w_up", "b_gate", "b_up", "w_down", "b_down"))


@dataclass(frozen=True)
class DecoderWeights:
    """The whole model. lm_head may be the very tensor that embed is (tied)."""

    embed: Matrix  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [D]
    lm_head: Matrix  # [V, D]

    def tensors(self) -> list[Tensor]:
        """Every distinct tensor, those inside packed matrices one by one."""
        layers = [part for layer in self.layers for part in layer.parts()]
        distinct = {id(part): part for part in (self.embed, self.norm, self.lm_head, *layers)}.values()
        return [tensor for part in distinct for tensor in tensors_of(part)]


def nbytes(parts: Sequence[Matrix]) -> int:
    """Bytes of tensors and packed matrices together."""
    return sum(part.nbytes for part in parts)


class StepBuffers:
    """The static buffers of a decode step of `rows` slots, where the cache is: every recorded step reads and writes
    these and no others."""

    def __init__(self, config: DecoderConfig, cache: KVCache, cos: Tensor, sin: Tensor, rows: int):
        c = config
        self.rows = rows
        self.token = torch.zeros(rows, dtype=torch.int32, device=cache.k.device)
        self.pos = torch.zeros_like(self.token)
        zeros = partial(torch.zeros, rows, device=cache.k.device)
        self.x = zeros(c.hidden_size)
        self.q = zeros(c.num_attention_heads, c.head_dim)
        self.attended = zeros(c.num_attention_heads, c.head_dim)
        self.attended_flat = self.attended.view(rows, -1)
        self.h = zeros(c.intermediate_size)
        self.logits = zeros(c.vocab_size)
        self.k = [cache.k[layer, :rows] for layer in range(c.num_hidden_layers)]
        self.v = [cache.v[layer, :rows] for layer in range(c.num_hidden_layers)]
        self.filled = cache.filled[:, :rows]
        self.cos, self.sin = cos, sin

    def tensors(self) -> list[Tensor]:
        """Every buffer, for a backend that wants to know its static memory."""
        own = [self.token, self.pos, self.x, self.q, self.attended, self.attended_flat, self.h, self.logits]
        return [*own, self.filled, self.cos, self.sin, *self.k, *self.v]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that are this object's own: not the cache, not the RoPE tables."""
        return nbytes([self.token, self.pos, self.x, self.q, self.attended, self.h, self.logits])


class Decoder:
    """A Llama-like decoder over the fused ops of d3rt.kernels.reference."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        linear=reference.linear,
        attention=causal_attention,
    ):
        """linear(x [T, K], w [N, K]) -> [T, N] float32, and attention: how the prefill does them (backends/base.py)."""
        self.config = config
        self.weights = weights
        self._product = linear
        self._attention = attention

    def decode_step(self, ops, plan: Plan, buf: StepBuffers) -> None:
        """One decode step: the token in buf.token at buf.pos through the sublayers that `plan` runs, to buf.logits.

        `ops` has the ops of d3rt.kernels.reference: that module itself, or a tape that records them.
        """
        ops.embed(buf.x, buf.token, self.weights.embed)
        self.run_plan(ops, plan, buf)
        self.project_logits(ops, buf)

    def run_plan(self, ops, plan: Plan, buf: StepBuffers) -> None:
        """What `plan` says of each sublayer, from buf.x to buf.x."""
        c, w = self.config, self.weights
        skipped: list[FillLayer] = []  # attention sublayers to fill from x as it stands
        for layer, attention, mlp in plan:
            lw, k, v = w.layers[layer], buf.k[layer], buf.v[layer]
            if attention is Action.FILL:
                skipped.append(FillLayer(k, v, lw.attention_norm, lw.wk, lw.wv, lw.bk, lw.bv, lw.k_norm))
            if skipped and Action.RUN in (attention, mlp):  # x is about to change
                ops.kv_fill(skipped, buf.x, buf.cos, buf.sin, buf.pos, c.rms_norm_eps)
                skipped = []
            if attention is Action.RUN:
                ops.norm_qkv_rope(
                    *(buf.q, k, v, buf.x, lw.attention_norm, lw.wq, lw.wk, lw.wv, lw.bq, lw.bk, lw.bv),
                    *(lw.q_norm, lw.k_norm, buf.cos, buf.sin, buf.pos, c.rms_norm_eps),
                )
                ops.attention(buf.attended, buf.q, k, v, buf.pos, c.attention_scale, c.sliding_windows[layer])
                ops.proj_add(buf.x, buf.attended_flat, lw.wo, lw.bo)
            if mlp is Action.RUN:
                ops.norm_gate_up(
                    buf.h, buf.x, lw.mlp_norm, lw.w_gate, lw.w_up, lw.b_gate, lw.b_up, c.rms_norm_eps
                )
                ops.proj_add(buf.x, buf.h, lw.w_down, lw.b_down)
        if skipped:
            ops.kv_fill(skipped, buf.x, buf.cos, buf.sin, buf.pos, c.rms_norm_eps)

    def project_logits(self, ops, buf: StepBuffers) -> None:
        """The last op of a step, and the only one after a prefill: buf.x to buf.logits."""
        ops.norm_logits(buf.logits, buf.x, self.weights.norm, self.weights.lm_head, self.config.rms_norm_eps)

    def step_bytes(self, plan: Plan) -> int:
        """Weight bytes that one decode step of this plan reads, lm_head included; one embedding row is left out."""
        total = nbytes([self.weights.lm_head, self.weights.norm])
        for layer, attention, mlp in plan:
            lw = self.weights.layers[layer]
            total += lw.attention_bytes if attention is Action.RUN else 0
            total += lw.kv_bytes if attention is Action.FILL else 0
            total += lw.mlp_bytes if mlp is Action.RUN else 0
        return total

    def prefill(
        self, prompts: Sequence[Tensor], layers: LayerSet, cache: KVCache, buf: StepBuffers, chunk_tokens: int
    ) -> None:
        """Runs prompts[row] (int64 [T_row], where the cache is) through `layers` into slot `row` of the cache, from
        position 0.

        Leaves the last token's hidden state of each row in buf.x, its position in buf.pos, and the filled lengths in
        the cache. Tokens of all rows are packed end to end (no padding is computed) and cut into chunks of at most
        chunk_tokens, which bounds the memory taken.
        """
        pieces: list[tuple[int, int, int]] = []  # row, first position, one past the last
        budget = chunk_tokens
        with torch.inference_mode():
            for row, prompt in enumerate(prompts):
                start = 0
                while start < len(prompt):
                    stop = min(len(prompt), start + budget)
                    pieces.append((row, start, stop))
                    budget -= stop - start
                    start = stop
                    if budget == 0:
                        self._prefill_chunk(prompts, pieces, layers, cache, buf)
                        pieces, budget = [], chunk_tokens
            if pieces:
                self._prefill_chunk(prompts, pieces, layers, cache, buf)
            for row, prompt in enumerate(prompts):
                buf.pos[row].fill_(len(prompt) - 1)  # an assignment would copy it from host memory
                cache.set_prompt(row, len(prompt), layers.attention_layers)

    def _prefill_chunk(self, prompts, pieces, layers: LayerSet, cache: KVCache, buf: StepBuffers) -> None:
        c, w = self.config, self.weights
        tokens = torch.cat([prompts[row][start:stop] for row, start, stop in pieces])
        positions = torch.cat([torch.arange(start, stop, device=tokens.device) for _, start, stop in pieces])
        cos, sin = buf.cos[positions, None], buf.sin[positions, None]  # [T, 1, d/2]
        embedded = w.embed.take(tokens) if isinstance(w.embed, PackedMatrix) else w.embed[tokens]
        x = embedded.float()  # [T, D]
        for layer, lw in enumerate(w.layers):
            if layers.attention >> layer & 1:
                n = rms_norm(x, lw.attention_norm, c.rms_norm_eps)
                q = self._linear(n, lw.wq, lw.bq).view(len(x), c.num_attention_heads, c.head_dim)
                k = self._linear(n, lw.wk, lw.bk).view(len(x), c.num_key_value_heads, c.head_dim)
                v = self._linear(n, lw.wv, lw.bv).view(len(x), c.num_key_value_heads, c.head_dim)
                if lw.q_norm is not None:
                    q = rms_norm(q, lw.q_norm, c.rms_norm_eps)
                if lw.k_norm is not None:
                    k = rms_norm(k, lw.k_norm, c.rms_norm_eps)
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
                attended = torch.empty_like(q)
                at = 0
                for row, start, stop in pieces:
                    part = slice(at, at + stop - start)
                    for kept, made in ((cache.k, k), (cache.v, v)):
                        kept[layer, row, :, start:stop] = kv_line.kept_as(
                            made[part].transpose(0, 1), kept.dtype
                        )
                    attended[part] = self._attend(q[part], cache, layer, row, start, stop)
                    at += stop - start
                x = x + self._linear(attended.flatten(1), lw.wo, lw.bo)
            if layers.mlp >> layer & 1:
                n = rms_norm(x, lw.mlp_norm, c.rms_norm_eps)
                gate = F.silu(self._linear(n, lw.w_gate, lw.b_gate)).mul_(self._linear(n, lw.w_up, lw.b_up))
                x = x + self._linear(gate, lw.w_down, lw.b_down)
        at = 0
        for row, start, stop in pieces:
            at += stop - start
            if stop == len(prompts[row]):
                buf.x[row] = x[at - 1]

    def _linear(self, x: Tensor, w: Matrix, bias: Tensor | None) -> Tensor:
        """x [T, K] float32 through w [N, K]; bias and result in float32, as the residual stream is."""
        out = self._product(x, w)
        return out if bias is None else out + bias

    def _attend(self, q: Tensor, cache: KVCache, layer: int, row: int, start: int, stop: int) -> Tensor:
        """Causal attention of queries [T, H, d] at positions start .. stop - 1 over the row's cache; float32 out.

        Of an int8 cache it takes what the lines stand for, as the decode steps do, the chunk's own included: so the
        answer does not depend on how a prompt was cut.
        """
        window = self.config.sliding_windows[layer]
        first = max(0, start + 1 - window) if window else 0
        lines = (kept[layer, row, :, first:stop] for kept in (cache.k, cache.v))
        keys, values = (kv_line.decode(line) if line.dtype == torch.int8 else line for line in lines)
        return self._attention(q, keys, values, self.config.attention_scale, window)
