"""norm_qkv_rope and kv_fill: a hidden state to K,V in the cache (and to q), with bias, head norm and RoPE, in one
launch.

kernels/reference.py is their definition. A program makes BN rows of one head, each with its partner in the rotation:
lanes 0 .. BN/2 - 1 are rows j, the others rows j + d/2. With a norm over the head it makes all of the head. kv_fill is
the K,V part for many layers at once; what differs between layers are addresses, and those stand in a table in device
memory.
"""

import triton
import triton.language as tl

from d3rt.kernels.cuda.matvec import collect, is_last, leave, matvec


@triton.jit
def _head_rows(chunk, HEAD_DIM: tl.constexpr, BN: tl.constexpr):
    """(offsets [BN] of the lanes' rows within the head, which of them exist)"""
    HALF: tl.constexpr = HEAD_DIM // 2
    lane = tl.arange(0, BN)
    pair = chunk * (BN // 2) + lane % (BN // 2)
    return pair + lane // (BN // 2) * HALF, pair < HALF


@triton.jit
def _head_tiles(first, chunk, HEAD_DIM: tl.constexpr, BN: tl.constexpr):
    """(tile [BN], row in the tile [BN], which exist) of the lanes, in tiles of 16 rows, where the head begins at row
    `first`. The first way says the same as the second, and the compiler sees that 16 rows lie side by side."""
    HALF: tl.constexpr = HEAD_DIM // 2
    lane = tl.arange(0, BN)
    if HALF % 16 == 0 and HALF % (BN // 2) == 0 and BN % 32 == 0:
        TILES: tl.constexpr = BN // 32
        sixteen = lane // 16
        tile = first // 16 + chunk * TILES + sixteen % TILES + sixteen // TILES * (HALF // 16)
        return tile, lane % 16, tl.full((BN,), True, tl.int1)
    else:
        offsets, wanted = _head_rows(chunk, HEAD_DIM, BN)
        return (first + offsets) // 16, (first + offsets) % 16, wanted


@triton.jit
def _halves(values, BN: tl.constexpr):
    """[BN] to its first and its second half"""
    return tl.split(tl.trans(tl.reshape(values, (2, BN // 2))))


@triton.jit
def _finish_head(
    bias,  # float32 *: of this head, or None
    head_norm,  # [d] float32, or None
    target,  # float type *: where element 0 of this head goes, for slot 0
    slot_stride,  # elements from slot to slot
    pos_stride,  # elements from position to position; 0 for q
    cos,
    sin,
    pos,
    chunk,
    sums,
    squares,
    ROTATED: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    offsets, wanted = _head_rows(chunk, HEAD_DIM, BN)
    pair = chunk * (BN // 2) + tl.arange(0, BN // 2)
    inside = pair < HALF
    for b in tl.static_range(B):
        value = sums[b] * tl.rsqrt(squares[b] / K + EPS)
        if bias is not None:
            value += tl.load(bias + offsets, mask=wanted, other=0.0)
        if ROTATED:
            if head_norm is not None:
                value = tl.where(wanted, value, 0.0)
                value *= tl.rsqrt(tl.sum(value * value, 0) / HEAD_DIM + EPS)
                value *= tl.load(head_norm + offsets, mask=wanted, other=0.0)
        at = tl.load(pos + b).to(tl.int64)
        line = target + b * slot_stride + at * pos_stride
        if ROTATED:
            low, high = _halves(value, BN)
            c = tl.load(cos + at * HALF + pair, mask=inside, other=0.0)
            s = tl.load(sin + at * HALF + pair, mask=inside, other=0.0)
            rotated_low, rotated_high = low * c - high * s, high * c + low * s
            tl.store(line + pair, rotated_low.to(target.dtype.element_ty), mask=inside)
            tl.store(line + HALF + pair, rotated_high.to(target.dtype.element_ty), mask=inside)
        else:
            tl.store(line + offsets, value.to(target.dtype.element_ty), mask=wanted)


@triton.jit
def _finish_qkv(
    q,
    k_cache,
    v_cache,
    bq,
    bk,
    bv,
    q_norm,
    k_norm,
    cos,
    sin,
    pos,
    head,
    chunk,
    sums,
    squares,
    EPS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
):
    if head < H:
        bias_q = None if bq is None else bq + head * HEAD_DIM
        _finish_head(
            bias_q,
            q_norm,
            *(q + head * HEAD_DIM, H * HEAD_DIM, 0, cos, sin, pos, chunk, sums, squares),
            *(True, EPS, HEAD_DIM, K, B, BN),
        )
    elif head < H + G:
        bias_k = None if bk is None else bk + (head - H) * HEAD_DIM
        k_line = k_cache + (head - H).to(tl.int64) * HEAD_STRIDE
        _finish_head(
            bias_k,
            k_norm,
            *(k_line, SLOT_STRIDE, HEAD_DIM, cos, sin, pos, chunk, sums, squares),
            *(True, EPS, HEAD_DIM, K, B, BN),
        )
    else:
        bias_v = None if bv is None else bv + (head - H - G) * HEAD_DIM
        v_line = v_cache + (head - H - G).to(tl.int64) * HEAD_STRIDE
        _finish_head(
            bias_v,
            None,
            *(v_line, SLOT_STRIDE, HEAD_DIM, cos, sin, pos, chunk, sums, squares),
            *(False, EPS, HEAD_DIM, K, B, BN),
        )


@triton.jit
def _pick(role, H: tl.constexpr, of_q, of_k, of_v):
    return tl.where(role == 0, of_q, tl.where(role == H, of_k, of_v))


@triton.jit
def norm_qkv_rope(
    q,  # [B, H, d] float32, out
    k_cache,  # [B, G, S, d] of a float type, out at pos; slots SLOT_STRIDE apart, heads HEAD_STRIDE
    v_cache,
    x,  # [B, K] float32
    norm,  # [K] float32
    wq,  # [H d, K]
    wq_scales,
    wq_minima,
    wk,  # [G d, K]
    wk_scales,
    wk_minima,
    wv,
    wv_scales,
    wv_minima,
    bq,  # [H d] float32, or None
    bk,  # [G d]
    bv,
    q_norm,  # [d] float32, or None
    k_norm,
    cos,  # [S, d/2] float32
    sin,
    pos,  # [B] int32
    partials,
    counters,
    Q_FORMAT: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    LD_Q: tl.constexpr,
    LD_K: tl.constexpr,
    LD_V: tl.constexpr,
    ALIKE: tl.constexpr,  # whether the three matrices have one format
    EPS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """grid (heads of q, then k, then v; chunks of a head; SPLIT)"""
    head, chunk, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if ALIKE:
        role = tl.where(head < H, 0, tl.where(head < H + G, H, H + G))  # first head of this head's matrix
        w = _pick(role, H, wq, wk, wv)
        scales = None if wq_scales is None else _pick(role, H, wq_scales, wk_scales, wv_scales)
        minima = None if wq_minima is None else _pick(role, H, wq_minima, wk_minima, wv_minima)
        tile, lane, wanted = _head_tiles((head - role) * HEAD_DIM, chunk, HEAD_DIM, BN)
        sums, squares = matvec(
            x,
            norm,
            w,
            scales,
            minima,
            *(tile, lane, wanted, split),
            *(Q_FORMAT, LD_Q, K, B, BN, BK, SPLIT),
        )
    elif head < H:
        tile, lane, wanted = _head_tiles(head * HEAD_DIM, chunk, HEAD_DIM, BN)
        sums, squares = matvec(
            x,
            norm,
            wq,
            wq_scales,
            wq_minima,
            *(tile, lane, wanted, split),
            *(Q_FORMAT, LD_Q, K, B, BN, BK, SPLIT),
        )
    elif head < H + G:
        tile, lane, wanted = _head_tiles((head - H) * HEAD_DIM, chunk, HEAD_DIM, BN)
        sums, squares = matvec(
            x,
            norm,
            wk,
            wk_scales,
            wk_minima,
            *(tile, lane, wanted, split),
            *(K_FORMAT, LD_K, K, B, BN, BK, SPLIT),
        )
    else:
        tile, lane, wanted = _head_tiles((head - H - G) * HEAD_DIM, chunk, HEAD_DIM, BN)
        sums, squares = matvec(
            x,
            norm,
            wv,
            wv_scales,
            wv_minima,
            *(tile, lane, wanted, split),
            *(V_FORMAT, LD_V, K, B, BN, BK, SPLIT),
        )
    if SPLIT == 1:
        _finish_qkv(
            *(q, k_cache, v_cache, bq, bk, bv, q_norm, k_norm, cos, sin, pos, head, chunk, sums, squares),
            *(EPS, H, G, HEAD_DIM, SLOT_STRIDE, HEAD_STRIDE, K, B, BN),
        )
    else:
        block = head * tl.num_programs(1) + chunk
        leave(partials, block, split, sums, squares, B, BN, SPLIT)
        if is_last(counters + block, SPLIT):
            all_sums, all_squares = collect(partials, block, B, BN, SPLIT)
            _finish_qkv(
                *(q, k_cache, v_cache, bq, bk, bv, q_norm, k_norm, cos, sin, pos, head, chunk, all_sums),
                all_squares,
                *(EPS, H, G, HEAD_DIM, SLOT_STRIDE, HEAD_STRIDE, K, B, BN),
            )


# What a row of kv_fill's table holds, in this order: addresses, 0 for what a layer does not have.
FILL_COLUMNS = (
    *("k_cache", "v_cache", "norm", "wk", "wk_scales", "wk_minima", "wv", "wv_scales", "wv_minima"),
    *("bk", "bv", "k_norm"),
)


@triton.jit
def _address(table, column: tl.constexpr, element: tl.constexpr, ALIGN: tl.constexpr):
    """A pointer to `element` out of a table row"""
    pointer = tl.load(table + column).to(tl.pointer_type(element))
    return tl.multiple_of(pointer, ALIGN)


@triton.jit
def _finish_fill(
    row,
    cos,
    sin,
    pos,
    head,
    chunk,
    sums,
    squares,
    CACHE: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    EPS: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
):
    if head < G:
        bias_k = _address(row, 9, tl.float32, 4) + head * HEAD_DIM if BIAS else None
        gain = _address(row, 11, tl.float32, 4) if HEAD_NORM else None
        k_line = _address(row, 0, CACHE, 4) + head.to(tl.int64) * HEAD_STRIDE
        _finish_head(
            bias_k,
            gain,
            *(k_line, SLOT_STRIDE, HEAD_DIM, cos, sin, pos, chunk, sums, squares),
            *(True, EPS, HEAD_DIM, K, B, BN),
        )
    else:
        bias_v = _address(row, 10, tl.float32, 4) + (head - G) * HEAD_DIM if BIAS else None
        v_line = _address(row, 1, CACHE, 4) + (head - G).to(tl.int64) * HEAD_STRIDE
        _finish_head(
            bias_v,
            None,
            *(v_line, SLOT_STRIDE, HEAD_DIM, cos, sin, pos, chunk, sums, squares),
            *(False, EPS, HEAD_DIM, K, B, BN),
        )


@triton.jit
def kv_fill(
    table,  # [layers, 12] int64, see FILL_COLUMNS
    x,  # [B, K] float32
    cos,  # [S, d/2] float32
    sin,
    pos,  # [B] int32
    partials,
    counters,
    CACHE: tl.constexpr,  # element types: of the caches,
    W_K: tl.constexpr,  # of wk (int32 words where it is packed),
    W_V: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    K_MINIMA: tl.constexpr,
    V_MINIMA: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    LD_K: tl.constexpr,
    LD_V: tl.constexpr,
    ALIKE: tl.constexpr,  # whether wk and wv have one format
    ALIGN: tl.constexpr,  # of the addresses of norms, weights, scales and minima: 16, or what is true of them
    EPS: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """grid (layers x heads of k, then v; chunks of a head; SPLIT)"""
    unit, chunk, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = unit % (2 * G)
    row = table + unit // (2 * G) * 12
    norm = _address(row, 2, tl.float32, ALIGN)
    if ALIKE:
        role = head // G  # 0: k, 1: v
        w = _address(row + 3 * role, 3, W_K, ALIGN)
        scales = _address(row + 3 * role, 4, tl.float16, ALIGN) if K_FORMAT != "plain" else None
        minima = _address(row + 3 * role, 5, tl.float16, ALIGN) if K_MINIMA else None
        tile, lane, wanted = _head_tiles((head - role * G) * HEAD_DIM, chunk, HEAD_DIM, BN)
        sums, squares = matvec(
            x,
            norm,
            w,
            scales,
            minima,
            *(tile, lane, wanted, split),
            *(K_FORMAT, LD_K, K, B, BN, BK, SPLIT),
        )
    elif head < G:
        wk = _address(row, 3, W_K, ALIGN)
        k_scales = _address(row, 4, tl.float16, ALIGN) if K_FORMAT != "plain" else None
        k_minima = _address(row, 5, tl.float16, ALIGN) if K_MINIMA else None
        tile, lane, wanted = _head_tiles(head * HEAD_DIM, chunk, HEAD_DIM, BN)
        sums, squares = matvec(
            x,
            norm,
            wk,
            k_scales,
            k_minima,
            *(tile, lane, wanted, split),
            *(K_FORMAT, LD_K, K, B, BN, BK, SPLIT),
        )
    else:
        wv = _address(row, 6, W_V, ALIGN)
        v_scales = _address(row, 7, tl.float16, ALIGN) if V_FORMAT != "plain" else None
        v_minima = _address(row, 8, tl.float16, ALIGN) if V_MINIMA else None
        tile, lane, wanted = _head_tiles((head - G) * HEAD_DIM, chunk, HEAD_DIM, BN)
        sums, squares = matvec(
            x,
            norm,
            wv,
            v_scales,
            v_minima,
            *(tile, lane, wanted, split),
            *(V_FORMAT, LD_V, K, B, BN, BK, SPLIT),
        )
    if SPLIT == 1:
        _finish_fill(
            *(row, cos, sin, pos, head, chunk, sums, squares, CACHE, BIAS, HEAD_NORM, EPS, G, HEAD_DIM),
            *(SLOT_STRIDE, HEAD_STRIDE, K, B, BN),
        )
    else:
        block = unit * tl.num_programs(1) + chunk
        leave(partials, block, split, sums, squares, B, BN, SPLIT)
        if is_last(counters + block, SPLIT):
            all_sums, all_squares = collect(partials, block, B, BN, SPLIT)
            _finish_fill(
                *(row, cos, sin, pos, head, chunk, all_sums, all_squares),
                *(CACHE, BIAS, HEAD_NORM, EPS, G, HEAD_DIM),
                *(SLOT_STRIDE, HEAD_STRIDE, K, B, BN),
            )
