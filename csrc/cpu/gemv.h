// rows_dot: the weight-streaming product under every op. out[b][row] = dot(w[row], x[b]) for a range of rows.
// Each weight is read once for up to kBatchTile slots; a thread walks its rows in order, so it reads one
// stream.
#pragma once

#include <type_traits>

#include "halves_dot.h"
#include "packed.h"

namespace d3rt::cpu::D3RT_ISA {

constexpr int kBatchTile = 4;
// Rows longer than this meet their x many at once: it would not stay in L1 while one of them streams past.
constexpr int64_t kLongRow = 3072;
// How far ahead each of several rows at once is prefetched, in bytes.
constexpr int kRowsAhead = 1024;
// Rows that are multiplied with a tile of slots at once: every weight serves kBatchTile slots from a
// register, every activation this many rows. As many sums as the registers hold.
#if defined(D3RT_AVX512) || defined(D3RT_NEON)
constexpr int kRowTile = 4, kLongRows = 8;
#else
constexpr int kRowTile = 2, kLongRows = 4;
#endif

struct Range {
  int64_t begin, end;
};
// The share of `total` items that thread `thread` of `num_threads` takes: sizes differ by at most one.
D3RT_INLINE Range share(int64_t total, const Worker& me) {
  return {total * me.thread / me.num_threads, total * (me.thread + 1) / me.num_threads};
}

// The share of this thread to begin with, of `total` items that go in blocks of `block`; 0: all at once.
D3RT_INLINE Range first_share(int64_t total, int64_t block, const Worker& me) {
  if (!me.left || block == 0) return share(total, me);
  const Range blocks = share((total + block - 1) / block, me);
  return {blocks.begin * block, blocks.end * block < total ? blocks.end * block : total};
}

// The number of a block that was left, now taken, from the front or the back; -1 if there was none.
template <bool kFront>
D3RT_INLINE int64_t take(Left& left) {
  uint64_t seen = __atomic_load_n(&left.blocks, __ATOMIC_RELAXED);
  while (true) {
    const uint64_t next = seen >> 32, end = seen & 0xFFFFFFFFu;
    if (next >= end) return -1;
    const uint64_t rest = kFront ? (next + 1) << 32 | end : next << 32 | (end - 1);
    if (__atomic_compare_exchange_n(&left.blocks, &seen, rest, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return static_cast<int64_t>(kFront ? next : end - 1);
  }
}

// Calls work(range) for ranges that together are this thread's share of `total` items; in blocks (not 0), it
// goes on with those that others have not come to: a core that others use too, or that reads more slowly,
// holds nobody up. A result does not depend on who made it. What becomes visible to whom is the barrier's
// business: the order of these accesses does not matter.
template <class Work>
D3RT_INLINE void share_out(int64_t total, int64_t block, const Worker& me, const Work& work) {
  if (!me.left || block == 0) return work(share(total, me));
  const auto do_block = [&](int64_t at) {
    work(Range{at * block, (at + 1) * block < total ? (at + 1) * block : total});
  };
  const Range mine = share((total + block - 1) / block, me);
  Left& own = me.left[me.thread];
  const uint64_t all = static_cast<uint64_t>(mine.begin) << 32 | static_cast<uint64_t>(mine.end);
  __atomic_store_n(&own.blocks, all, __ATOMIC_RELAXED);
  for (int64_t at; (at = take<true>(own)) >= 0;) do_block(at);
  for (int i = 1; i < me.num_threads; ++i)
    for (int64_t at; (at = take<false>(me.left[(me.thread + i) % me.num_threads])) >= 0;) do_block(at);
}

// `parts` more of the `all` parts of a thing are made. True for one of the threads that make it: the one that
// came last, which then sees what the others wrote.
D3RT_INLINE bool completes(Made& made, uint32_t parts, uint32_t all) {
  if (parts == all) return true;
  if (__atomic_add_fetch(&made.parts, parts, __ATOMIC_ACQ_REL) != all) return false;
  __atomic_store_n(&made.parts, 0, __ATOMIC_RELAXED);
  return true;
}

// One row, one slot: four accumulators hide the latency of fma. kAhead: bytes that are prefetched ahead of w.
template <int kAhead = 0, class W>
D3RT_INLINE float dot(const W* w, const float* x, int64_t n) {
  constexpr int kN = Vec::kLanes;
  Vec a0 = set1(0), a1 = set1(0), a2 = set1(0), a3 = set1(0);
  int64_t i = 0;
  for (; i + 4 * kN <= n; i += 4 * kN) {
    if (kAhead) prefetch<4 * kN * sizeof(W)>(w + i, kAhead);
    a0 = fma(load(w + i), load(x + i), a0);
    a1 = fma(load(w + i + kN), load(x + i + kN), a1);
    a2 = fma(load(w + i + 2 * kN), load(x + i + 2 * kN), a2);
    a3 = fma(load(w + i + 3 * kN), load(x + i + 3 * kN), a3);
  }
  for (; i + kN <= n; i += kN) a0 = fma(load(w + i), load(x + i), a0);
  const int rest = static_cast<int>(n - i);
  if (rest) a1 = fma(load_partial(w + i, rest), load_partial(x + i, rest), a1);
  return sum(add(add(a0, a1), add(a2, a3)));
}

// kRowTile rows at w[..], NB slots at x, x + x_stride, ...: out[row][slot]. ahead: bytes from these rows to
// the next ones.
template <int NB, class W>
D3RT_INLINE void dot_tile(const W* const (&w)[kRowTile], int64_t ahead, const float* x, int64_t x_stride,
                          int64_t n, float (&out)[kRowTile][kBatchTile]) {
  constexpr int kN = Vec::kLanes;
  Vec acc[kRowTile][kBatchTile];
  for (int r = 0; r < kRowTile; ++r)
    for (int b = 0; b < kBatchTile; ++b) acc[r][b] = set1(0);
  int64_t i = 0;
  for (; i + kN <= n; i += kN) {
    if (i * sizeof(W) % 64 == 0)
      for (int r = 0; r < kRowTile; ++r) prefetch<64>(w[r] + i, ahead);
    Vec xv[NB];
    for (int b = 0; b < NB; ++b) xv[b] = load(x + b * x_stride + i);
    for (int r = 0; r < kRowTile; ++r) {
      const Vec v = load(w[r] + i);
      for (int b = 0; b < NB; ++b) acc[r][b] = fma(v, xv[b], acc[r][b]);
    }
  }
  const int rest = static_cast<int>(n - i);
  if (rest) {
    for (int r = 0; r < kRowTile; ++r) {
      const Vec v = load_partial(w[r] + i, rest);
      for (int b = 0; b < NB; ++b) acc[r][b] = fma(v, load_partial(x + b * x_stride + i, rest), acc[r][b]);
    }
  }
  for (int r = 0; r < kRowTile; ++r) sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], out[r]);
}

// The same for bfloat16, with x in the order of pairs (vec.h); n in whole pairs.
D3RT_INLINE float dot_pairs(const bf16* w, const float* pairs, int64_t n) {
  constexpr int kN = Vec::kLanes;
  Pair acc[2] = {{set1(0), set1(0)}, {set1(0), set1(0)}};
  const auto add_pair = [&](int64_t i, Pair& to) {
    const Pair v = load_pair(w + i);
    to = {fma(v.first, load(pairs + i), to.first), fma(v.second, load(pairs + i + kN), to.second)};
  };
  int64_t i = 0;
  for (; i + 4 * kN <= n; i += 4 * kN) {
    prefetch<4 * kN * sizeof(bf16)>(w + i, kStreamAhead);
    add_pair(i, acc[0]);
    add_pair(i + 2 * kN, acc[1]);
  }
  if (i < n) add_pair(i, acc[0]);
  return sum(add(add(acc[0].first, acc[0].second), add(acc[1].first, acc[1].second)));
}

template <int NB, class W, class Sink>
D3RT_INLINE void rows_dot_tile(const W* w, int64_t stride, const float* x, int64_t x_stride, int64_t n,
                               int first_slot, Range rows, const Sink& sink) {
  for (int64_t row = rows.begin; row < rows.end; row += kRowTile) {
    const int count = rows.end - row < kRowTile ? static_cast<int>(rows.end - row) : kRowTile;
    const W* tile[kRowTile];  // fewer rows than that: the last one again
    for (int r = 0; r < kRowTile; ++r) tile[r] = w + (row + (r < count ? r : count - 1)) * stride;
    float out[kRowTile][kBatchTile];
    dot_tile<NB>(tile, kRowTile * stride * static_cast<int64_t>(sizeof(W)), x, x_stride, n, out);
    for (int r = 0; r < count; ++r)
      for (int b = 0; b < NB; ++b) sink(first_slot + b, row + r, out[r][b]);
  }
}

// Rows side by side with one slot: out[r] = dot(w[r], x), each in the same order of additions whatever R is.
// x is loaded once for all of them. pairs: x in the order of W's pairs (vec.h); n in whole pairs.
template <int R, class W>
D3RT_INLINE void dot_rows(const W* const (&w)[R], const float* pairs, int64_t n, float (&out)[R]) {
  constexpr int kN = Vec::kLanes;
  constexpr int64_t kLine = 64 / sizeof(W), kStep = 2 * kN < kLine ? kLine : 2 * kN;
  Pair acc[R];
  for (int r = 0; r < R; ++r) acc[r] = {set1(0), set1(0)};
  const auto add_pairs = [&](int64_t i) {
    const Vec first = load(pairs + i), second = load(pairs + i + kN);
    for (int r = 0; r < R; ++r) {
      const Pair v = load_pair(w[r] + i);
      acc[r] = {fma(v.first, first, acc[r].first), fma(v.second, second, acc[r].second)};
    }
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int r = 0; r < R; ++r) prefetch<kStep * sizeof(W)>(w[r] + i, kRowsAhead);
    for (int64_t j = 0; j < kStep; j += 2 * kN) add_pairs(i + j);
  }
  for (; i < n; i += 2 * kN) add_pairs(i);
  for (int r = 0; r < R; ++r) out[r] = sum(add(acc[r].first, acc[r].second));
}

