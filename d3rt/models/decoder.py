"""Decoder: the one decoder of every family: its weights, one decode step, and the prefill.

`decode_step` is written once over the fused ops: a backend runs them at once or records them. `prefill` is, for long
prompts, compute-bound and belongs to the library: torch's GEMM and SDPA, writing K,V straight into our cache.
prefill.py says which prompts are read otherwise.
What differs between families is in the weights (a bias or a head norm that is there or not) and in the config.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

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
from d3rt.row_plans import LayerRows, Settle, by_layer

Piece = tuple[int, int, int]  # of a prompt: its row, its first position, one past its last
# run(prompts, pieces, layers, cache, lines, buf): the last hidden states [T, D] of the tokens of these pieces, end to
# end, whose K,V it has written into the cache. The arguments are Decoder.prefill's.
RunChunk = Callable[
    [Sequence[Tensor], Sequence[Piece], LayerSet, KVCache, Sequence[int], "StepBuffers"], Tensor
]


def _chunks(prompts: Sequence[Tensor], starts: Sequence[int], chunk_tokens: int) -> Iterator[list[Piece]]:
    """Cuts the prompts, from their starts on and packed end to end, into chunks of at most so many tokens."""
    pieces, budget = [], chunk_tokens
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        while start < len(prompt):
            stop = min(len(prompt), start + budget)
            pieces.append((row, start, stop))
            budget -= stop - start
            start = stop
            if budget == 0:
                yield pieces
                pieces, budget = [], chunk_tokens
    if pieces:
        yield pieces


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

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes that a kv_fill of this layer reads."""
        return nbytes(self.parts("attention_norm", "wk", "wv", "bk", "bv", "k_norm"))

    @cached_property
    def attention_bytes(self) -> int:
        return self.kv_bytes + nbytes(self.parts("wq", "bq", "q_norm", "wo", "bo"))

    @cached_property
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
    these and no others.

    line_table: row b has not line b of the cache but line lines[b], which may change from step to step.
    """

    def __init__(
        self,
        config: DecoderConfig,
        cache: KVCache,
        cos: Tensor,
        sin: Tensor,
        rows: int,
        line_table: bool = False,
        with_logits: bool = True,
    ):
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
        self.logits = zeros(c.vocab_size if with_logits else 0)
        self.lines = torch.zeros_like(self.token) if line_table else None
        self._all = slice(0, rows)
        of_cache = slice(None) if line_table else self._all
        self.k = [cache.k[layer, of_cache] for layer in range(c.num_hidden_layers)]
        self.v = [cache.v[layer, of_cache] for layer in range(c.num_hidden_layers)]
        self.filled = cache.filled[:, self._all]
        self.cos, self.sin = cos, sin
        self._cache = cache
        self.hidden: list[Tensor] = []

    def keep(self, gaps: int) -> list[Tensor]:
        """Makes room for the hidden states of that many gaps; returns the tensors that are new."""
        new = [self._cache.gap(gap) for gap in range(len(self.hidden), gaps)]
        new = new if self.lines is not None else [hidden[self._all] for hidden in new]
        self.hidden += new
        return new

    def part(self, rows: slice) -> StepBuffers:
        """The same buffers of a range of rows."""
        if rows == self._all:
            return self
        part = copy.copy(self)
        part.rows = rows.stop - rows.start
        for name in ("token", "pos", "x", "q", "attended", "attended_flat", "h", "logits"):
            setattr(part, name, getattr(self, name)[rows])
        if self.lines is not None:
            part.lines = self.lines[rows]
            return part
        part.k, part.v, part.hidden = (
            [each[rows] for each in kept] for kept in (self.k, self.v, self.hidden)
        )
        return part

    @property
    def place(self) -> dict[str, Tensor]:
        """Whatever an op that touches the cache is told beside `pos`."""
        return {} if self.lines is None else {"lines": self.lines}

    def tensors(self) -> list[Tensor]:
        """Every buffer, for a backend that wants to know its static memory."""
        own = [self.token, self.pos, self.x, self.q, self.attended, self.attended_flat, self.h]
        logits = [self.logits] if self.logits.numel() else []
        table = [] if self.lines is None else [self.lines]
        return [*own, *logits, *table, self.filled, self.cos, self.sin, *self.k, *self.v]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that are this object's own: not the cache, not the RoPE tables."""
        table = [] if self.lines is None else [self.lines]
        return nbytes([self.token, self.pos, self.x, self.q, self.attended, self.h, self.logits, *table])


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

    def decode_step(self, ops, plan: Plan | Sequence[Plan], buf: StepBuffers) -> None:
        """One decode step: the tokens in buf.token at buf.pos, through the sublayers that `plan` runs, one for all
        rows or one for each, to buf.logits.

        `ops` has the ops of d3rt.kernels.reference: that module itself, or a tape that records them.
        """
        self.embed(ops, buf)
        self.run_plan(ops, plan, buf)
        self.project_logits(ops, buf)

    def run_plan(self, ops, plan: Plan | Sequence[Plan], buf: StepBuffers) -> None:
        """What `plan` says of each sublayer, from buf.x to buf.x."""
        for layer, todo in enumerate(by_layer((plan,) * buf.rows if isinstance(plan, Plan) else plan)):
            self.run_layer(ops, layer, todo, buf)

    def embed(self, ops, buf: StepBuffers) -> None:
        """The first op of a step: buf.token to buf.x."""
        ops.embed(buf.x, buf.token, self.weights.embed)

    def run_layer(self, ops, layer: int, todo: LayerRows, buf: StepBuffers) -> None:
        """What a step does at one layer; at layer L, what it does after the last."""
        c, w = self.config, self.weights
        for each in todo.settle:
            self._settle(ops, buf, each)
        for rows in todo.attention:
            lw, at = w.layers[layer], buf.part(rows)
            k, v = at.k[layer], at.v[layer]
            ops.norm_qkv_rope(
                *(at.q, k, v, at.x, lw.attention_norm, lw.wq, lw.wk, lw.wv, lw.bq, lw.bk, lw.bv),
                *(lw.q_norm, lw.k_norm, at.cos, at.sin, at.pos, c.rms_norm_eps),
                **at.place,
            )
            window = c.sliding_windows[layer]
            ops.attention(at.attended, at.q, k, v, at.pos, c.attention_scale, window, **at.place)
            ops.proj_add(at.x, at.attended_flat, lw.wo, lw.bo)
        for rows in todo.mlp:
            lw, at = w.layers[layer], buf.part(rows)
            ops.norm_gate_up(at.h, at.x, lw.mlp_norm, lw.w_gate, lw.w_up, lw.b_gate, lw.b_up, c.rms_norm_eps)
            ops.proj_add(at.x, at.h, lw.w_down, lw.b_down)

    def _settle(self, ops, buf: StepBuffers, what: Settle) -> None:
        """Fills K,V from the hidden state of some rows, and keeps it, before it changes."""
        at = buf.part(what.rows)
        if what.fill:
            layers = [self.fill_layer(layer, at.k[layer], at.v[layer]) for layer in what.fill]
            ops.kv_fill(layers, at.x, at.cos, at.sin, at.pos, self.config.rms_norm_eps, **at.place)
        if what.gap is not None:
            ops.keep_hidden(at.hidden[what.gap], at.x, at.pos, **at.place)

    def fill_layer(self, layer: int, k: Tensor, v: Tensor) -> FillLayer:
        """What a kv_fill of this layer into the caches k and v needs."""
        lw = self.weights.layers[layer]
        return FillLayer(k, v, lw.attention_norm, lw.wk, lw.wv, lw.bk, lw.bv, lw.k_norm)

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
        self,
        prompts: Sequence[Tensor],
        layers: LayerSet,
        cache: KVCache,
        buf: StepBuffers,
        chunk_tokens: int,
        starts: Sequence[int] | None = None,
        lines: Sequence[int] | None = None,
        run_chunk: RunChunk | None = None,
    ) -> None:
        """Runs prompts[row] (int64 [T_row], where the cache is) through `layers` into line lines[row] of the cache,
        from position starts[row] (0) on; line `row` where none is given. run_chunk: by what; by matrix products
        (run_chunk of this class) where none is given.

        What is before must be there in every one of the layers, else HoleError. Leaves the last token's hidden state of
        each row in buf.x, its position in buf.pos, and the filled lengths in the cache. Tokens of all rows are packed
        end to end (no padding is computed) and cut into chunks of at most chunk_tokens, which bounds the memory taken.
        """
        starts = [0] * len(prompts) if starts is None else starts
        lines = range(len(prompts)) if lines is None else lines
        run_chunk = run_chunk or self.run_chunk
        for line, start in zip(lines, starts, strict=True):
            cache.extend(
                line, start, start, layers.attention_layers
            )  # nothing is left of what is written over
        with torch.inference_mode():
            for pieces in _chunks(prompts, starts, chunk_tokens):
                x, at = run_chunk(prompts, pieces, layers, cache, lines, buf), 0
                for row, start, stop in pieces:
                    at += stop - start
                    if stop == len(prompts[row]):
                        buf.x[row] = x[at - 1]
            for row, prompt in enumerate(prompts):
                buf.pos[row].fill_(len(prompt) - 1)  # an assignment would copy it from host memory
                cache.extend(lines[row], starts[row], len(prompt), layers.attention_layers)

    def run_chunk(self, prompts, pieces: Sequence[Piece], layers, cache, lines, buf) -> Tensor:
        """A RunChunk of matrix products, those of torch and of the backend."""
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
                if lw.q_norm is not None:
                    q = rms_norm(q, lw.q_norm, c.rms_norm_eps)
                q = rotate(q, cos, sin)
                k, v = self._keys_values(n, lw, cos, sin)
                attended = torch.empty_like(q)
                at = 0
                for row, start, stop in pieces:
                    part = slice(at, at + stop - start)
                    cache.write(layer, lines[row], start, stop, k[part], v[part])
                    attended[part] = self._attend(q[part], cache, layer, lines[row], start, stop)
                    at += stop - start
                x = x + self._linear(attended.flatten(1), lw.wo, lw.bo)
            if layers.mlp >> layer & 1:
                n = rms_norm(x, lw.mlp_norm, c.rms_norm_eps)
                gate = F.silu(self._linear(n, lw.w_gate, lw.b_gate)).mul_(self._linear(n, lw.w_up, lw.b_up))
                x = x + self._linear(gate, lw.w_down, lw.b_down)
        return x

    def _keys_values(self, n: Tensor, lw: LayerWeights, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [T, G, d] of normed hidden states n [T, D], K rotated by cos and sin [T, 1, d/2]."""
        c = self.config
        k = self._linear(n, lw.wk, lw.bk).view(len(n), c.num_key_value_heads, c.head_dim)
        v = self._linear(n, lw.wv, lw.bv).view(len(n), c.num_key_value_heads, c.head_dim)
        if lw.k_norm is not None:
            k = rms_norm(k, lw.k_norm, c.rms_norm_eps)
        return rotate(k, cos, sin), v

    def fill(
        self, layer: int, hidden: Tensor, cache: KVCache, line: int, start: int, buf: StepBuffers
    ) -> None:
        """K,V of one layer from the hidden states [T, D] that were kept before it, written at positions start ..
        start + T - 1 of a line: kv_fill for many tokens, as one matrix product."""
        lw, stop = self.weights.layers[layer], start + len(hidden)
        with torch.inference_mode():
            n = rms_norm(hidden.float(), lw.attention_norm, self.config.rms_norm_eps)
            k, v = self._keys_values(n, lw, buf.cos[start:stop, None], buf.sin[start:stop, None])
            cache.write(layer, line, start, stop, k, v)

    def _linear(self, x: Tensor, w: Matrix, bias: Tensor | None) -> Tensor:
        """x [T, K] float32 through w [N, K]; bias and result in float32, as the residual stream is."""
        out = self._product(x, w)
        return out if bias is None else out + bias

    def _attend(self, q: Tensor, cache: KVCache, layer: int, line: int, start: int, stop: int) -> Tensor:
        """Causal attention of queries [T, H, d] at positions start .. stop - 1 over a line of the cache; float32 out.

        Of an int8 cache it takes what the lines stand for, as the decode steps do, the chunk's own included: so the
        answer does not depend on how a prompt was cut.
        """
        window = self.config.sliding_windows[layer]
        first = max(0, start + 1 - window) if window else 0
        lines = (kept[layer, line, :, first:stop] for kept in (cache.k, cache.v))
        keys, values = (kv_line.decode(line) if line.dtype == torch.int8 else line for line in lines)
        return self._attention(q, keys, values, self.config.attention_scale, window)
