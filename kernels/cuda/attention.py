"""attention: one query of each slot against its K,V, the positions split over programs, flash-decoding style.

kernels/reference.py is its definition. Each program takes one key-value head, all query heads that share it, and a
stretch of positions, with an online softmax (arXiv 2205.14135; the split over positions: crfm.stanford.edu/2023/10/12/
flashdecoding.html). How many stretches there are depends on pos, which only the device knows: no more than leave each
its fewest positions, and programs beyond them stop at once. The last to arrive merges the others' sums, in order of
position.

With DOT the products run on tensor cores, q and the weights of the softmax rounded to the cache's 16-bit type, as
flash-attention and Hugging Face's own 16-bit models do. Without, everything is float32: for a float32 cache, and for
architectures below sm_80, where Triton's tl.dot is no tensor-core instruction.
"""

import triton
import triton.language as tl

from d3rt.kernels.cuda.matvec import is_last


@triton.jit
def attention(
    out,  # [B, H, d] float32, out
    q,  # [B, H, d] float32
    k_cache,  # [B, G, S, d] of a float type; slots SLOT_STRIDE apart, heads HEAD_STRIDE
    v_cache,
    pos,  # [B] int32
    partials,  # float32 [B, G, SPLIT, GROUP_BLOCK, D_BLOCK + 2]
    counters,  # int32 [B, G]
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: no window
    H: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,  # H / G rounded up to what the product wants
    D_BLOCK: tl.constexpr,
    BT: tl.constexpr,
    SPLIT: tl.constexpr,  # programs of a slot and head
    FEWEST: tl.constexpr,  # positions that are worth a program's sums
    DOT: tl.constexpr,
):
    """grid (G, SPLIT, B)"""
    GROUP: tl.constexpr = H // G
    head, split, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    last = tl.load(pos + slot)
    first = tl.maximum(0, last + 1 - WINDOW) if WINDOW else 0
    tiles = (last - first) // BT + 1
    most = tl.minimum(SPLIT, tl.maximum(1, (last + 1 - first) // FEWEST))
    share = (tiles + most - 1) // most  # tiles of each program
    splits = (tiles + share - 1) // share  # programs that have any
    if split >= splits:
        return
    begin = first + split * share * BT
    end = tl.minimum(begin + share * BT, last + 1)

    lanes, d = tl.arange(0, GROUP_BLOCK), tl.arange(0, D_BLOCK)
    mine, inside = lanes < GROUP, d < HEAD_DIM
    query = q + (slot * H + head * GROUP + lanes)[:, None] * HEAD_DIM + d[None, :]
    queries = tl.load(query, mask=mine[:, None] & inside[None, :], other=0.0)
    if DOT:
        queries = queries.to(k_cache.dtype.element_ty)
    base = slot.to(tl.int64) * SLOT_STRIDE + head.to(tl.int64) * HEAD_STRIDE
    largest = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    sums = tl.zeros((GROUP_BLOCK, D_BLOCK), tl.float32)
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT)
        read = t < end
        at = base + t[:, None].to(tl.int64) * HEAD_DIM + d[None, :]
        mask = read[:, None] & inside[None, :]
        keys = tl.load(k_cache + at, mask=mask, other=0.0)  # the weight stream
        values = tl.load(v_cache + at, mask=mask, other=0.0)  # the weight stream
        if DOT:
            scores = tl.dot(queries, tl.trans(keys)) * SCALE
        else:
            scores = tl.sum(queries[:, None, :] * keys.to(tl.float32)[None, :, :], 2) * SCALE
        scores = tl.where(read[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if DOT:
            sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None])
        else:
            sums *= shrink[:, None]
            sums += tl.sum(weights[:, :, None] * values.to(tl.float32)[None, :, :], 1)
        largest = larger

    target = out + (slot * H + head * GROUP + lanes)[:, None] * HEAD_DIM + d[None, :]
    put = mine[:, None] & inside[None, :]
    if SPLIT == 1:
        tl.store(target, sums / total[:, None], mask=put)
    elif splits == 1:
        tl.store(target, sums / total[:, None], mask=put)
    else:
        LINE: tl.constexpr = D_BLOCK + 2  # sums, then the largest score and the total of the weights
        lines = partials + ((slot * G + head) * SPLIT * GROUP_BLOCK + lanes) * LINE
        own = lines + split * GROUP_BLOCK * LINE
        tl.store(own[:, None] + d[None, :], sums, mask=put)
        tl.store(own + D_BLOCK, largest, mask=mine)
        tl.store(own + D_BLOCK + 1, total, mask=mine)
        if is_last(counters + slot * G + head, splits):
            largest = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
            total = tl.zeros((GROUP_BLOCK,), tl.float32)
            sums = tl.zeros((GROUP_BLOCK, D_BLOCK), tl.float32)
            for i in range(splits):
                line = lines + i * GROUP_BLOCK * LINE
                other = tl.load(line + D_BLOCK, mask=mine, other=0.0, cache_modifier=".cg")
                larger = tl.maximum(largest, other)
                shrink, scale = tl.exp(largest - larger), tl.exp(other - larger)
                added = tl.load(line + D_BLOCK + 1, mask=mine, other=1.0, cache_modifier=".cg")
                total = total * shrink + added * scale
                part = tl.load(line[:, None] + d[None, :], mask=put, other=0.0, cache_modifier=".cg")
                sums = sums * shrink[:, None] + part * scale[:, None]
                largest = larger
            tl.store(target, sums / total[:, None], mask=put)