// Calls sink(slot, row, value) once for each slot and each row of `rows`. x: [B, n], rows of it x_stride
// apart.
template <class W, class Sink>
D3RT_INLINE void rows_dot_typed(const Matrix& m, const float* x, int64_t x_stride, int B, Range rows,
                                const Sink& sink) {
  const W* w = static_cast<const W*>(m.data);
  if (B == 1) {
    for (int64_t row = rows.begin; row < rows.end; ++row)
      sink(0, row, dot<kStreamAhead>(w + row * m.stride, x, m.cols));
    return;
  }
  // Blocks of rows small enough to stay in L1 while the slots pass over them, tile by tile.
  int64_t block = 16384 / (m.cols * static_cast<int64_t>(sizeof(W)));
  block = block < kRowTile ? kRowTile : block - block % kRowTile;
  for (int64_t begin = rows.begin; begin < rows.end; begin += block) {
    const Range part = {begin, begin + block < rows.end ? begin + block : rows.end};
    for (int b = 0; b < B; b += kBatchTile) {
      const float* xb = x + b * x_stride;
      switch (B - b) {
        case 1:
          rows_dot_tile<1>(w, m.stride, xb, x_stride, m.cols, b, part, sink);
          break;
        case 2:
          rows_dot_tile<2>(w, m.stride, xb, x_stride, m.cols, b, part, sink);
          break;
        case 3:
          rows_dot_tile<3>(w, m.stride, xb, x_stride, m.cols, b, part, sink);
          break;
        default:
          rows_dot_tile<kBatchTile>(w, m.stride, xb, x_stride, m.cols, b, part, sink);
      }
    }
  }
}

