// halves_dot: products with a bfloat16 matrix where the processor multiplies bfloat16 as they are.
// Activations are rounded to bfloat16, two products go to a lane, sums are float32. Every sum is made in one
// order, however many slots and rows are multiplied at once: a row of a batch gets what it gets alone, bit
// for bit.
#pragma once

#include "vec.h"

namespace d3rt::cpu::D3RT_ISA {
#if defined(D3RT_BF16_PRODUCTS)

// For lambdas that only prefetch: GCC takes a function like that for one without effect, and drops its calls,
// unless it inlines it before it comes to think so.
#define D3RT_AT_ONCE __attribute__((always_inline))

// Bytes of activations that stay in L1 (32 KiB is the least there is) while weights stream past.
constexpr int64_t kNearBytes = 24 * 1024;
// Longer rows come in pieces of so many columns, through so many rows before the next piece.
constexpr int kPiece = 1024, kPieceRows = 16;
// Rows side by side, and how far ahead each is prefetched, in bytes: where memory gives 65 GB/s (Zen 4), 4
// slots lose a fifth of it at 3 or 4 KiB, and 2 slots a tenth at 2 or 3.
template <int NB>
constexpr int kHalfRows = NB > 2 ? 2 : 1;
constexpr int kFarthest = 6144;
template <int NB>
constexpr int kHalvesAhead = NB > 2 ? kFarthest : 1024;

// Slots that are multiplied at once when so many are left: 1, 2, 4 or 8. Those beyond B are zeros.
D3RT_INLINE int slots_at_once(int left) { return left > 4 ? 8 : left > 2 ? 4 : left; }
D3RT_INLINE bool all_near(int slots, int64_t cols) {
  return slots * cols * static_cast<int64_t>(sizeof(bf16)) <= kNearBytes;
}
D3RT_INLINE int64_t in_steps(int64_t cols) {
  return (cols + Halves::kCount - 1) / Halves::kCount * Halves::kCount;
}

// x [B, cols], rounded. Slots that are multiplied at once lie side by side, Halves::kCount columns of each in
// turn, so that they spread over all sets of a cache whatever cols is; rounded_halves (args.h) of memory.
D3RT_INLINE void round_rows(bf16* out, const float* x, int B, int64_t cols) {
  constexpr int kN = Vec::kLanes;
  for (int first = 0; first < B; first += slots_at_once(B - first)) {
    const int slots = slots_at_once(B - first);
    for (int64_t i = 0; i < cols; i += Halves::kCount)
      for (int b = 0; b < slots; ++b, out += Halves::kCount)
        for (int half = 0; half < Halves::kCount; half += kN) {
          const int64_t left = first + b < B ? cols - i - half : 0;
          const float* p = x + (first + b) * cols + i + half;
          store(out + half, left >= kN ? load(p)
                            : left > 0 ? load_partial(p, static_cast<int>(left))
                                       : set1(0));
        }
  }
}

template <int R, int NB>
D3RT_INLINE void add_step(const Halves (&row)[R], const bf16* x, Vec (&acc)[R][NB]) {
  for (int b = 0; b < NB; ++b) {
    const Halves slot = load_factors(x + b * Halves::kCount);
    for (int r = 0; r < R; ++r) acc[r][b] = add_products(acc[r][b], row[r], slot);
  }
}

// acc[r][b] += w[r] . x of slot b, columns begin .. end - 1. prefetched(r, i): asks for what is read after
// column i of row r.
template <int R, int NB, class Prefetch>
D3RT_INLINE void add_halves(const bf16* const (&w)[R], const bf16* x, int64_t begin, int64_t end,
                            const Prefetch& prefetched, Vec (&acc)[R][NB]) {
  int64_t i = begin;
  for (; i + Halves::kCount <= end; i += Halves::kCount) {
    for (int r = 0; r < R; ++r) prefetched(r, i);
    Halves row[R];
    for (int r = 0; r < R; ++r) row[r] = load_factors(w[r] + i);
    add_step<R, NB>(row, x + i * NB, acc);
  }
  if (i < end) {
    Halves row[R];
    for (int r = 0; r < R; ++r) row[r] = load_partial_factors(w[r] + i, static_cast<int>(end - i));
    add_step<R, NB>(row, x + i * NB, acc);
  }
}

// The sums of up to four slots or rows.
template <int N>
D3RT_INLINE void sum_few(const Vec* acc, float* out) {
  float sums[4];
  sum4(acc[0], acc[1 % N], acc[2 % N], acc[3 % N], sums);
  for (int i = 0; i < N; ++i) out[i] = sums[i];
}

// Whole rows, side by side: out[r][b].
template <int R, int NB>
D3RT_INLINE void halves_tile(const bf16* const (&w)[R], const bf16* x, int64_t cols, float (&out)[R][NB]) {
  Vec acc[R][NB];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < NB; ++b) acc[r][b] = set1(0);
  add_halves<R, NB>(
      w, x, 0, cols, [&](int r, int64_t i) D3RT_AT_ONCE { prefetch<64>(w[r] + i, kHalvesAhead<NB>); }, acc);
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < NB; b += 4) sum_few<(NB < 4 ? NB : 4)>(acc[r] + b, out[r] + b);
}

