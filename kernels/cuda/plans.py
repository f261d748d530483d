"""Which launches make an op: for each op of kernels/reference.py a function of the same name and arguments, and the
architecture, that returns a list of Launch.

Of the tensors only shapes, strides, dtypes and alignment are looked at, so tensors on the `meta` device do for
compiling. Nothing is launched or allocated here: eager.py does that one by one, a graph for a whole step. An op that
these kernels cannot do is refused by name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d3rt.kernels.cuda import attention as attention_kernels
from d3rt.kernels.cuda import norm_qkv_rope as qkv_kernels
from d3rt.kernels.cuda import project as project_kernels
from d3rt.kernels.cuda import tiles
from d3rt.kernels.cuda import tokens as token_kernels
from d3rt.kernels.cuda.launch import ALIGNMENT, COUNTERS, PARTIALS, Launch, launch_of
from d3rt.kernels.packing import PackedMatrix
from d3rt.kernels.reference import FillLayer
from d3rt.sampling import SamplingParams

MAX_BATCH = 16

_ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_WIDTHS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _check_batch(op: str, batch: int) -> None:
    if not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"{op}: a batch of {batch} rows; these kernels take 1 to {MAX_BATCH}.")


def _check(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Kernels know sizes, not strides: what is not contiguous, or of another shape, would be read wrongly."""
    if tensor is not None and (tuple(tensor.shape) != shape or not tensor.is_contiguous()):
        raise ValueError(
            f"{op}: {name} is {tuple(tensor.shape)}, strides {tensor.stride()}; "
            f"it must be contiguous {shape}."
        )


@dataclass(frozen=True)
class _Weight:
    """A matrix as a kernel sees it."""

    width: str  # "float16", .., "int8", "int4"
    format: str  # "plain", "int8", "int4"
    pitch: int  # elements from row to row; 0 when packed
    data: Tensor
    scales: Tensor | None = None
    minima: Tensor | None = None

    @property
    def kind(self) -> tuple:
        """What decides how the kernel reads it."""
        return self.format, self.pitch, self.data.dtype, self.minima is None

    def parameters(self, name: str) -> dict[str, Tensor | None]:
        return {name: self.data, f"{name}_scales": self.scales, f"{name}_minima": self.minima}


def _weight(op: str, name: str, w: Tensor | PackedMatrix, rows: int, inputs: int) -> _Weight:
    if tuple(w.shape) != (rows, inputs):
        raise ValueError(f"{op}: {name} is {tuple(w.shape)}; it must be {(rows, inputs)}.")
    if isinstance(w, PackedMatrix):
        words = w.data.view(torch.int32)  # [tiles, groups, words, 16, 1]
        return _Weight(w.format, w.format, 0, words, w.scales, w.minima)
    if w.dtype not in _WIDTHS:
        raise ValueError(
            f"{op}: {name} is {w.dtype}; choose one of {', '.join(_WIDTHS.values())}, int8, int4."
        )
    if inputs > 1 and w.stride(1) != 1:
        raise ValueError(f"{op}: {name} has strides {w.stride()}; its rows must be contiguous.")
    return _Weight(_WIDTHS[w.dtype], "plain", w.stride(0), w)


def _tiling(arch: int, op: str, batch: int, inputs: int, weights: Sequence[_Weight]):
    """(tile, columns of a step) that suit all these matrices."""
    tile = tiles.matvec_tile(arch, op, batch, any(w.format != "plain" for w in weights))
    return tile, min(tiles.columns(tile, w.width, inputs) for w in weights)


def _most_splits(weights: Sequence[_Weight], inputs: int, batch: int) -> int:
    """Splits write and read 8 bytes a row and slot more: at most 1/25 of the row's own bytes."""
    bits = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8.5, "int4": 4.5}
    row = min(inputs * bits[w.width] / 8 for w in weights)
    return max(1, int(row / 25 / (8 * batch)))


def _split(arch, tile, blocks, steps, weights, inputs, batch, sums, rows) -> dict[str, Any]:
    """SPLIT and its working memory. `sums` [rows] vectors are left by each program."""
    split = tiles.splits(arch, tile, blocks, steps, _most_splits(weights, inputs, batch))
    values = {"SPLIT": split, "partials": None, "counters": None}
    if split == 1:
        return {"values": values, "partials": 0, "counters": 0}
    return {
        "values": values | {"partials": PARTIALS, "counters": COUNTERS},
        "partials": blocks * split * sums * (1 + rows),
        "counters": blocks,
    }