// The activations of an op: float32 [B, cols], rows `stride` apart; quantised where a packed matrix needs
// them so; in the order of pairs, or rounded (halves_dot.h), where that is how bfloat16 is best multiplied,
// else null.
struct Input {
  const float* x;
  int64_t stride;
  Quantised quantised;
  const float* pairs;
  const bf16* rounded;
};

D3RT_INLINE bool is_packed(const Matrix& m) { return m.store == Store::int8 || m.store == Store::int4; }

// For products with these matrices. memory: prepared_floats (args.h) of this thread's own.
D3RT_INLINE Input prepare(float* memory, const float* x, int B, int64_t cols, const Matrix* matrices,
                          int count) {
  constexpr int kN = Vec::kLanes;
  bool any_packed = false, any_bf16 = false;
  for (int i = 0; i < count; ++i) {
    any_packed |= is_packed(matrices[i]);
    any_bf16 |= matrices[i].store == Store::bf16;
  }
  Input input = {x, cols, {}, nullptr, nullptr};
  if (any_packed) {
    input.quantised = quantised_at(memory, B, cols);
    quantise_rows(input.quantised, x, cols, 0, B);
  }
  float* plain = memory + (any_packed ? B * cols / 16 * kQuantisedFloatsPer16 : 0);
#if defined(D3RT_BF16_PRODUCTS)
  if (any_bf16) {
    bf16* rounded = reinterpret_cast<bf16*>(plain);
    round_rows(rounded, x, B, cols);
    input.rounded = rounded;
    return input;
  }
#endif
  if (any_bf16 && B == 1 && cols % (2 * kN) == 0) {
    float* pairs = plain;
    for (int64_t i = 0; i < cols; i += 2 * kN) {
      const Pair pair = pair_of(x + i, static_cast<const bf16*>(nullptr));
      store(pairs + i, pair.first);
      store(pairs + i + kN, pair.second);
    }
    input.pairs = pairs;
  }
  return input;
}

