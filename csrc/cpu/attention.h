// attention: one query per slot over its cached positions, grouped heads, split over chunks of positions.
// Phase 0: each (slot, K,V head, chunk) gives, per query head, a maximum, a sum and a weighted V (online
// softmax, Milakov & Gimelshein 2018, arXiv 1805.02867; split over K,V as in Flash-Decoding). Phase 1 joins
// the chunks in order. Scratch: [B, H, chunks, d + 2] with chunks = ceil(S / kAttentionChunk).
#pragma once

#include <type_traits>

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
// float32.
template <class C>
struct MultipliedAs {
  using type = float;
};
#if defined(D3RT_BF16_PRODUCTS)
template <>
struct MultipliedAs<bf16> {
  using type = bf16;
};

template <int NQ, bool kPairs>
D3RT_INLINE void products_of_four(const bf16* k, int64_t pos_stride, const bf16* q, int d, float* scores) {
  Vec acc[NQ][4];
  for (int h = 0; h < NQ; ++h)
    for (int t = 0; t < 4; ++t) acc[h][t] = set1(0);
  for (int i = 0; i < d; i += Halves::kCount) {
    Halves query[NQ];
    for (int h = 0; h < NQ; ++h) query[h] = load_halves(q + h * d + i);
    for (int t = 0; t < 4; ++t) {
      const Halves key = load_halves(k + t * pos_stride + i);
      for (int h = 0; h < NQ; ++h) acc[h][t] = add_products(acc[h][t], key, query[h]);
    }
  }
  for (int h = 0; h < NQ; ++h) sum4(acc[h][0], acc[h][1], acc[h][2], acc[h][3], scores + h * kAttentionChunk);
}
#endif

// One query and one position. ready: see products.
template <class C>
D3RT_INLINE float product(const C* k, const float* q, const float*, int d) {
  return dot(k, q, d);
}
#if defined(D3RT_BF16_PRODUCTS)
D3RT_INLINE float product(const bf16* k, const float* q, const bf16* ready, int d) {
  if (!ready) return dot(k, q, d);
  Vec acc = set1(0);
  for (int i = 0; i < d; i += Halves::kCount)
    acc = add_products(acc, load_halves(k + i), load_halves(ready + i));
  return sum(acc);
}
#endif

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

