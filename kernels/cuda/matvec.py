"""What every op with a weight matrix is made of: rows of W times the activations of all slots, in one walk over W.

A decode step is bound by the bytes of its weights, so the kernels are laid out for the weight stream: each thread asks
for 128 bits at a time, and no thread waits for another until its rows are summed up. To that end the activations of a
step of BK columns are fewer than the threads of a block: Triton then loads them straight into the weights' layout
instead of passing them through shared memory (`cheap loads`, RemoveLayoutConversions in its compiler). plans.py keeps
to that rule. The products are float32 FMAs: with up to 16 slots they keep up with the memory of all but an A100, and
they need no rounding of the activations.

Where rows alone do not fill the chip, the columns are split over programs as well. Each leaves its sums in `partials`,
and the last to arrive adds them up in the order of the splits: the same bits whoever is last, and no further launch.
`counters` are 0 between launches, since the last program puts its own back.
"""

import triton
import triton.language as tl


@triton.jit
def _widened(codes, j: tl.constexpr, FORMAT: tl.constexpr):
    """Column j of each word of codes as a float, plus 2^8 (int8, from 0 on) or 2^7 (int4): a code becomes a float when
    it is written into the mantissa of that power of 2, which is quicker than a conversion."""
    BIT: tl.constexpr = 8 * j if FORMAT == "int8" else 8 * (j % 4) + 4 * (j // 4)
    UNIT: tl.constexpr = 15 if FORMAT == "int8" else 16  # the bit of the mantissa that is worth 1
    MASK: tl.constexpr = 0xFF << 15 if FORMAT == "int8" else 0xF << 16
    POWER: tl.constexpr = 0x43800000 if FORMAT == "int8" else 0x43000000
    moved = codes << (UNIT - BIT) if BIT <= UNIT else codes >> (BIT - UNIT)
    return ((moved & MASK) | POWER).to(tl.float32, bitcast=True)


@triton.jit
def _may_go_on(x, turn: tl.constexpr, SEVERAL: tl.constexpr):
    """True, which the compiler does not know where there are SEVERAL turns. So each turn's products are behind a branch
    of their own, and are summed up before the next turn's inputs are fetched. In one piece the compiler fetches those
    of all slots first, for which it takes 128 registers of a thread with 16 slots."""
    return x.to(tl.int64) != turn + 1 if SEVERAL else True


@triton.jit
def matvec(
    x,  # [B, K] float32
    norm,  # [K] float32, or None
    w,  # [.., LDW] of a float type; or int32 words [tiles, groups, words, 16] (kernels/packing.py)
    scales,  # float16 [tiles, groups, 16], or None
    minima,  # the same, or None
    tile,  # [BN] int32: the rows of w to multiply are 16 tile + lane,
    lane,  # [BN] int32
    wanted,  # [BN] bool: those of them that exist
    split,  # which part of the columns
    FORMAT: tl.constexpr,  # "plain", "int8", "int4"
    LDW: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """(sums, squares): for each slot, sums [BN] = rows of w . (x * norm), and the sum of x^2 (0 without norm), both
    over this split's columns."""
    STEPS: tl.constexpr = (K + BK - 1) // BK
    first = split * (STEPS // SPLIT) + tl.minimum(split, STEPS % SPLIT)
    last = first + STEPS // SPLIT + tl.where(split < STEPS % SPLIT, 1, 0)
    if FORMAT == "plain":
        V: tl.constexpr = 128 // w.dtype.element_ty.primitive_bitwidth  # elements in 128 bits
        SLOTS: tl.constexpr = 4  # of a turn, see _may_go_on
        total = (tl.zeros((BN, BK // V), tl.float32),) * B
        square = (tl.zeros((BK,), tl.float32),) * B
        lines = w + (tile * 16 + lane).to(tl.int64)[:, None] * LDW
        for step in range(first, last):
            k = step * BK + tl.arange(0, BK)
            inside = k < K
            mask = wanted[:, None] & inside[None, :]
            weights = tl.load(lines + k[None, :], mask=mask, other=0.0)  # the weight stream
            weights = weights.to(tl.float32)
            if norm is not None:
                gain = tl.load(norm + k, mask=inside, other=0.0)
            for turn in tl.static_range((B + SLOTS - 1) // SLOTS):
                if _may_go_on(x, turn, B > SLOTS):
                    new_total, new_square = (), ()
                    for b in tl.static_range(B):
                        if b // SLOTS == turn:
                            value = tl.load(x + b * K + k, mask=inside, other=0.0)
                            if norm is not None:
                                new_square += (square[b] + value * value,)
                                value *= gain
                            else:
                                new_square += (square[b],)
                            # Summed in the thread that loaded it; across threads only after the last step.
                            product = tl.reshape(weights * value[None, :], (BN, BK // V, V))
                            new_total += (total[b] + tl.sum(product, 2),)
                        else:
                            new_square += (square[b],)
                            new_total += (total[b],)
                    total, square = new_total, new_square
        sums, squares = (), ()
        for b in tl.static_range(B):
            sums += (tl.sum(total[b], 1),)
            squares += (tl.sum(square[b], 0),)
        return sums, squares
    else:
        COLUMNS: tl.constexpr = 4 if FORMAT == "int8" else 8  # in one 32-bit word of a row
        WORDS: tl.constexpr = 32 // COLUMNS  # of a row in one group
        BW: tl.constexpr = BK // COLUMNS
        # Columns of a word in a turn, see _may_go_on: those of one slot all together.
        AT_ONCE: tl.constexpr = COLUMNS if B == 1 else max(1, 256 // (B * BW))
        # What _widened has too much: 2^8 + 128; 2^7 + 8, or 2^7 where there are minima.
        ZERO: tl.constexpr = 384.0 if FORMAT == "int8" else (136.0 if minima is None else 128.0)
        total = (tl.zeros((BW, BN), tl.float32),) * B
        square = (tl.zeros((BK,), tl.float32),) * B
        first_group = tile[None, :].to(tl.int64) * (K // 32)
        for step in range(first, last):
            word = step * BW + tl.arange(0, BW)
            group, inside = word // WORDS, word < K // COLUMNS
            part = word % WORDS
            mask = inside[:, None] & wanted[None, :]
            at = first_group + group[:, None]
            of_lane = w + at * (WORDS * 16) + part[:, None] * 16 + lane[None, :]
            codes = tl.load(of_lane, mask=mask, other=0)  # the weight stream
            scale = tl.load(scales + at * 16 + lane[None, :], mask=mask, other=0.0).to(tl.float32)
            least = -ZERO * scale
            if minima is not None:
                least += tl.load(minima + at * 16 + lane[None, :], mask=mask, other=0.0).to(tl.float32)
            if FORMAT == "int8":
                codes ^= tl.full((), -0x7F7F7F80, tl.int32)  # 0x80808080: codes from 0 on
            for turn in tl.static_range((COLUMNS + AT_ONCE - 1) // AT_ONCE):
                if _may_go_on(x, turn, COLUMNS > AT_ONCE):
                    for j in tl.static_range(COLUMNS):
                        if j // AT_ONCE == turn:
                            weights = (
                                _widened(codes, j, FORMAT) * scale + least
                            )  # exact but for the last addition
                            k = (
                                word * 4 + j
                                if FORMAT == "int8"
                                else group * 32 + part * 4 + (j % 4 + 16 * (j // 4))
                            )
                            if norm is not None:
                                gain = tl.load(norm + k, mask=inside, other=0.0)
                            new_total = ()
                            for b in tl.static_range(B):
                                value = tl.load(x + b * K + k, mask=inside, other=0.0)
                                if norm is not None:
                                    value *= gain
                                new_total += (total[b] + weights * value[:, None],)
                            total = new_total
            if norm is not None:
                k = step * BK + tl.arange(0, BK)
                new_square = ()
                for b in tl.static_range(B):
                    value = tl.load(x + b * K + k, mask=k < K, other=0.0)
                    new_square += (square[b] + value * value,)
                square = new_square
        sums, squares = (), ()
        for b in tl.static_range(B):
            sums += (tl.sum(total[b], 0),)
            squares += (tl.sum(square[b], 0),)
        return sums, squares


@triton.jit
def leave(partials, block, split, sums, squares, N: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    """Writes this split's N sums [BN] and squares where `collect` finds them: partials float32
    [blocks, SPLIT, N, 1 + BN]."""
    lanes = tl.arange(0, BN)
    base = partials + (block * SPLIT + split) * N * (1 + BN)
    for i in tl.static_range(N):
        tl.store(base + i * (1 + BN), squares[i])
        tl.store(base + i * (1 + BN) + 1 + lanes, sums[i])


@triton.jit
def is_last(counter, expected: tl.constexpr):
    """Whether all the other programs of this counter have arrived here before; then everything they wrote can be read,
    and the counter is 0 again."""
    tl.debug_barrier()  # all of this block's writes come before its arrival
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def collect(partials, block, N: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    """(sums, squares) over all splits, added up in their order."""
    lanes = tl.arange(0, BN)
    base = partials + block * SPLIT * N * (1 + BN)
    sums = (tl.zeros((BN,), tl.float32),) * N
    squares = (0.0,) * N
    for split in tl.static_range(SPLIT):
        new_sums, new_squares = (), ()
        for i in tl.static_range(N):
            at = base + (split * N + i) * (1 + BN)
            new_squares += (squares[i] + tl.load(at, cache_modifier=".cg"),)
            new_sums += (sums[i] + tl.load(at + 1 + lanes, cache_modifier=".cg"),)
        sums, squares = new_sums, new_squares
    return sums, squares