// Work is shared out in granules: a row of a plain matrix, a tile of a packed one.
D3RT_INLINE int64_t granules(const Matrix& m) {
  return is_packed(m) ? (m.rows + kTileRows - 1) / kTileRows : m.rows;
}

// The rows of these granules.
D3RT_INLINE Range rows_of(const Matrix& m, Range part) {
  if (!is_packed(m)) return part;
  const int64_t end = part.end * kTileRows;
  return {part.begin * kTileRows, end < m.rows ? end : m.rows};
}

// Rows in a block that is taken at once of `total`, for share_out: small enough that the last one makes
// nobody wait for long, large enough to be a stream; in whole tiles of rows. 0, fixed shares, for packed
// matrices: their threads are bound by what they compute, and come to the end together (measured: 3 to 9%
// more tokens/s at bfloat16, none at int8, 2% fewer at int4).
D3RT_INLINE int64_t block_of(const Matrix& m, int64_t total, int num_threads) {
  constexpr int64_t kEach = 16, kMostBytes = 128 * 1024;
  if (is_packed(m)) return 0;
  int64_t block = total / (num_threads * kEach);
  const int64_t most = kMostBytes / (m.cols * (m.store == Store::f32 ? 4 : 2));
  if (block > most) block = most;
  const int64_t tile = m.cols > kLongRow ? kLongRows : kRowTile;
  block -= block % tile;
  return block < tile ? tile : block;
}

// Prefetches the start of these granules, as far as the kernels themselves look ahead.
D3RT_INLINE void warm(const Matrix& m, Range part) {
  if (part.begin >= part.end) return;
  if (!is_packed(m)) {
    const int64_t bytes = m.store == Store::f32 ? 4 : 2;
#if defined(D3RT_BF16_PRODUCTS)
    if (m.store == Store::bf16) return prefetch<kFarthest>(m.data, part.begin * m.stride * bytes);
#endif
    prefetch<kStreamAhead>(m.data, part.begin * m.stride * bytes);
    return;
  }
  const int64_t group = part.begin * (m.cols / kGroup);
  m.store == Store::int4 ? warm_group<Store::int4>(m, group) : warm_group<Store::int8>(m, group);
}

