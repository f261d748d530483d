"""proj_add, norm_logits and norm_gate_up: products whose every output is one row of a matrix (or the same row of two).

kernels/reference.py is their definition. The RMSNorm is linear but for one factor a slot, so it is folded in: the
products are taken of x * norm, and 1 / rms(x) is multiplied in at the end, from squares that were summed on the way.
"""

import triton
import triton.language as tl

from d3rt.kernels.cuda.matvec import collect, is_last, leave, matvec


@triton.jit
def project(
    out,  # [B, N] float32, out; in and out with ADD
    x,  # [B, K] float32
    norm,  # [K] float32, or None
    w,
    w_scales,
    w_minima,
    bias,  # [N] float32, or None
    partials,
    counters,
    FORMAT: tl.constexpr,
    LDW: tl.constexpr,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out [B, N] = RMSNorm(x) w^T + bias, or += with ADD; grid (cdiv(N, BN), SPLIT)."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BN + tl.arange(0, BN)
    sums, squares = matvec(
        *(x, norm, w, w_scales, w_minima, rows // 16, rows % 16, rows < N, split),
        FORMAT,
        LDW,
        K,
        B,
        BN,
        BK,
        SPLIT,
    )
    if SPLIT == 1:
        _put(out, norm, bias, rows, sums, squares, EPS, ADD, N, K, B)
    else:
        leave(partials, block, split, sums, squares, B, BN, SPLIT)
        if is_last(counters + block, SPLIT):
            all_sums, all_squares = collect(partials, block, B, BN, SPLIT)
            _put(out, norm, bias, rows, all_sums, all_squares, EPS, ADD, N, K, B)


@triton.jit
def _put(
    out,
    norm,
    bias,
    rows,
    sums,
    squares,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    mask = rows < N
    before = ()
    if ADD:
        for b in tl.static_range(B):
            before += (tl.load(out + b * N + rows, mask=mask, other=0.0),)
        tl.debug_barrier()  # several threads may have read what one of them writes
    for b in tl.static_range(B):
        value = sums[b]
        if norm is not None:
            value *= tl.rsqrt(squares[b] / K + EPS)
        if bias is not None:
            value += tl.load(bias + rows, mask=mask, other=0.0)
        if ADD:
            value += before[b]
        tl.store(out + b * N + rows, value, mask=mask)


@triton.jit
def norm_gate_up(
    h,  # [B, F] float32, out
    x,  # [B, K] float32
    norm,  # [K] float32
    w_gate,
    w_gate_scales,
    w_gate_minima,
    w_up,
    w_up_scales,
    w_up_minima,
    b_gate,  # [F] float32, or None
    b_up,
    partials,
    counters,
    GATE_FORMAT: tl.constexpr,
    UP_FORMAT: tl.constexpr,
    LD_GATE: tl.constexpr,
    LD_UP: tl.constexpr,
    EPS: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """h = silu(n w_gate^T + b_gate) * (n w_up^T + b_up), n = RMSNorm(x); grid (cdiv(F, BN), SPLIT)."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BN + tl.arange(0, BN)
    mask = rows < F
    gate, squares = matvec(
        x,
        norm,
        w_gate,
        w_gate_scales,
        w_gate_minima,
        *(rows // 16, rows % 16, mask, split),
        *(GATE_FORMAT, LD_GATE, K, B, BN, BK, SPLIT),
    )
    up, _ = matvec(
        x,
        norm,
        w_up,
        w_up_scales,
        w_up_minima,
        *(rows // 16, rows % 16, mask, split),
        *(UP_FORMAT, LD_UP, K, B, BN, BK, SPLIT),
    )
    if SPLIT == 1:
        _silu_mul(h, b_gate, b_up, rows, gate + up, squares, EPS, F, K, B)
    else:
        leave(partials, block, split, gate + up, squares + squares, 2 * B, BN, SPLIT)
        if is_last(counters + block, SPLIT):
            both, all_squares = collect(partials, block, 2 * B, BN, SPLIT)
            _silu_mul(h, b_gate, b_up, rows, both, all_squares, EPS, F, K, B)


@triton.jit
def _silu_mul(
    h, b_gate, b_up, rows, both, squares, EPS: tl.constexpr, F: tl.constexpr, K: tl.constexpr, B: tl.constexpr
):
    mask = rows < F
    for b in tl.static_range(B):
        inverse = tl.rsqrt(squares[b] / K + EPS)
        gate, up = both[b] * inverse, both[B + b] * inverse
        if b_gate is not None:
            gate += tl.load(b_gate + rows, mask=mask, other=0.0)
        if b_up is not None:
            up += tl.load(b_up + rows, mask=mask, other=0.0)
        tl.store(h + b * F + rows, gate / (1.0 + tl.exp(-gate)) * up, mask=mask)
