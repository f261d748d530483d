// What attention multiplies: queries with keys, and the softmax's weights with values, for every type of
// cache.
#pragma once

#include "kv_line.h"

namespace d3rt::cpu::D3RT_ISA {

constexpr int kQueryGroup = 8;  // query heads that share one pass over a chunk's K,V

// Query heads whose products with K and V are summed side by side, so that each key and value is loaded and
// widened once for all of them: as many as the registers hold.
#if defined(D3RT_AVX512) || defined(D3RT_NEON)
constexpr int kQueryTile = 4;
#else
constexpr int kQueryTile = 2;
#endif

// Largest head_dim whose queries are put into the order of pairs (vec.h).
constexpr int kMostPaired = 256;
D3RT_INLINE bool in_pairs(int d) { return d % (2 * Vec::kLanes) == 0 && d <= kMostPaired; }

// scores[q * kAttentionChunk + t] = q . K[t] for NQ queries and four positions. Four at a time: their
// horizontal sums cost little more than one. kPairs: in_pairs(d), and q is in the order of pairs.
template <int NQ, bool kPairs, class C>
D3RT_INLINE void products_of_four(const C* k, int64_t pos_stride, const float* q, int d, float* scores) {
  constexpr int kN = Vec::kLanes;
  Vec acc[NQ][4];
  for (int h = 0; h < NQ; ++h)
    for (int t = 0; t < 4; ++t) acc[h][t] = set1(0);
  if (kPairs) {
    for (int i = 0; i < d; i += 2 * kN) {
      Pair query[NQ];
      for (int h = 0; h < NQ; ++h) query[h] = {load(q + h * d + i), load(q + h * d + i + kN)};
      for (int t = 0; t < 4; ++t) {
        const Pair key = load_pair_once(k + t * pos_stride + i);
        for (int h = 0; h < NQ; ++h)
          acc[h][t] = fma(key.second, query[h].second, fma(key.first, query[h].first, acc[h][t]));
      }
    }
  } else {
    int i = 0;
    for (; i + kN <= d; i += kN)
      for (int t = 0; t < 4; ++t) {
        const Vec key = load(k + t * pos_stride + i);
        for (int h = 0; h < NQ; ++h) acc[h][t] = fma(key, load(q + h * d + i), acc[h][t]);
      }
    const int rest = d - i;
    for (int t = 0; rest && t < 4; ++t) {
      const Vec key = load_partial(k + t * pos_stride + i, rest);
      for (int h = 0; h < NQ; ++h) acc[h][t] = fma(key, load_partial(q + h * d + i, rest), acc[h][t]);
    }
  }
  for (int h = 0; h < NQ; ++h) sum4(acc[h][0], acc[h][1], acc[h][2], acc[h][3], scores + h * kAttentionChunk);
}

// What the queries of a group and their probabilities are multiplied as with a cache of C, if in_pairs(d).
// bf16: both are rounded to it, as flash attention does on GPUs and torch's in the prefill; sums stay in
// float32. int16: int8 codes meet whole numbers, of which the largest in size is 32767, and a scale that is
// multiplied in afterwards; sums are exact, for up to 512 dimensions or positions.
template <class C>
struct MultipliedAs {
  using type = float;
};
#if defined(D3RT_BF16_PRODUCTS)
template <>
struct MultipliedAs<bf16> {
  using type = bf16;
};
#endif
#if defined(D3RT_INT16_PRODUCTS)
template <>
struct MultipliedAs<int8_t> {
  using type = int16_t;
};
static_assert(kMostPaired <= 512 && kAttentionChunk <= 512, "or sums of int16 products leave int32");
#endif

template <int NQ, bool kPairs, class C, class M>
D3RT_INLINE void products_of_four(const C* k, int64_t pos_stride, const M* q, int d, float* scores) {
  using Several = typename Factors<M>::Several;
  typename Factors<M>::Sum acc[NQ][4] = {};
  for (int i = 0; i < d; i += Several::kCount) {
    Several query[NQ];
    for (int h = 0; h < NQ; ++h) query[h] = load_factors(q + h * d + i);
    for (int t = 0; t < 4; ++t) {
      const Several key = load_factors(k + t * pos_stride + i);
      for (int h = 0; h < NQ; ++h) acc[h][t] = add_products(acc[h][t], key, query[h]);
    }
  }
  for (int h = 0; h < NQ; ++h)
    sum4(floats_of(acc[h][0]), floats_of(acc[h][1]), floats_of(acc[h][2]), floats_of(acc[h][3]),
         scores + h * kAttentionChunk);
}

// One query and one position. ready: see products.
template <class C>
D3RT_INLINE float product(const C* k, const float* q, const float*, int d) {
  return dot(k, q, d);
}
template <class C, class M>
D3RT_INLINE float product(const C* k, const float* q, const M* ready, int d) {
  if (!ready) return dot(k, q, d);
  using Several = typename Factors<M>::Several;
  typename Factors<M>::Sum acc = {};
  for (int i = 0; i < d; i += Several::kCount)
    acc = add_products(acc, load_factors(k + i), load_factors(ready + i));
  return sum(floats_of(acc));
}

// What a pass over a chunk's positions prefetches on its way: for each of them, as much of what is read next.
// Evenly, because memory that is asked for in bursts stands still in between.
struct Ahead {
  const void* p;
  int64_t bytes;  // a position
  int positions;
};
D3RT_INLINE void prefetch_positions(const Ahead& ahead, int first, int count) {
  if (first + count > ahead.positions) count = ahead.positions - first;
  prefetch_lines(static_cast<const char*>(ahead.p) + first * ahead.bytes, count * ahead.bytes);
}

// The same for all of a chunk's positions; the last ones, if they are not four, one by one. ready: q as
// make_ready leaves it, or null.
template <int NQ, class C, class M>
D3RT_INLINE void products(const C* k, int64_t pos_stride, const float* q, const M* ready, int d,
                          int positions, const Ahead& ahead, float (*scores)[kAttentionChunk]) {
  int t = 0;
  if (ready)
    for (; t + 4 <= positions; t += 4) {
      prefetch_positions(ahead, t, 4);
      products_of_four<NQ, true>(k + t * pos_stride, pos_stride, ready, d, scores[0] + t);
    }
  else
    for (; t + 4 <= positions; t += 4) {
      prefetch_positions(ahead, t, 4);
      products_of_four<NQ, false>(k + t * pos_stride, pos_stride, q, d, scores[0] + t);
    }
  prefetch_positions(ahead, t, positions - t);
  for (; t < positions; ++t)
    for (int h = 0; h < NQ; ++h)
      scores[h][t] = product(k + t * pos_stride, q + h * d, ready ? ready + h * d : nullptr, d);
}

// out[q][column] = sum over positions of weights[q][t] * V[t][column], for NQ queries and NC vectors of
// columns (the last of which may be cut short): all sums stay in registers.
template <int NQ, int NC, class C>
D3RT_INLINE void weigh_columns(const C* v, int64_t pos_stride, int positions, const Ahead& ahead,
                               float (*weights)[kAttentionChunk], int columns, float* out,
                               int64_t out_stride) {
  constexpr int kN = Vec::kLanes;
  Vec acc[NQ][NC];
  for (int h = 0; h < NQ; ++h)
    for (int c = 0; c < NC; ++c) acc[h][c] = set1(0);
  const int last = columns - (NC - 1) * kN;
  for (int t = 0; t < positions; ++t) {
    const C* row = v + t * pos_stride;
    prefetch_positions(ahead, t, 1);
    for (int c = 0; c < NC; ++c) {
      const Vec value = c < NC - 1 || last == kN ? load(row + c * kN) : load_partial(row + c * kN, last);
      for (int h = 0; h < NQ; ++h) acc[h][c] = fma(set1(weights[h][t]), value, acc[h][c]);
    }
  }
  for (int h = 0; h < NQ; ++h)
    for (int c = 0; c < NC; ++c) {
      float* at = out + h * out_stride + c * kN;
      if (c < NC - 1 || last == kN)
        store(at, acc[h][c]);
      else
        store_partial(at, acc[h][c], last);
    }
}

// The same for NP pairs of vectors of columns from column `first` on.
template <int NQ, int NP, class C>
D3RT_INLINE void weigh_pairs(const C* v, int64_t pos_stride, int positions, const Ahead& ahead,
                             float (*weights)[kAttentionChunk], int first, float* out, int64_t out_stride) {
  constexpr int kN = Vec::kLanes;
  Pair acc[NQ][NP];
  for (int h = 0; h < NQ; ++h)
    for (int c = 0; c < NP; ++c) acc[h][c] = {set1(0), set1(0)};
  for (int t = 0; t < positions; ++t) {
    const C* row = v + t * pos_stride + first;
    prefetch_positions(ahead, t, 1);
    Vec weight[NQ];
    for (int h = 0; h < NQ; ++h) weight[h] = set1(weights[h][t]);
    for (int c = 0; c < NP; ++c) {
      const Pair value = load_pair_once(row + 2 * c * kN);
      for (int h = 0; h < NQ; ++h) {
        acc[h][c].first = fma(weight[h], value.first, acc[h][c].first);
        acc[h][c].second = fma(weight[h], value.second, acc[h][c].second);
      }
    }
  }
  for (int h = 0; h < NQ; ++h)
    for (int c = 0; c < NP; ++c) {
      store_pair(out + h * out_stride + first + 2 * c * kN, acc[h][c], v);
    }
}

// The same for weights of 16 bits: two positions at a time, of which the second is zeros after the last of an
// odd number; so is its weight.
template <int NQ, int NP, class C, class M>
D3RT_INLINE void weigh_pairs(const C* v, int64_t pos_stride, int positions, const Ahead& ahead,
                             M (*weights)[kAttentionChunk], int first, float* out, int64_t out_stride) {
  using Several = typename Factors<M>::Several;
  using Sum = typename Factors<M>::Sum;
  alignas(64) static constexpr C kZeros[NP * Several::kCount] = {};
  Sum some_acc[NQ][NP] = {}, other_acc[NQ][NP] = {};
  for (int t = 0; t < positions; t += 2) {
    const C* row = v + t * pos_stride + first;
    const C* second = t + 1 < positions ? row + pos_stride : kZeros;
    prefetch_positions(ahead, t, 2);
    Several weight[NQ];
    for (int h = 0; h < NQ; ++h) weight[h] = repeat_two(&weights[h][t]);
    for (int c = 0; c < NP; ++c) {
      Several some, others;
      zip(load_factors(row + c * Several::kCount), load_factors(second + c * Several::kCount), &some,
          &others);
      for (int h = 0; h < NQ; ++h) {
        some_acc[h][c] = add_products(some_acc[h][c], some, weight[h]);
        other_acc[h][c] = add_products(other_acc[h][c], others, weight[h]);
      }
    }
  }
  for (int h = 0; h < NQ; ++h)
    for (int c = 0; c < NP; ++c)
      store_zipped(out + h * out_stride + first + c * Several::kCount, floats_of(some_acc[h][c]),
                   floats_of(other_acc[h][c]));
}

// All d columns of out, in pairs if in_pairs(d): weights are then of MultipliedAs<C>.
template <int NQ, class C, class M>
D3RT_INLINE void weigh_in_pairs(const C* v, int64_t pos_stride, int positions, Ahead ahead,
                                M (*weights)[kAttentionChunk], int d, float* out, int64_t out_stride) {
  constexpr int kN = Vec::kLanes;
  int i = 0;
  for (; i + 4 * kN <= d; i += 4 * kN, ahead.positions = 0)
    weigh_pairs<NQ, 2>(v, pos_stride, positions, ahead, weights, i, out, out_stride);
  if (i < d) weigh_pairs<NQ, 1>(v, pos_stride, positions, ahead, weights, i, out, out_stride);
}
template <int NQ, class C>
D3RT_INLINE void weigh_in_columns(const C* v, int64_t pos_stride, int positions, Ahead ahead,
                                  float (*weights)[kAttentionChunk], int d, float* out, int64_t out_stride) {
  constexpr int kN = Vec::kLanes;
  for (int i = 0; i < d; i += 2 * kN, ahead.positions = 0) {
    const int columns = d - i < 2 * kN ? d - i : 2 * kN;
    if (columns > kN)
      weigh_columns<NQ, 2>(v + i, pos_stride, positions, ahead, weights, columns, out + i, out_stride);
    else
      weigh_columns<NQ, 1>(v + i, pos_stride, positions, ahead, weights, columns, out + i, out_stride);
  }
}

// n values, padded to whole vectors, as they are multiplied with a cache of C; what the products are then to
// be multiplied with.
template <class C>
D3RT_INLINE float make_ready(const float* values, int64_t n, const C*, float* out) {
  constexpr int kN = Vec::kLanes;
  for (int64_t i = 0; i < n; i += 2 * kN) {
    const Pair pair = pair_of(values + i, static_cast<const C*>(nullptr));
    store(out + i, pair.first);
    store(out + i + kN, pair.second);
  }
  return 1;
}
#if defined(D3RT_BF16_PRODUCTS)
D3RT_INLINE float make_ready(const float* values, int64_t n, const bf16*, bf16* out) {
  for (int64_t i = 0; i < n; i += Vec::kLanes) store(out + i, load(values + i));
  return 1;
}
#endif
#if defined(D3RT_INT16_PRODUCTS)
// A value that is not finite makes the factor NaN.
D3RT_INLINE float make_ready(const float* values, int64_t n, const int8_t*, int16_t* out) {
  constexpr int kN = Vec::kLanes;
  Vec most = set1(0), nan = set1(0);
  for (int64_t i = 0; i < n; i += kN) {
    const Vec value = load(values + i);
    most = max(max(value, mul(value, set1(-1))), most);
    nan = fma(value, set1(0), nan);
  }
  const float size = largest(most);
  const Vec inverse = set1(size < 1e-34f ? 0.0f : 32767.0f / size);
  for (int64_t i = 0; i < n; i += kN) store(out + i, mul(load(values + i), inverse));
  return size / 32767.0f + sum(nan);
}
#endif

}  // namespace d3rt::cpu::D3RT_ISA