// x in the order of W's pairs, for dot_rows; null where it does not come in pairs, or for several slots.
template <class W>
D3RT_INLINE const float* pairs_for(const Matrix& m, const Input& in, int B) {
  if (B != 1 || m.cols % (2 * Vec::kLanes) != 0) return nullptr;
  return m.store == Store::bf16 ? in.pairs : in.x;
}

// One slot and long rows: sink(0, row, value) for each.
template <class W, class Sink>
D3RT_INLINE void long_rows_dot(const Matrix& m, const float* pairs, Range rows, const Sink& sink) {
  const W* w = static_cast<const W*>(m.data);
  int64_t row = rows.begin;
  for (; row + kLongRows <= rows.end; row += kLongRows) {
    const W* some[kLongRows];
    float out[kLongRows];
    for (int r = 0; r < kLongRows; ++r) some[r] = w + (row + r) * m.stride;
    dot_rows<kLongRows>(some, pairs, m.cols, out);
    for (int r = 0; r < kLongRows; ++r) sink(0, row + r, out[r]);
  }
  for (; row < rows.end; ++row) {
    const W* const one[1] = {w + row * m.stride};
    float out[1];
    dot_rows<1>(one, pairs, m.cols, out);
    sink(0, row, out[0]);
  }
}

// The same rows of two plain matrices that are kept alike, as two streams: sink(slot, row, a's, b's).
// False, and nothing done, where dot_rows cannot.
template <class W, class Sink>
D3RT_INLINE bool both_rows_dot(const Matrix& a, const Matrix& b, const Input& in, int B, Range rows,
                               const Sink& sink) {
  const W *wa = static_cast<const W*>(a.data), *wb = static_cast<const W*>(b.data);
#if defined(D3RT_BF16_PRODUCTS)
  if constexpr (std::is_same_v<W, bf16>) {
    if (slots_at_once(B) < B || !all_near(slots_at_once(B), a.cols)) return false;
    both_halves_dot(wa, a.stride, wb, b.stride, a.cols, in.rounded, B, rows.begin, rows.end, sink);
    return true;
  }
#endif
  const float* pairs = pairs_for<W>(a, in, B);
  if (!pairs) return false;
  constexpr int kHalf = kLongRows / 2;
  int64_t row = rows.begin;
  for (; a.cols > kLongRow && row + kHalf <= rows.end; row += kHalf) {
    const W* some[kLongRows];
    float out[kLongRows];
    for (int r = 0; r < kHalf; ++r)
      some[r] = wa + (row + r) * a.stride, some[kHalf + r] = wb + (row + r) * b.stride;
    dot_rows<kLongRows>(some, pairs, a.cols, out);
    for (int r = 0; r < kHalf; ++r) sink(0, row + r, out[r], out[kHalf + r]);
  }
  for (; row < rows.end; ++row) {
    const W* const two[2] = {wa + row * a.stride, wb + row * b.stride};
    float out[2];
    dot_rows<2>(two, pairs, a.cols, out);
    sink(0, row, out[0], out[1]);
  }
  return true;
}
template <class Sink>
D3RT_INLINE bool both_rows_dot(const Matrix& a, const Matrix& b, const Input& in, int B, Range rows,
                               const Sink& sink) {
  switch (a.store) {
    case Store::f32:
      return both_rows_dot<float>(a, b, in, B, rows, sink);
    case Store::bf16:
      return both_rows_dot<bf16>(a, b, in, B, rows, sink);
    case Store::f16:
      return both_rows_dot<f16>(a, b, in, B, rows, sink);
    default:
      return false;
  }
}