// kPieceRows rows of which only some (count) are wanted, a piece of columns after the other: out[r][b].
template <int NB>
D3RT_INLINE void halves_pieces(const bf16* w, int64_t stride, int count, const bf16* x, int64_t cols,
                               float (&out)[kPieceRows][NB]) {
  constexpr int R = 2;
  Vec kept[kPieceRows][NB];
  // Into the second cache what follows these rows, in the order of memory; into the first the next two rows'
  // piece.
  const bf16* after = w;
  const int64_t block = count * stride * static_cast<int64_t>(sizeof(bf16));
  for (int64_t begin = 0; begin < cols; begin += kPiece) {
    const int64_t end = begin + kPiece < cols ? begin + kPiece : cols;
    for (int row = 0; row < count; row += R) {
      const bf16* const two[R] = {w + row * stride, w + (row + 1 < count ? row + 1 : row) * stride};
      Vec acc[R][NB];
      for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b) acc[r][b] = begin == 0 ? set1(0) : kept[row + r][b];
      add_halves<R, NB>(
          two, x, begin, end,
          [&](int r, int64_t i) D3RT_AT_ONCE {
            prefetch<64>(after, block);
            after += Halves::kCount;
            prefetch<64, kFirstCache>(two[r] + i, R * stride * static_cast<int64_t>(sizeof(bf16)));
          },
          acc);
      for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b) kept[row + r][b] = acc[r][b];
    }
  }
  for (int row = 0; row < count; ++row)
    for (int b = 0; b < NB; b += 4) sum_few<(NB < 4 ? NB : 4)>(kept[row] + b, out[row] + b);
}

// Rows begin .. end - 1 with NB slots, of which `slots` are wanted: sink(first_slot + b, row, value).
template <int NB, class Sink>
D3RT_INLINE void halves_rows(const bf16* w, int64_t stride, int64_t cols, const bf16* x, int first_slot,
                             int slots, int64_t begin, int64_t end, const Sink& sink) {
  constexpr int R = kHalfRows<NB>;
  if (!all_near(NB, cols)) {
    for (int64_t row = begin; row < end; row += kPieceRows) {
      const int count = end - row < kPieceRows ? static_cast<int>(end - row) : kPieceRows;
      float out[kPieceRows][NB];
      halves_pieces<NB>(w + row * stride, stride, count, x, cols, out);
      for (int r = 0; r < count; ++r)
        for (int b = 0; b < slots; ++b) sink(first_slot + b, row + r, out[r][b]);
    }
    return;
  }
  for (int64_t row = begin; row < end; row += R) {
    const bf16* some[R];
    for (int r = 0; r < R; ++r) some[r] = w + (row + r < end ? row + r : end - 1) * stride;
    float out[R][NB];
    halves_tile<R, NB>(some, x, cols, out);
    for (int r = 0; r < R && row + r < end; ++r)
      for (int b = 0; b < slots; ++b) sink(first_slot + b, row + r, out[r][b]);
  }
}

// sink(slot, row, value) for every slot and rows begin .. end - 1. x: as round_rows leaves it.
template <class Sink>
D3RT_INLINE void halves_dot(const bf16* w, int64_t stride, int64_t cols, const bf16* x, int B, int64_t begin,
                            int64_t end, const Sink& sink) {
  // More slots than go at once: rows that stay in the second cache while these pass over them.
  const int64_t fit = 128 * 1024 / (cols * static_cast<int64_t>(sizeof(bf16))) / kPieceRows * kPieceRows;
  const int64_t block = B <= 8 ? end - begin : fit > kPieceRows ? fit : kPieceRows;
  for (int64_t row = begin; row < end; row += block) {
    const int64_t last = row + block < end ? row + block : end;
    for (int b = 0; b < B; b += slots_at_once(B - b)) {
      const bf16* slots = x + b * in_steps(cols);
      const int wanted = B - b < 8 ? B - b : 8;
      switch (slots_at_once(B - b)) {
        case 1:
          halves_rows<1>(w, stride, cols, slots, b, wanted, row, last, sink);
          break;
        case 2:
          halves_rows<2>(w, stride, cols, slots, b, wanted, row, last, sink);
          break;
        case 4:
          halves_rows<4>(w, stride, cols, slots, b, wanted, row, last, sink);
          break;
        default:
          halves_rows<8>(w, stride, cols, slots, b, wanted, row, last, sink);
      }
    }
  }
}

// The same rows of two matrices, as two streams: sink(slot, row, a's, b's). For as many slots as go at once.
template <int NB, class Sink>
D3RT_INLINE void both_halves_rows(const bf16* wa, int64_t a_stride, const bf16* wb, int64_t b_stride,
                                  int64_t cols, const bf16* x, int slots, int64_t begin, int64_t end,
                                  const Sink& sink) {
  for (int64_t row = begin; row < end; ++row) {
    const bf16* const two[2] = {wa + row * a_stride, wb + row * b_stride};
    float out[2][NB];
    halves_tile<2, NB>(two, x, cols, out);
    for (int b = 0; b < slots; ++b) sink(b, row, out[0][b], out[1][b]);
  }
}
template <class Sink>
D3RT_INLINE void both_halves_dot(const bf16* wa, int64_t a_stride, const bf16* wb, int64_t b_stride,
                                 int64_t cols, const bf16* x, int B, int64_t begin, int64_t end,
                                 const Sink& sink) {
  switch (slots_at_once(B)) {
    case 1:
      return both_halves_rows<1>(wa, a_stride, wb, b_stride, cols, x, B, begin, end, sink);
    case 2:
      return both_halves_rows<2>(wa, a_stride, wb, b_stride, cols, x, B, begin, end, sink);
    case 4:
      return both_halves_rows<4>(wa, a_stride, wb, b_stride, cols, x, B, begin, end, sink);
    default:
      return both_halves_rows<8>(wa, a_stride, wb, b_stride, cols, x, B, begin, end, sink);
  }
}

#endif
}  // namespace d3rt::cpu::D3RT_ISA
