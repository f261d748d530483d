"""embed, sample and advance: the token on its way in and out of a step.

kernels/reference.py defines them (`sample` here is its penalise, warp and sample together). Sums of the softmax's
weights are integers, 2^40 for a weight of 1: exact in any order, so that a draw depends on nothing but the logits and
the random number. A weight is off by float32's rounding of exp, so a draw differs from the reference's only where the
random number falls that close to a border between two tokens.

A step's errors cannot be raised on the device. `sample` writes NOT_FINITE or NO_DISTRIBUTION for a token, `advance`
hands it to the ring for the host to read, and the next `embed` takes row 0 in its place.
"""

import triton
import triton.language as tl

NOT_FINITE = -1  # the logits hold NaN, or nothing above -inf
NO_DISTRIBUTION = -2  # infinite once divided by the temperature
SETTINGS = ("seed", "top_k", "top_p", "min_p", "temperature", "repetition_penalty")  # of `sample`, int64 each


@triton.jit
def embed(
    x,  # [B, D] float32, out
    token,  # [B] int32
    table,  # [V, D], rows LDW apart; or int32 words
    scales,
    minima,
    FORMAT: tl.constexpr,
    LDW: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x = table[token]; grid (cdiv(D, BLOCK), B)"""
    slot = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < D
    row = tl.maximum(tl.load(token + slot), 0).to(tl.int64)
    if FORMAT == "plain":
        value = tl.load(table + row * LDW + column, mask=mask, other=0.0).to(tl.float32)
    else:
        WORDS: tl.constexpr = 8 if FORMAT == "int8" else 4
        group = row // 16 * (D // 32) + column // 32
        word = column % 32 // 4
        at = group * (WORDS * 16) + word % WORDS * 16 + row % 16
        codes = tl.load(table + at, mask=mask, other=0) >> (column % 4 * 8)
        if FORMAT == "int8":
            value = ((codes & 0xFF) ^ 0x80).to(tl.float32) - 128.0
        else:
            value = ((codes >> (word // WORDS * 4)) & 0xF).to(tl.float32)
            if minima is None:
                value -= 8.0
        value *= tl.load(scales + group * 16 + row % 16, mask=mask, other=0.0).to(tl.float32)
        if minima is not None:
            value += tl.load(minima + group * 16 + row % 16, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + slot * D + column, value, mask=mask)


@triton.jit
def keep_hidden(
    hidden,  # [B, S, D] of a float type, out at pos; slots SLOT_STRIDE apart
    x,  # [B, D] float32
    pos,  # [B] int32
    SLOT_STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hidden[pos] = x; grid (cdiv(D, BLOCK), B)"""
    slot = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < D
    at = tl.maximum(tl.load(pos + slot), 0).to(tl.int64)
    value = tl.load(x + slot * D + column, mask=mask)
    line = hidden + slot.to(tl.int64) * SLOT_STRIDE + at * D
    tl.store(line + column, value.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def philox(seed, step, slot):
    """The 64 bits (uint64) of which reference.philox_uniform takes the upper 53: Philox4x32-10 (Salmon et al. 2011)."""
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    zero = seed & 0
    c0, c1, c2, c3 = step.to(tl.uint64) + zero, slot.to(tl.uint64) + zero, zero, zero
    for _ in tl.static_range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ key0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ key1, a & 0xFFFFFFFF
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return (c0 << 32) | c1


@triton.jit
def _order(value):
    """float32 to int32 that sort alike; 0.0 and -0.0 are equal, and NaN is not asked for."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(logits, seen, at, mask, temperature, penalty):
    """Penalised logits, then divided by the temperature; -inf beyond the vocabulary"""
    value = tl.load(logits + at, mask=mask, other=float("-inf"))
    if seen is not None:
        before = tl.load(seen + at, mask=mask, other=0) != 0
        value = tl.where(before, tl.where(value < 0, value * penalty, tl.div_rn(value, penalty)), value)
    return tl.div_rn(value, temperature)


@triton.jit
def _weights(scores, largest):
    """exp(scores - largest) in units of 2^-40, int64"""
    return (tl.exp(scores - largest) * 1099511627776.0).to(tl.int64)


@triton.jit
def _borders(found, i):
    """The three scores, as _order has them, that divide what `found` (uint32 in an int64, its first 2 i bits known) may
    still be."""
    unit = tl.full((), 1, tl.int64) << (30 - 2 * i)
    least = found - 2147483648
    return (least + unit).to(tl.int32), (least + 2 * unit).to(tl.int32), (least + 3 * unit).to(tl.int32)


@triton.jit
def _next(found, i, one, two, three, need):
    """`found` with two more bits: the largest border from which up there is what is needed."""
    digit = (one >= need).to(tl.int64) + (two >= need).to(tl.int64) + (three >= need).to(tl.int64)
    return found + (digit << (30 - 2 * i))


@triton.jit
def sample(
    next_token,  # [B] int32, out
    logits,  # [B, V] float32
    settings,  # [6] int64, see SETTINGS and plans.sampling_settings
    step,  # [1] int32: index of the generated token
    seen,  # [B, V] int8, in and out: tokens that the repetition penalty counts; None without one
    DRAW: tl.constexpr,  # False: greedy
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token a slot; grid (B,). Reads its logits several times, from the L2 cache that norm_logits left them in:
    once for a greedy token, 4 times for a draw, 16 more for top_k, 18 more for top_p."""
    slot = tl.program_id(0)
    own = logits + slot * V
    own_seen = None if seen is None else seen + slot * V
    lanes = tl.arange(0, BLOCK)
    penalty = tl.load(settings + 5).to(tl.int32).to(tl.float32, bitcast=True)
    temperature = tl.load(settings + 4).to(tl.int32).to(tl.float32, bitcast=True) if DRAW else 1.0

    # The largest score, the lowest token that has it, and whether the logits are sound.
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_at = tl.zeros((BLOCK,), tl.int32)
    broken = tl.zeros((BLOCK,), tl.int32)
    above = tl.zeros((BLOCK,), tl.int32)  # any logit above -inf
    for start in range(0, V, BLOCK):
        at = start + lanes
        raw = tl.load(own + at, mask=at < V, other=float("-inf"))
        broken |= (raw != raw).to(tl.int32)
        above |= (raw > float("-inf")).to(tl.int32)
        score = _scores(own, own_seen, at, at < V, temperature, penalty)
        better = score > best
        best, best_at = tl.where(better, score, best), tl.where(better, at, best_at)
    largest = tl.max(best, 0)
    token = tl.min(tl.where(best == largest, best_at, V), 0)
    sound = (tl.max(broken, 0) == 0) & (tl.max(above, 0) == 1)

    if DRAW:
        if sound & (largest < float("inf")) & (largest > float("-inf")):
            top_k, top_p = tl.load(settings + 1), tl.load(settings + 2).to(tl.uint64)
            least = tl.load(settings + 3).to(tl.int32).to(tl.float32, bitcast=True)  # log min_p
            # Scores as ordered integers: a token is kept from `floor` up; of those at `floor`, the first `dropped` go.
            floor = tl.full((), -(2**31), tl.int32)
            dropped = tl.full((), 0, tl.int32)
            if (top_k > 0) & (top_k < V):
                found = tl.full((), 0, tl.int64)  # the k-th largest, as uint32, two bits at a time
                for i in range(16):
                    one, two, three = _borders(found, i)
                    ones, twos, threes = (tl.zeros((BLOCK,), tl.int32),) * 3
                    for start in range(0, V, BLOCK):
                        at = start + lanes
                        order = _order(_scores(own, own_seen, at, at < V, temperature, penalty))
                        ones += ((order >= one) & (at < V)).to(tl.int32)
                        twos += ((order >= two) & (at < V)).to(tl.int32)
                        threes += ((order >= three) & (at < V)).to(tl.int32)
                    found = _next(found, i, tl.sum(ones, 0), tl.sum(twos, 0), tl.sum(threes, 0), top_k)
                floor = (found - 2147483648).to(tl.int32)
            if top_p != 0:
                kept = tl.zeros((BLOCK,), tl.int64)
                for start in range(0, V, BLOCK):
                    at = start + lanes
                    score = _scores(own, own_seen, at, at < V, temperature, penalty)
                    kept += tl.where(_order(score) >= floor, _weights(score, largest), 0)
                total = tl.sum(kept, 0).to(tl.uint64)
                # The reference compares rounded doubles; a hair less than p lets exact ties fall as they do there.
                need = tl.umulhi(top_p, total) - (total >> 50)
                need = tl.maximum(need.to(tl.int64), 1)
                found = tl.full((), 0, tl.int64)  # the largest score from which up the weights reach `need`
                for i in range(16):
                    one, two, three = _borders(found, i)
                    ones, twos, threes = (tl.zeros((BLOCK,), tl.int64),) * 3
                    for start in range(0, V, BLOCK):
                        at = start + lanes
                        score = _scores(own, own_seen, at, at < V, temperature, penalty)
                        order = _order(score)
                        weight = tl.where(order >= floor, _weights(score, largest), 0)
                        ones += tl.where(order >= one, weight, 0)
                        twos += tl.where(order >= two, weight, 0)
                        threes += tl.where(order >= three, weight, 0)
                    found = _next(found, i, tl.sum(ones, 0), tl.sum(twos, 0), tl.sum(threes, 0), need)
                floor = tl.maximum((found - 2147483648).to(tl.int32), floor)
                # Of the tokens at the border, the larger ones come first, and only as many as are needed.
                kept = tl.zeros((BLOCK,), tl.int64)
                equal = tl.zeros((BLOCK,), tl.int32)
                weight = tl.zeros((BLOCK,), tl.int64)
                for start in range(0, V, BLOCK):
                    at = start + lanes
                    score = _scores(own, own_seen, at, at < V, temperature, penalty)
                    order = _order(score)
                    value = _weights(score, largest)
                    kept += tl.where(order > floor, value, 0)
                    same = (order == floor) & (at < V)
                    equal += same.to(tl.int32)
                    weight = tl.maximum(weight, tl.where(same, value, 0))
                each = tl.maximum(tl.max(weight, 0), 1)
                wanted = (need - tl.sum(kept, 0) + each - 1) // each
                dropped = tl.maximum(tl.sum(equal, 0) - wanted.to(tl.int32), 0)
            # The sum of what is kept, then the first token at which the running sum exceeds the random share of it.
            token = tl.full((), 0, tl.int32)
            target = tl.full((), 0, tl.int64)
            for phase in range(2):
                running = tl.full((), 0, tl.int64)
                ties = tl.full((), 0, tl.int32)
                for start in range(0, V, BLOCK):
                    at = start + lanes
                    score = _scores(own, own_seen, at, at < V, temperature, penalty)
                    order = _order(score)
                    same = ((order == floor) & (at < V)).to(tl.int32)
                    rank = ties + tl.cumsum(same, 0)  # 1 for the first token at the border
                    keep = (order > floor) | ((same == 1) & (rank > dropped))
                    keep = keep & (at < V) & (score - largest >= least)
                    cumulative = running + tl.cumsum(tl.where(keep, _weights(score, largest), 0), 0)
                    token += tl.sum(((cumulative <= target) & (at < V) & (phase == 1)).to(tl.int32), 0)
                    running = tl.max(cumulative, 0)
                    ties += tl.sum(same, 0)
                if phase == 0:
                    bits = philox(tl.load(settings).to(tl.uint64), tl.load(step), slot)
                    bits = (bits >> 11) << 11  # as a double in [0, 1) has them
                    target = tl.umulhi(bits, running.to(tl.uint64)).to(tl.int64)
        else:
            token = tl.full((), -2, tl.int32)
    token = tl.where(sound, token, -1)
    tl.store(next_token + slot, token)
    if seen is not None:
        if token >= 0:
            tl.store(own_seen + token, 1)


@triton.jit
def advance(
    token,  # [B] int32, out
    pos,  # [B] int32, in and out
    next_token,  # [B] int32
    finished,  # [B] uint8, in and out
    eos,  # [NUM_EOS] int32, or None: then nothing finishes
    pad,  # [1] int32, what a slot that had finished before emits; None: PAD
    step,  # [1] int32, in and out, or None
    ring,  # [RING, B] int32, out, or None: the tokens for the host, line step % RING
    PAD: tl.constexpr,
    NUM_EOS: tl.constexpr,
    RING: tl.constexpr,
    B: tl.constexpr,
    B_BLOCK: tl.constexpr,
):
    """reference.advance; then notes which slots have finished, and hands the tokens to the ring. A slot that had
    finished before emits pad; an error of `sample` goes to the ring as it is and finishes its slot. grid (1,)"""
    slot = tl.arange(0, B_BLOCK)
    mask = slot < B
    done = tl.load(finished + slot, mask=mask, other=1) != 0
    chosen = tl.load(next_token + slot, mask=mask, other=0)
    if eos is not None:
        if pad is None:
            chosen = tl.where(done, PAD, chosen)
        else:
            chosen = tl.where(done, tl.load(pad), chosen)
    tl.store(pos + slot, tl.load(pos + slot, mask=mask, other=0) + tl.where(done, 0, 1), mask=mask)
    tl.store(token + slot, tl.maximum(chosen, 0), mask=mask)
    if step is not None:
        i = tl.load(step)
        if ring is not None:
            tl.store(ring + (i % RING) * B + slot, chosen, mask=mask)
        tl.debug_barrier()  # every thread has read it
        tl.store(step, i + 1)
    if eos is not None:
        done = done | (chosen < 0)
        for j in tl.static_range(NUM_EOS):
            done = done | (chosen == tl.load(eos + j))
        tl.store(finished + slot, done.to(tl.uint8), mask=mask)