// Calls sink(slot, row, value) once for each slot and each row of these granules.
template <class Sink>
D3RT_INLINE void rows_dot(const Matrix& m, const Input& in, int B, Range part, const Sink& sink) {
  switch (m.store) {
    case Store::f32:
      if (const float* pairs = m.cols > kLongRow ? pairs_for<float>(m, in, B) : nullptr)
        return long_rows_dot<float>(m, pairs, part, sink);
      return rows_dot_typed<float>(m, in.x, in.stride, B, part, sink);
    case Store::bf16:
#if defined(D3RT_BF16_PRODUCTS)
      return halves_dot(static_cast<const bf16*>(m.data), m.stride, m.cols, in.rounded, B, part.begin,
                        part.end, sink);
#else
      if (in.pairs && m.cols > kLongRow) return long_rows_dot<bf16>(m, in.pairs, part, sink);
      if (in.pairs) {
        for (int64_t row = part.begin; row < part.end; ++row)
          sink(0, row, dot_pairs(static_cast<const bf16*>(m.data) + row * m.stride, in.pairs, m.cols));
        return;
      }
      return rows_dot_typed<bf16>(m, in.x, in.stride, B, part, sink);
#endif
    case Store::f16:
      if (const float* pairs = m.cols > kLongRow ? pairs_for<f16>(m, in, B) : nullptr)
        return long_rows_dot<f16>(m, pairs, part, sink);
      return rows_dot_typed<f16>(m, in.x, in.stride, B, part, sink);
    case Store::int8:
      return packed_dot<Store::int8>(m, in.quantised, B, part.begin, part.end, sink);
    case Store::int4:
      return packed_dot<Store::int4>(m, in.quantised, B, part.begin, part.end, sink);
  }
}

// The part of a range over several matrices laid end to end that falls on the one of `size` granules at
// `offset`.
D3RT_INLINE Range clip(Range range, int64_t offset, int64_t size) {
  const int64_t begin = range.begin - offset, end = range.end - offset;
  return {begin < 0 ? 0 : begin, end > size ? size : end};
}

// Prefetches the start of each of these matrices' part of the range.
D3RT_INLINE void warm(const Matrix* matrices, int count, Range range) {
  int64_t offset = 0;
  for (int i = 0; i < count; ++i) {
    warm(matrices[i], clip(range, offset, granules(matrices[i])));
    offset += granules(matrices[i]);
  }
}

// out[b] = x[b] / rms(x[b]) * weight, rms(x) = sqrt(mean(x^2) + eps)  (Zhang & Sennrich 2019, arXiv
// 1910.07467)
D3RT_INLINE void rms_norm(float* out, const float* x, const float* weight, float eps, int64_t n) {
  constexpr int kN = Vec::kLanes;
  const float inverse = 1.0f / sqrtf(dot(x, x, n) / static_cast<float>(n) + eps);
  const Vec scale = set1(inverse);
  int64_t i = 0;
  for (; i + kN <= n; i += kN) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
  const int rest = static_cast<int>(n - i);
  if (rest) {
    const Vec value = mul(mul(load_partial(x + i, rest), scale), load_partial(weight + i, rest));
    store_partial(out + i, value, rest);
  }
}

// Floats of scratch that norm_input takes of each thread.
D3RT_INLINE int64_t norm_scratch(int64_t B, int64_t D) { return B * D + prepared_floats(B, D); }

// RMSNorm(x) [B, D] for products with these matrices, made by every thread for itself: cheaper than a
// barrier.
D3RT_INLINE Input norm_input(float* own, const float* x, const float* norm, float eps, int B, int64_t D,
                             const Matrix* matrices, int count) {
  for (int b = 0; b < B; ++b) rms_norm(own + b * D, x + b * D, norm, eps, D);
  return prepare(own + B * D, own, B, D, matrices, count);
}

}  // namespace d3rt::cpu::D3RT_ISA
