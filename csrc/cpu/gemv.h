// rows_dot: the weight-streaming product under every op. out[b][row] = dot(w[row], x[b]) for a range of rows.
// Each weight is read once for up to kBatchTile slots; a thread walks its rows in order, so it reads one
// stream.
#pragma once

#include "vec.h"

namespace d3rt::cpu::D3RT_ISA {

constexpr int kBatchTile = 4;

struct Range {
  int64_t begin, end;
};
// The share of `total` items that thread `thread` of `num_threads` takes: sizes differ by at most one.
D3RT_INLINE Range share(int64_t total, int thread, int num_threads) {
  return {total * thread / num_threads, total * (thread + 1) / num_threads};
}

// One row, one slot: four accumulators hide the latency of fma.
template <class W>
D3RT_INLINE float dot(const W* w, const float* x, int64_t n) {
  constexpr int kN = Vec::kLanes;
  Vec a0 = set1(0), a1 = set1(0), a2 = set1(0), a3 = set1(0);
  int64_t i = 0;
  for (; i + 4 * kN <= n; i += 4 * kN) {
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

// Two rows, NB slots at x, x + x_stride, ...: 2 * NB accumulators, each weight loaded and widened once.
template <int NB, class W>
D3RT_INLINE void dot_tile(const W* w0, const W* w1, const float* x, int64_t x_stride, int64_t n,
                          float (&out)[2][NB]) {
  constexpr int kN = Vec::kLanes;
  Vec acc[2][NB];
  for (int b = 0; b < NB; ++b) acc[0][b] = acc[1][b] = set1(0);
  int64_t i = 0;
  for (; i + kN <= n; i += kN) {
    const Vec v0 = load(w0 + i), v1 = load(w1 + i);
    for (int b = 0; b < NB; ++b) {
      const Vec xv = load(x + b * x_stride + i);
      acc[0][b] = fma(v0, xv, acc[0][b]);
      acc[1][b] = fma(v1, xv, acc[1][b]);
    }
  }
  const int rest = static_cast<int>(n - i);
  if (rest) {
    const Vec v0 = load_partial(w0 + i, rest), v1 = load_partial(w1 + i, rest);
    for (int b = 0; b < NB; ++b) {
      const Vec xv = load_partial(x + b * x_stride + i, rest);
      acc[0][b] = fma(v0, xv, acc[0][b]);
      acc[1][b] = fma(v1, xv, acc[1][b]);
    }
  }
  for (int b = 0; b < NB; ++b) out[0][b] = sum(acc[0][b]), out[1][b] = sum(acc[1][b]);
}

template <int NB, class W, class Sink>
D3RT_INLINE void rows_dot_tile(const W* w, int64_t stride, const float* x, int64_t x_stride, int64_t n,
                               int first_slot, Range rows, const Sink& sink) {
  for (int64_t row = rows.begin; row < rows.end; row += 2) {
    const bool pair = row + 1 < rows.end;
    float out[2][NB];
    dot_tile<NB>(w + row * stride, w + (pair ? row + 1 : row) * stride, x, x_stride, n, out);
    for (int b = 0; b < NB; ++b) {
      sink(first_slot + b, row, out[0][b]);
      if (pair) sink(first_slot + b, row + 1, out[1][b]);
    }
  }
}

// Calls sink(slot, row, value) once for each slot and each row of `rows`. x: [B, n], rows of it x_stride
// apart.
template <class W, class Sink>
D3RT_INLINE void rows_dot_typed(const Matrix& m, const float* x, int64_t x_stride, int B, Range rows,
                                const Sink& sink) {
  const W* w = static_cast<const W*>(m.data);
  if (B == 1) {
    for (int64_t row = rows.begin; row < rows.end; ++row) sink(0, row, dot(w + row * m.stride, x, m.cols));
    return;
  }
  // Blocks of rows small enough to stay in L1 while the slots pass over them, tile by tile.
  int64_t block = 16384 / (m.cols * static_cast<int64_t>(sizeof(W)));
  block = block < 2 ? 2 : block & ~int64_t{1};
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

template <class Sink>
D3RT_INLINE void rows_dot(const Matrix& m, const float* x, int64_t x_stride, int B, Range rows,
                          const Sink& sink) {
  if (m.store == Store::f32)
    rows_dot_typed<float>(m, x, x_stride, B, rows, sink);
  else
    rows_dot_typed<bf16>(m, x, x_stride, B, rows, sink);
}

// The part of `rows` (a range over several matrices laid end to end) that falls on the matrix starting at
// `offset`.
D3RT_INLINE Range clip(Range rows, int64_t offset, int64_t size) {
  const int64_t begin = rows.begin - offset, end = rows.end - offset;
  return {begin < 0 ? 0 : begin, end > size ? size : end};
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

}  // namespace d3rt::cpu::D3RT_ISA