// scores[h][t] *= scale, and the scale of line t of an int8 cache.
template <class C>
D3RT_INLINE void multiply_scales(const C*, int64_t, int positions, int, int queries, float scale,
                                 float (*scores)[kAttentionChunk]) {
  constexpr int kN = Vec::kLanes;
  for (int h = 0; h < queries; ++h) {
    int t = 0;
    for (; t + kN <= positions; t += kN) store(scores[h] + t, mul(load(scores[h] + t), set1(scale)));
    for (; t < positions; ++t) scores[h][t] *= scale;
  }
}
D3RT_INLINE void multiply_scales(const int8_t* lines, int64_t pos_stride, int positions, int d, int queries,
                                 float scale, float (*scores)[kAttentionChunk]) {
  constexpr int kN = Vec::kLanes;
  alignas(64) float scales[kAttentionChunk];
  for (int t = 0; t < positions; ++t) scales[t] = line_scale(lines + t * pos_stride, d) * scale;
  for (int h = 0; h < queries; ++h) {
    int t = 0;
    for (; t + kN <= positions; t += kN) store(scores[h] + t, mul(load(scores[h] + t), load(scales + t)));
    for (; t < positions; ++t) scores[h][t] *= scales[t];
  }
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

#if defined(D3RT_BF16_PRODUCTS)
// Two positions at a time, of which the second is zeros after the last of an odd number; so is its weight.
template <int NQ, int NP>
D3RT_INLINE void weigh_pairs(const bf16* v, int64_t pos_stride, int positions, const Ahead& ahead,
                             bf16 (*weights)[kAttentionChunk], int first, float* out, int64_t out_stride) {
  alignas(64) static constexpr bf16 kZeros[NP * Halves::kCount] = {};
  Pair acc[NQ][NP];
  for (int h = 0; h < NQ; ++h)
    for (int c = 0; c < NP; ++c) acc[h][c] = {set1(0), set1(0)};
  for (int t = 0; t < positions; t += 2) {
    const bf16* row = v + t * pos_stride + first;
    const bf16* second = t + 1 < positions ? row + pos_stride : kZeros;
    prefetch_positions(ahead, t, 2);
    Halves weight[NQ];
    for (int h = 0; h < NQ; ++h) weight[h] = repeat_two(&weights[h][t]);
    for (int c = 0; c < NP; ++c) {
      Halves some, others;
      zip(load_halves(row + c * Halves::kCount), load_halves(second + c * Halves::kCount), &some, &others);
      for (int h = 0; h < NQ; ++h) {
        acc[h][c].first = add_products(acc[h][c].first, some, weight[h]);
        acc[h][c].second = add_products(acc[h][c].second, others, weight[h]);
      }
    }
  }
  for (int h = 0; h < NQ; ++h)
    for (int c = 0; c < NP; ++c)
      store_zipped(out + h * out_stride + first + c * Halves::kCount, acc[h][c].first, acc[h][c].second);
}
#endif

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

// The largest of n values; when some are NaN, any of the others or NaN.
D3RT_INLINE float largest(const float* values, int n) {
  constexpr int kN = Vec::kLanes;
  float found = values[0];
  int i = 0;
  if (n >= kN) {
    Vec most = load(values);
    for (i = kN; i + kN <= n; i += kN) most = max(most, load(values + i));
    found = largest(most);
  }
  for (; i < n; ++i) found = values[i] > found ? values[i] : found;
  return found;
}

// Queries [count, d] as they are multiplied with a cache of C, if in_pairs(d): in the order of its pairs, or
// rounded.
template <class C>
D3RT_INLINE void make_ready(const float* q, int count, int d, const C*, float* out) {
  constexpr int kN = Vec::kLanes;
  for (int64_t i = 0; i < static_cast<int64_t>(count) * d; i += 2 * kN) {
    const Pair pair = pair_of(q + i, static_cast<const C*>(nullptr));
    store(out + i, pair.first);
    store(out + i + kN, pair.second);
  }
}
#if defined(D3RT_BF16_PRODUCTS)
D3RT_INLINE void round_all(const float* values, int64_t n, bf16* out) {
  for (int64_t i = 0; i < n; i += Vec::kLanes) store(out + i, load(values + i));
}
D3RT_INLINE void make_ready(const float* q, int count, int d, const bf16*, bf16* out) {
  round_all(q, static_cast<int64_t>(count) * d, out);
}
#endif

template <int kCount>
struct QueryTile {
  static constexpr int kQueries = kCount;
};
// Calls work(QueryTile<n>, h) for as many tiles of n queries from h on as `queries` need.
template <class Work>
D3RT_INLINE void for_query_tiles(int queries, const Work& work) {
  for (int h = 0; h < queries; h += kQueryTile) switch (queries - h) {
      case 1:
        work(QueryTile<1>{}, h);
        break;
      case 2:
        work(QueryTile<2>{}, h);
        break;
      case 3:
        work(QueryTile<(kQueryTile > 3 ? 3 : 2)>{}, h);
        break;
      default:
        work(QueryTile<kQueryTile>{}, h);
    }
}

// Some positions of one head: where they begin in the cache, in elements, and how many.
struct Span {
  int64_t at;
  int positions;
};

// ready: q as make_ready leaves it, used if in_pairs(d). partial: d values, then maximum, then sum; one per
// query head of the group. next: what is read after this.
template <class C>
D3RT_INLINE void attend_chunk(const AttentionArgs& a, Span span, Span next, const float* q, const void* ready,
                              int queries, float* partial, int64_t partial_stride) {
  constexpr int kN = Vec::kLanes;
  using M = typename MultipliedAs<C>::type;
  const C* k = static_cast<const C*>(a.cache.k) + span.at;
  const C* v = static_cast<const C*>(a.cache.v) + span.at;
  const int positions = span.positions;
  const int64_t pos_stride = a.cache.pos_stride;
  const int d = a.d;
  alignas(64) float scores[kQueryGroup][kAttentionChunk];
  // V's lines come while K is multiplied, those of the next K while V is weighed.
  const int64_t bytes = pos_stride * static_cast<int64_t>(sizeof(C));
  Ahead ahead = {v, bytes, positions};
  for_query_tiles(queries, [&](auto tile, int h) {
    const M* some = in_pairs(d) ? static_cast<const M*>(ready) + h * d : nullptr;
    products<tile.kQueries>(k, pos_stride, q + h * d, some, d, positions, ahead, scores + h);
    ahead.positions = 0;
  });
  multiply_scales(k, pos_stride, positions, d, queries, a.scale, scores);

  for (int h = 0; h < queries; ++h) {
    float* out = partial + h * partial_stride;
    const float maximum = largest(scores[h], positions);
    Vec total = set1(0);
    int t = 0;
    for (; t + kN <= positions; t += kN) {
      const Vec weight = exp(add(load(scores[h] + t), set1(-maximum)));
      store(scores[h] + t, weight);
      total = add(total, weight);
    }
    float sum_of_weights = sum(total);
    const int rest = positions - t;
    if (rest) {
      store_partial(scores[h] + t, exp(add(load_partial(scores[h] + t, rest), set1(-maximum))), rest);
      for (; t < positions; ++t) sum_of_weights += scores[h][t];
    }
    out[d] = maximum;
    out[d + 1] = sum_of_weights;
  }
  if (sizeof(C) == 1) multiply_scales(v, pos_stride, positions, d, queries, 1.0f, scores);

  ahead = {static_cast<const C*>(a.cache.k) + next.at, bytes, next.positions};
  const auto weigh = [&](auto weights) {
    for_query_tiles(queries, [&](auto tile, int h) {
      float* out = partial + h * partial_stride;
      weigh_in_pairs<tile.kQueries>(v, pos_stride, positions, ahead, weights + h, d, out, partial_stride);
      ahead.positions = 0;
    });
  };
  if (!in_pairs(d)) {
    for_query_tiles(queries, [&](auto tile, int h) {
      float* out = partial + h * partial_stride;
      weigh_in_columns<tile.kQueries>(v, pos_stride, positions, ahead, scores + h, d, out, partial_stride);
      ahead.positions = 0;
    });
    return;
  }
#if defined(D3RT_BF16_PRODUCTS)
  if constexpr (sizeof(M) == sizeof(bf16)) {
    alignas(64) bf16 weights[kQueryGroup][kAttentionChunk];
    for (int h = 0; h < queries; ++h) {
      for (int t = positions; t % kN; ++t) scores[h][t] = 0;
      round_all(scores[h], positions, weights[h]);
    }
    return weigh(weights);
  }
#endif
  weigh(scores);
}

// out += weight * values
D3RT_INLINE void add_scaled(float* out, const float* values, float weight, int n) {
  constexpr int kN = Vec::kLanes;
  int i = 0;
  for (; i + kN <= n; i += kN) store(out + i, fma(set1(weight), load(values + i), load(out + i)));
  if (i < n)
    store_partial(out + i, fma(set1(weight), load_partial(values + i, n - i), load_partial(out + i, n - i)),
                  n - i);
}

static void attention(const AttentionArgs& a, float* scratch, int phase, const Worker& me) {
  const int64_t chunks = (a.S + kAttentionChunk - 1) / kAttentionChunk, width = a.d + 2;
  const int group = a.H / a.G;
  // Chunks are counted over absolute positions; a window only moves the first one.
  const auto begin_of = [&](int slot) {
    const int length = a.pos[slot] + 1;
    return a.window > 0 && length > a.window ? length - a.window : 0;
  };
  const auto first_chunk = [&](int slot) { return begin_of(slot) / kAttentionChunk; };
  const auto last_chunk = [&](int slot) { return a.pos[slot] / kAttentionChunk; };

  if (phase == 0) {
    const auto span_of = [&](int slot, int head, int chunk) {
      const int begin = begin_of(slot), length = a.pos[slot] + 1;
      const int from = chunk * kAttentionChunk > begin ? chunk * kAttentionChunk : begin;
      const int to = (chunk + 1) * kAttentionChunk < length ? (chunk + 1) * kAttentionChunk : length;
      return Span{head_offset(a.cache, slot, head) + from * a.cache.pos_stride, to - from};
    };
    int64_t units = 0;
    for (int slot = 0; slot < a.B; ++slot) units += (last_chunk(slot) - first_chunk(slot) + 1) * a.G;
    const Range mine = share(units, me);
    int64_t unit = 0;
    alignas(64) float ready[kQueryGroup * kMostPaired];
    const float* made_ready = nullptr;  // which those are: chunk after chunk has the same queries
    for (int slot = 0; slot < a.B; ++slot) {
      for (int head = 0; head < a.G; ++head) {
        for (int chunk = first_chunk(slot); chunk <= last_chunk(slot); ++chunk, ++unit) {
          if (unit < mine.begin || unit >= mine.end) continue;
          const Span span = span_of(slot, head, chunk);
          Span following = {0, 0};
          if (unit + 1 < mine.end && chunk < last_chunk(slot))
            following = span_of(slot, head, chunk + 1);
          else if (unit + 1 < mine.end && head + 1 < a.G)
            following = span_of(slot, head + 1, first_chunk(slot));
          else if (unit + 1 < mine.end && slot + 1 < a.B)
            following = span_of(slot + 1, 0, first_chunk(slot + 1));
          for (int h = 0; h < group; h += kQueryGroup) {
            const int queries = group - h < kQueryGroup ? group - h : kQueryGroup;
            const Span next = h + queries < group ? Span{0, 0} : following;
            const int64_t query = static_cast<int64_t>(slot) * a.H + head * group + h;
            float* partial = scratch + (query * chunks + chunk) * width;
            const float* q = a.q + query * a.d;
            const auto attend = [&](auto of) {  // a null pointer to what the cache is made of
              using C = std::remove_const_t<std::remove_pointer_t<decltype(of)>>;
              if (in_pairs(a.d) && made_ready != q) {
                make_ready(q, queries, a.d, of, reinterpret_cast<typename MultipliedAs<C>::type*>(ready));
                made_ready = q;
              }
              attend_chunk<C>(a, span, next, q, ready, queries, partial, chunks * width);
            };
            switch (a.cache.store) {
              case Store::f32:
                attend(static_cast<const float*>(nullptr));
                break;
              case Store::bf16:
                attend(static_cast<const bf16*>(nullptr));
                break;
              case Store::int8:
                attend(static_cast<const int8_t*>(nullptr));
                break;
              default:
                attend(static_cast<const f16*>(nullptr));
            }
          }
        }
      }
    }
    return;
  }
  const Range mine = share(static_cast<int64_t>(a.B) * a.H, me);
  for (int64_t query = mine.begin; query < mine.end; ++query) {
    const int slot = static_cast<int>(query / a.H);
    const int first = first_chunk(slot), last = last_chunk(slot);
    const float* partials = scratch + query * chunks * width;
    float* out = a.out + query * a.d;
    float maximum = partials[first * width + a.d];
    for (int c = first + 1; c <= last; ++c) {
      const float other = partials[c * width + a.d];
      maximum = other > maximum ? other : maximum;
    }
    for (int i = 0; i < a.d; ++i) out[i] = 0;
    float total = 0;
    for (int c = first; c <= last; ++c) {
      const float* partial = partials + c * width;
      const float weight = expf(partial[a.d] - maximum);
      total += weight * partial[a.d + 1];
      add_scaled(out, partial, weight, a.d);
    }
    for (int i = 0; i < a.d; ++i) out[i] /= total;
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