def _working(split: dict[str, Any]) -> dict[str, int]:
    return {"partials": split["partials"], "counters": split["counters"]}


def embed(arch: int, x: Tensor, token: Tensor, table: Tensor | PackedMatrix) -> list[Launch]:
    batch, size = x.shape
    _check_batch("embed", batch)
    _check("embed", "x", x, (batch, size))
    w = _weight("embed", "table", table, table.shape[0], size)
    block = min(512, triton.next_power_of_2(size))
    values = {
        **{"x": x, "token": token, "table": w.data, "scales": w.scales, "minima": w.minima},
        **{"FORMAT": w.format, "LDW": w.pitch, "D": size, "BLOCK": block},
    }
    return [launch_of("embed", token_kernels.embed, (triton.cdiv(size, block), batch), values, 4)]


def keep_hidden(arch: int, hidden: Tensor, x: Tensor, pos: Tensor) -> list[Launch]:
    batch, size = x.shape
    _check_batch("keep_hidden", batch)
    _check("keep_hidden", "x", x, (batch, size))
    _check("keep_hidden", "pos", pos, (batch,))
    if hidden.dim() != 3 or hidden.shape[::2] != (batch, size) or hidden.stride()[1:] != (size, 1):
        raise ValueError(
            f"keep_hidden: hidden is {tuple(hidden.shape)}, strides {hidden.stride()}; it must be [{batch}, S, "
            f"{size}], the lines of a slot contiguous."
        )
    block = min(512, triton.next_power_of_2(size))
    values = {
        **{"hidden": hidden, "x": x, "pos": pos},
        **{"SLOT_STRIDE": hidden.stride(0), "D": size, "BLOCK": block},
    }
    return [launch_of("keep_hidden", token_kernels.keep_hidden, (triton.cdiv(size, block), batch), values, 4)]


