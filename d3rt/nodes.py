"""The nodes of a decode step, from a model's config alone: the decoder's own step, run on tensors without memory.

`Outline` builds the decoder on the meta device, with every weight in the width that `compile` would keep it in, and
runs `decode_step` with a Meter in the place of a backend: so the nodes are those that a backend would record, and a
change of the step changes them too. What they cost is roofline.py's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from d3rt.kernels.packing import FORMATS, GROUP, TILE_ROWS, PackedMatrix, pack
from d3rt.kernels.reference import FillLayer
from d3rt.kv_cache import KVCache
from d3rt.models import family_of
from d3rt.models.decoder import Decoder, StepBuffers, nbytes
from d3rt.models.source import parameters, skeleton
from d3rt.plan import Plan
from d3rt.quantize import Matrix, Width, Widths, packed_parts
from d3rt.roofline import Node

# int32 and int64 that `sample` and `advance` touch beside the logits: token, pos, finished, step, a row of the ring
_TOKEN_STATE_BYTES = 32


class Meter:
    """The ops of d3rt.kernels.reference; each call becomes a Node in `nodes`. Tensors may be on the meta device."""

    def __init__(self):
        self.nodes: list[Node] = []

    def _add(self, op: str, weights: Sequence[Matrix | None], activations: int, **more: int) -> None:
        present = [weight for weight in weights if weight is not None]
        self.nodes.append(Node(op, nbytes(present), activations, **more))

    def embed(self, x: Tensor, token: Tensor, table: Matrix) -> None:
        self._add("embed", [], x.nbytes + len(x) * _row_bytes(table))

    def norm_qkv_rope(
        self, q, k_cache, v_cache, x, norm, wq, wk, wv, bq, bk, bv, q_norm, k_norm, cos, sin, pos, eps
    ) -> None:
        rows = len(x)
        rope = rows * 2 * cos.shape[-1] * cos.element_size()
        self._add(
            "norm_qkv_rope",
            [norm, wq, wk, wv, bq, bk, bv, q_norm, k_norm],
            x.nbytes + q.nbytes + rope + rows * _line_bytes(k_cache, v_cache),
            multiply_adds=_multiply_adds(rows, wq, wk, wv),
        )

    def attention(self, out, q, k_cache, v_cache, pos, scale, window) -> None:
        # 2 d multiply-adds a position and head are never what binds: 1 a byte of K,V, times H / G.
        self._add(
            "attention",
            [],
            out.nbytes + q.nbytes,
            line_bytes=_line_bytes(k_cache, v_cache),
            window=window,
        )

    def proj_add(self, x, a, w, bias) -> None:
        self._add("proj_add", [w, bias], a.nbytes + 2 * x.nbytes, multiply_adds=_multiply_adds(len(x), w))

    def norm_gate_up(self, h, x, norm, w_gate, w_up, b_gate, b_up, eps) -> None:
        self._add(
            "norm_gate_up",
            [norm, w_gate, w_up, b_gate, b_up],
            x.nbytes + h.nbytes,
            multiply_adds=_multiply_adds(len(x), w_gate, w_up),
        )

    def kv_fill(self, layers: Sequence[FillLayer], x, cos, sin, pos, eps) -> None:
        rows = len(x)
        rope = rows * 2 * cos.shape[-1] * cos.element_size()
        lines = sum(_line_bytes(layer.k_cache, layer.v_cache) for layer in layers)
        weights = [weight for layer in layers for weight in layer[2:]]
        products = [weight for layer in layers for weight in (layer.wk, layer.wv)]
        self._add(
            "kv_fill",
            weights,
            x.nbytes + rope + rows * lines,
            multiply_adds=_multiply_adds(rows, *products),
        )

    def keep_hidden(self, hidden, x, pos) -> None:
        self._add("keep_hidden", [], x.nbytes + len(x) * hidden.shape[-1] * hidden.element_size())

    def norm_logits(self, logits, x, norm, w, eps) -> None:
        self._add("norm_logits", [norm, w], x.nbytes + logits.nbytes, multiply_adds=_multiply_adds(len(x), w))

    def choose(self, logits: Tensor) -> None:
        """The two nodes that end a step on a GPU: `sample` reads the logits, `advance` next to nothing."""
        self._add("sample", [], logits.nbytes + _TOKEN_STATE_BYTES * len(logits))
        self._add("advance", [], _TOKEN_STATE_BYTES * len(logits))


def _row_bytes(matrix: Matrix) -> int:
    """Bytes of one row; of a packed matrix on average."""
    if isinstance(matrix, PackedMatrix):
        return matrix.nbytes // matrix.rows
    return matrix.shape[1] * matrix.element_size()


def _line_bytes(*caches: Tensor) -> int:
    """Bytes of one position in caches [B, G, S, line]."""
    return sum(cache.shape[1] * cache.shape[3] * cache.element_size() for cache in caches)


def _multiply_adds(rows: int, *weights: Matrix) -> int:
    """float32 multiply-adds on a GPU: one a weight and row, and one a packed weight for its scale (kernels/cuda:
    matvec.py)."""
    return sum(w.shape[0] * w.shape[1] * (rows + isinstance(w, PackedMatrix)) for w in weights)


@cache
def packed_tile(format: str) -> PackedMatrix:
    """The smallest matrix that packing makes of a dense one: whether it has minima, and its bytes a weight."""
    return pack(torch.zeros(TILE_ROWS, GROUP), format)


class OutlineSource:
    """A Source of parameters that have shape and width, and no memory."""

    def __init__(self, hf_config: Any):
        self.model = skeleton(hf_config)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters(self.model).items()}

    def take(self, name: str, width: Width) -> Matrix:
        shape = self._shapes[name]
        if width not in FORMATS:
            return torch.empty(shape, dtype=width, device="meta")
        parts = {
            part: torch.empty(size, dtype=dtype, device="meta")
            for part, (size, dtype) in packed_parts(width, *shape).items()
            if part != "minima" or packed_tile(width).minima is not None
        }
        return PackedMatrix(width, *shape, **parts)


class Outline:
    """A model as `compile` would keep it, without its weights.

    hf_config: Hugging Face's; widths: of compile's arguments, complete. UnsupportedModelError as `compile` raises it.
    """

    def __init__(self, hf_config: Any, widths: Widths):
        family = family_of(hf_config)
        self.config = family.config(hf_config)
        self.widths = widths
        weights = family.weights(OutlineSource(hf_config), widths.weights, widths.lm_head, "meta")
        self.decoder = Decoder(self.config, weights)
        self.weight_bytes = nbytes(weights.tensors())
        self._known: dict[tuple[Plan, int], Counter[Node]] = {}

    @property
    def line_bytes(self) -> int:
        """K and V of one position in one layer of one slot."""
        with torch.device("meta"):
            cache = KVCache(self.config, 1, 1, self.widths.kv_cache_dtype)
        return _line_bytes(cache.k[0], cache.v[0])

    def nodes(self, plan: Plan, rows: int = 1) -> Counter[Node]:
        """How many there are of each node in one step of `plan` for `rows` slots."""
        if (plan, rows) not in self._known:
            self._known[plan, rows] = Counter(self.recorded(plan, rows))
        return self._known[plan, rows]

    def recorded(self, plan: Plan, rows: int = 1) -> tuple[Node, ...]:
        """The nodes themselves, in their order."""
        with torch.device("meta"):
            cache = KVCache(self.config, rows, 1, self.widths.kv_cache_dtype)
            tables = torch.empty(1, self.config.head_dim // 2), torch.empty(1, self.config.head_dim // 2)
            buffers = StepBuffers(self.config, cache, *tables, rows)
            buffers.keep(plan.num_gaps)
        meter = Meter()
        self.decoder.decode_step(meter, plan, buffers)
        meter.choose(buffers.logits)
        return tuple(meter.nodes)