def _project(arch, op, out, x, norm, w, bias, eps, add) -> list[Launch]:
    batch, inputs = x.shape
    rows = out.shape[1]
    _check_batch(op, batch)
    for name, tensor, shape in (
        ("out", out, (batch, rows)),
        ("input", x, (batch, inputs)),
        ("norm", norm, (inputs,)),
        ("bias", bias, (rows,)),
    ):
        _check(op, name, tensor, shape)
    weight = _weight(op, "w", w, rows, inputs)
    tile, step = _tiling(arch, op, batch, inputs, [weight])
    block = min(tile.rows, max(16, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, block)
    split = _split(arch, tile, blocks, triton.cdiv(inputs, step), [weight], inputs, batch, batch, block)
    values = {
        **{"out": out, "x": x, "norm": norm, **weight.parameters("w"), "bias": bias},
        **{"FORMAT": weight.format, "LDW": weight.pitch, "EPS": eps, "ADD": add},
        **{"N": rows, "K": inputs, "B": batch, "BN": block, "BK": step, **split["values"]},
    }
    grid = (blocks, split["values"]["SPLIT"])
    return [
        launch_of(
            op,
            project_kernels.project,
            grid,
            values,
            tile.warps,
            **_working(split),
        )
    ]


def proj_add(arch: int, x: Tensor, a: Tensor, w: Tensor | PackedMatrix, bias: Tensor | None) -> list[Launch]:
    return _project(arch, "proj_add", x, a, None, w, bias, 0.0, True)


def norm_logits(
    arch: int, logits: Tensor, x: Tensor, norm: Tensor, w: Tensor | PackedMatrix, eps: float
) -> list[Launch]:
    return _project(arch, "norm_logits", logits, x, norm, w, None, eps, False)


def norm_gate_up(
    arch: int,
    h: Tensor,
    x: Tensor,
    norm: Tensor,
    w_gate: Tensor | PackedMatrix,
    w_up: Tensor | PackedMatrix,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    eps: float,
) -> list[Launch]:
    op = "norm_gate_up"
    batch, inputs = x.shape
    rows = h.shape[1]
    _check_batch(op, batch)
    for name, tensor, shape in (
        ("h", h, (batch, rows)),
        ("x", x, (batch, inputs)),
        ("norm", norm, (inputs,)),
        ("b_gate", b_gate, (rows,)),
        ("b_up", b_up, (rows,)),
    ):
        _check(op, name, tensor, shape)
    gate = _weight(op, "w_gate", w_gate, rows, inputs)
    up = _weight(op, "w_up", w_up, rows, inputs)
    tile, step = _tiling(arch, op, batch, inputs, [gate, up])
    block = min(tile.rows, max(16, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, block)
    split = _split(arch, tile, blocks, triton.cdiv(inputs, step), [gate, up], inputs, batch, 2 * batch, block)
    values = {
        **{"h": h, "x": x, "norm": norm, **gate.parameters("w_gate"), **up.parameters("w_up")},
        **{"b_gate": b_gate, "b_up": b_up, "GATE_FORMAT": gate.format, "UP_FORMAT": up.format},
        **{"LD_GATE": gate.pitch, "LD_UP": up.pitch, "EPS": eps},
        **{"F": rows, "K": inputs, "B": batch, "BN": block, "BK": step, **split["values"]},
    }
    grid = (blocks, split["values"]["SPLIT"])
    return [
        launch_of(
            op,
            project_kernels.norm_gate_up,
            grid,
            values,
            tile.warps,
            **_working(split),
        )
    ]


def _cache_strides(op: str, batch: int, heads: int, head_dim: int, *caches: Tensor) -> dict[str, int]:
    """Of caches [B, G, S, d], which may be some slots out of a larger one."""
    first = caches[0]
    for cache in caches:
        shape = (batch, heads, cache.shape[2], head_dim)
        lines = cache.stride(3) == 1 and (cache.shape[2] == 1 or cache.stride(2) == head_dim)
        if tuple(cache.shape) != shape or not lines or cache.stride() != first.stride():
            raise ValueError(
                f"{op}: a cache is {tuple(cache.shape)}, strides {cache.stride()}; all must be {shape} with "
                f"positions {head_dim} apart, and alike."
            )
        if cache.dtype not in _ELEMENTS:
            raise ValueError(f"{op}: a cache of {cache.dtype}; choose float32, float16 or bfloat16.")
    return {"SLOT_STRIDE": first.stride(0), "HEAD_STRIDE": first.stride(1)}


def _head_tiling(arch, op, batch, inputs, weights, head_dim: int, head_norm: bool):
    """(tile, columns of a step, chunks of a head): as _tiling, for programs that make a head or a part of one, see
    norm_qkv_rope.py."""
    if head_dim % 2:
        raise ValueError(f"{op}: head_dim {head_dim}: RoPE turns pairs, so it must be even.")
    tile, _ = _tiling(arch, op, batch, inputs, weights)
    whole = 2 * triton.next_power_of_2(head_dim // 2)
    rows = whole if head_norm else min(whole, tile.rows)
    if rows > tile.rows:  # a thread must hold no more sums for it
        warps = min(8, tile.warps * rows // tile.rows)
        words = max(8, tile.words * tile.rows * warps // (rows * tile.warps))
        tile = replace(tile, warps=warps, words=words)
    tile = replace(tile, rows=rows)
    step = min(tiles.columns(tile, w.width, inputs) for w in weights)
    return tile, step, triton.cdiv(head_dim // 2, rows // 2)


def norm_qkv_rope(
    arch: int,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    x: Tensor,
    norm: Tensor,
    wq: Tensor | PackedMatrix,
    wk: Tensor | PackedMatrix,
    wv: Tensor | PackedMatrix,
    bq: Tensor | None,
    bk: Tensor | None,
    bv: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pos: Tensor,
    eps: float,
) -> list[Launch]:
    op = "norm_qkv_rope"
    batch, heads, head_dim = q.shape
    kv_heads, inputs = k_cache.shape[1], x.shape[1]
    _check_batch(op, batch)
    for name, tensor, shape in (
        ("q", q, (batch, heads, head_dim)),
        ("x", x, (batch, inputs)),
        ("norm", norm, (inputs,)),
        ("bq", bq, (heads * head_dim,)),
        ("bk", bk, (kv_heads * head_dim,)),
        ("bv", bv, (kv_heads * head_dim,)),
        ("q_norm", q_norm, (head_dim,)),
        ("k_norm", k_norm, (head_dim,)),
        ("cos", cos, (cos.shape[0], head_dim // 2)),
        ("sin", sin, (cos.shape[0], head_dim // 2)),
        ("pos", pos, (batch,)),
    ):
        _check(op, name, tensor, shape)
    weights = [
        _weight(op, "wq", wq, heads * head_dim, inputs),
        _weight(op, "wk", wk, kv_heads * head_dim, inputs),
        _weight(op, "wv", wv, kv_heads * head_dim, inputs),
    ]
    head_norm = q_norm is not None or k_norm is not None
    tile, step, chunks = _head_tiling(arch, op, batch, inputs, weights, head_dim, head_norm)
    units = heads + 2 * kv_heads
    steps = triton.cdiv(inputs, step)
    split = _split(arch, tile, units * chunks, steps, weights, inputs, batch, batch, tile.rows)
    values = {
        **{"q": q, "k_cache": k_cache, "v_cache": v_cache, "x": x, "norm": norm},
        **weights[0].parameters("wq"),
        **weights[1].parameters("wk"),
        **weights[2].parameters("wv"),
        **{"bq": bq, "bk": bk, "bv": bv, "q_norm": q_norm, "k_norm": k_norm},
        **{"cos": cos, "sin": sin, "pos": pos, "EPS": eps},
        **{f"{role}_FORMAT": w.format for role, w in zip("QKV", weights, strict=True)},
        **{f"LD_{role}": w.pitch for role, w in zip("QKV", weights, strict=True)},
        **{"ALIKE": all(w.kind == weights[0].kind for w in weights)},
        **{
            "H": heads,
            "G": kv_heads,
            "HEAD_DIM": head_dim,
            "K": inputs,
            "B": batch,
            "BN": tile.rows,
            "BK": step,
        },
        **_cache_strides(op, batch, kv_heads, head_dim, k_cache, v_cache),
        **split["values"],
    }
    return [
        launch_of(
            op,
            qkv_kernels.norm_qkv_rope,
            (units, chunks, split["values"]["SPLIT"]),
            values,
            tile.warps,
            **_working(split),
        )
    ]


def _alike(layer: FillLayer) -> tuple:
    """What layers of one kv_fill launch must have in common."""

    def kind(w):
        return (w.format, w.minima is None) if isinstance(w, PackedMatrix) else (w.dtype, w.stride())

    return (
        *(kind(layer.wk), kind(layer.wv), layer.k_cache.dtype, layer.k_cache.stride()),
        *(layer.bk is None, layer.k_norm is None),
    )


def kv_fill(
    arch: int,
    layers: Sequence[FillLayer],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pos: Tensor,
    eps: float,
) -> list[Launch]:
    """One launch for all layers whose weights are of one format: mixed formats, as some GGUF files have, take more."""
    kinds: dict[tuple, list[FillLayer]] = {}
    for layer in layers:
        kinds.setdefault(_alike(layer), []).append(layer)
    return [_fill(arch, alike, x, cos, sin, pos, eps) for alike in kinds.values()]


def _fill(arch: int, layers: list[FillLayer], x: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, eps: float):
    op, first = "kv_fill", layers[0]
    batch, inputs = x.shape
    _, kv_heads, _, head_dim = first.k_cache.shape
    _check_batch(op, batch)
    _check(op, "x", x, (batch, inputs))
    for table in (cos, sin):
        _check(op, "cos and sin", table, (cos.shape[0], head_dim // 2))
    _check(op, "pos", pos, (batch,))
    lines = []
    for layer in layers:
        for name, tensor, size in (
            *(("norm", layer.norm, inputs), ("bk", layer.bk, kv_heads * head_dim)),
            *(("bv", layer.bv, kv_heads * head_dim), ("k_norm", layer.k_norm, head_dim)),
        ):
            _check(op, name, tensor, (size,))
        if (layer.bk is None) != (layer.bv is None):
            raise ValueError(f"{op}: bk and bv must both be there, or neither.")
        wk = _weight(op, "wk", layer.wk, kv_heads * head_dim, inputs)
        wv = _weight(op, "wv", layer.wv, kv_heads * head_dim, inputs)
        lines.append(
            {
                **{"k_cache": layer.k_cache, "v_cache": layer.v_cache, "norm": layer.norm},
                **wk.parameters("wk"),
                **wv.parameters("wv"),
                **{"bk": layer.bk, "bv": layer.bv, "k_norm": layer.k_norm},
            }
        )
    on_meta = x.device.type == "meta"
    addresses = [
        [0 if line[name] is None or on_meta else line[name].data_ptr() for name in qkv_kernels.FILL_COLUMNS]
        for line in lines
    ]
    streams = [i for i, name in enumerate(qkv_kernels.FILL_COLUMNS) if name[0] == "w" or name == "norm"]
    shared = math.gcd(ALIGNMENT, *(line[i] for line in addresses for i in streams))
    head_norm = first.k_norm is not None
    tile, step, chunks = _head_tiling(arch, op, batch, inputs, [wk, wv], head_dim, head_norm)
    units = 2 * kv_heads * len(layers)
    steps = triton.cdiv(inputs, step)
    split = _split(arch, tile, units * chunks, steps, [wk, wv], inputs, batch, batch, tile.rows)
    values = {
        **{"table": torch.tensor(addresses, dtype=torch.int64), "x": x, "cos": cos, "sin": sin, "pos": pos},
        **{"CACHE": _ELEMENTS[first.k_cache.dtype]},
        **{"W_K": _ELEMENTS.get(wk.data.dtype, tl.int32), "W_V": _ELEMENTS.get(wv.data.dtype, tl.int32)},
        **{"K_FORMAT": wk.format, "V_FORMAT": wv.format},
        **{"K_MINIMA": wk.minima is not None, "V_MINIMA": wv.minima is not None},
        **{"BIAS": first.bk is not None, "HEAD_NORM": first.k_norm is not None},
        **{"LD_K": wk.pitch, "LD_V": wv.pitch, "ALIKE": wk.kind == wv.kind, "ALIGN": shared},
        **{"EPS": eps},
        **{"G": kv_heads, "HEAD_DIM": head_dim, "K": inputs, "B": batch, "BN": tile.rows, "BK": step},
        **_cache_strides(op, batch, kv_heads, head_dim, first.k_cache, first.v_cache),
        **split["values"],
    }
    return launch_of(
        op,
        qkv_kernels.kv_fill,
        (units, chunks, split["values"]["SPLIT"]),
        values,
        tile.warps,
        uploads=("table",),
        **_working(split),
    )


def attention(
    arch: int,
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pos: Tensor,
    scale: float,
    window: int,
) -> list[Launch]:
    op = "attention"
    batch, heads, head_dim = q.shape
    _, kv_heads, length, _ = k_cache.shape
    _check_batch(op, batch)
    _check(op, "q", q, (batch, heads, head_dim))
    _check(op, "out", out, (batch, heads, head_dim))
    _check(op, "pos", pos, (batch,))
    if heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads cannot share {kv_heads} key-value heads.")
    tile, dot = tiles.attention_tile(arch, heads // kv_heads, head_dim, k_cache.dtype.itemsize == 2)
    least = tiles.SMALLEST_PRODUCT if dot else 1
    group, width = (max(least, tiles.power_of_2(n)) for n in (heads // kv_heads, head_dim))
    fewest = tiles.fewest_positions(heads // kv_heads, head_dim, k_cache.dtype.itemsize)
    longest = min(window, length) if window else length
    most = max(1, tiles.MULTIPROCESSORS[arch] * tile.blocks // (kv_heads * batch))
    split = min(triton.cdiv(longest, tile.positions), max(1, longest // fewest), most, 64)
    values = {
        **{"out": out, "q": q, "k_cache": k_cache, "v_cache": v_cache, "pos": pos},
        **{"partials": PARTIALS if split > 1 else None, "counters": COUNTERS if split > 1 else None},
        **{"SCALE": scale, "WINDOW": window, "H": heads, "G": kv_heads, "HEAD_DIM": head_dim},
        **{"GROUP_BLOCK": group, "D_BLOCK": width, "BT": tile.positions, "SPLIT": split},
        **{"FEWEST": fewest, "DOT": dot},
        **_cache_strides(op, batch, kv_heads, head_dim, k_cache, v_cache),
    }
    return [
        launch_of(
            op,
            attention_kernels.attention,
            (kv_heads, split, batch),
            values,
            tile.warps,
            stages=tile.stages,
            partials=batch * kv_heads * split * group * (width + 2) if split > 1 else 0,
            counters=batch * kv_heads if split > 1 else 0,
        )
    ]


def sampling_settings(params: SamplingParams) -> Tensor:
    """int64 [6] for `sample`, see tokens.py's SETTINGS. Floats are kept as their bits; top_p as 64 binary digits, 0 for
    off."""

    def bits(value: float) -> int:
        return struct.unpack("<i", struct.pack("<f", value))[0]

    def signed(value: int) -> int:
        return value - (1 << 64) if value >= 1 << 63 else value

    top_p = int(params.top_p * 2**64) if params.top_p < 1.0 else 0
    least = math.log(params.min_p) if params.min_p > 0 else -math.inf
    fields = {
        "seed": signed(params.seed % (1 << 64)),
        "top_k": params.top_k,
        "top_p": signed(max(top_p, 1 if params.top_p < 1.0 else 0)),
        "min_p": bits(least),
        "temperature": bits(params.temperature),
        "repetition_penalty": bits(params.repetition_penalty),
    }
    return torch.tensor([fields[name] for name in token_kernels.SETTINGS], dtype=torch.int64)


def sample(
    arch: int,
    next_token: Tensor,
    logits: Tensor,
    settings: Tensor,
    step: Tensor,
    seen: Tensor | None,
    draw: bool,
) -> list[Launch]:
    """next_token int32 [B] from logits [B, V]: penalise, warp and sample of the reference, by `settings` (see
    sampling_settings), step int32 [1], and seen int8 [B, V], without which there is no repetition penalty."""
    batch, vocab = logits.shape
    _check_batch("sample", batch)
    _check("sample", "logits", logits, (batch, vocab))
    _check("sample", "seen", seen, (batch, vocab))
    _check("sample", "settings", settings, (len(token_kernels.SETTINGS),))
    values = {
        **{"next_token": next_token, "logits": logits, "settings": settings, "step": step, "seen": seen},
        **{"DRAW": draw, "V": vocab, "BLOCK": min(4096, triton.next_power_of_2(vocab))},
    }
    return [launch_of("sample", token_kernels.sample, (batch,), values, 16)]


def advance(
    arch: int,
    token: Tensor,
    pos: Tensor,
    next_token: Tensor,
    finished: Tensor,
    *,
    eos: Tensor | None = None,
    pad: int | Tensor = 0,
    step: Tensor | None = None,
    ring: Tensor | None = None,
) -> list[Launch]:
    """reference.advance; with eos int32 [E] it also notes who finishes, with step int32 [1] it counts, and with ring
    int32 [R, B] it hands the tokens on. finished: bool or uint8 [B]. pad: what a finished slot emits, compiled in or
    int32 [1]."""
    batch = len(token)
    _check_batch("advance", batch)
    if ring is not None and step is None:
        raise ValueError("advance: a ring needs the step that says which of its lines is next.")
    values = {
        **{"token": token, "pos": pos, "next_token": next_token, "finished": finished.view(torch.uint8)},
        **{"eos": eos, "step": step, "ring": ring},
        **({"pad": pad, "PAD": 0} if isinstance(pad, Tensor) else {"pad": None, "PAD": pad}),
        **{"NUM_EOS": 0 if eos is None else len(eos), "RING": 0 if ring is None else len(ring)},
        **{"B": batch, "B_BLOCK": triton.next_power_of_2(batch)},
    }
    return [launch_of("advance", token_kernels.advance, (1,), values, 1)]


def _method(plan: Callable[..., list[Launch]]):
    def op(self, *arguments, **named) -> None:
        self.take(plan, *arguments, **named)

    return op


class Ops:
    """The ops as methods, of whoever does something with their launches: `take` is given the plan and its arguments but
    for the architecture."""

    def take(self, plan: Callable[..., list[Launch]], *arguments, **named) -> None:
        raise NotImplementedError

    embed = _method(embed)
    norm_qkv_rope = _method(norm_qkv_rope)
    attention = _method(attention)
    proj_add = _method(proj_add)
    norm_gate_up = _method(norm_gate_up)
    kv_fill = _method(kv_fill)
    keep_hidden = _method(keep_hidden)
    norm_logits = _method(norm_logits)
    sample = _method(sample)
    advance = _method(advance)
