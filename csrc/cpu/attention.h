// attention: one query per slot over its cached positions, grouped heads, split over chunks of positions.
// Each (slot, K,V head, chunk) gives, per query head, a maximum, a sum and a weighted V (online softmax,
// Milakov & Gimelshein 2018, arXiv 1805.02867; split over K,V as in Flash-Decoding). The thread that makes
// the last chunk of a head joins them, in the order of positions. Scratch: [B, H, chunks, d + 2] with chunks
// = ceil(S / kAttentionChunk).
#pragma once

#include <type_traits>

#include "attend_products.h"

namespace d3rt::cpu::D3RT_ISA {

// values[i] *= scale.
D3RT_INLINE void multiply(float* values, int64_t n, float scale) {
  constexpr int kN = Vec::kLanes;
  int64_t i = 0;
  for (; i + kN <= n; i += kN) store(values + i, mul(load(values + i), set1(scale)));
  for (; i < n; ++i) values[i] *= scale;
}

// scores[h][t] *= scales[h], and the scale of line t of an int8 cache.
template <class C>
D3RT_INLINE void multiply_scales(const C*, int64_t, int positions, int, int queries, const float* scales,
                                 float (*scores)[kAttentionChunk]) {
  for (int h = 0; h < queries; ++h) multiply(scores[h], positions, scales[h]);
}
D3RT_INLINE void multiply_scales(const int8_t* lines, int64_t pos_stride, int positions, int d, int queries,
                                 const float* scales, float (*scores)[kAttentionChunk]) {
  constexpr int kN = Vec::kLanes;
  alignas(64) float of_lines[kAttentionChunk];
  for (int t = 0; t < positions; ++t) of_lines[t] = line_scale(lines + t * pos_stride, d);
  for (int h = 0; h < queries; ++h) {
    const Vec scale = set1(scales[h]);
    int t = 0;
    for (; t + kN <= positions; t += kN)
      store(scores[h] + t, mul(load(scores[h] + t), mul(load(of_lines + t), scale)));
    for (; t < positions; ++t) scores[h][t] *= of_lines[t] * scales[h];
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

// ready: q as make_ready leaves it, used if in_pairs(d). scales: of the queries, which their scores are
// multiplied with. partial: d values, then maximum, then sum; one per query head of the group. next: what is
// read after this.
template <class C>
D3RT_INLINE void attend_chunk(const AttentionArgs& a, Span span, Span next, const float* q, const void* ready,
                              const float* scales, int queries, float* partial, int64_t partial_stride) {
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
  multiply_scales(k, pos_stride, positions, d, queries, scales, scores);

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
  if (sizeof(C) == 1) {
    constexpr float kOnes[kQueryGroup] = {1, 1, 1, 1, 1, 1, 1, 1};
    multiply_scales(v, pos_stride, positions, d, queries, kOnes, scores);
  }

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
  if constexpr (sizeof(M) == sizeof(int16_t)) {
    alignas(64) M weights[kQueryGroup][kAttentionChunk];
    float factors[kQueryGroup];
    for (int h = 0; h < queries; ++h) {
      for (int t = positions; t % kN; ++t) scores[h][t] = 0;
      factors[h] = make_ready(scores[h], positions, k, weights[h]);
    }
    weigh(weights);
    for (int h = 0; h < queries; ++h)
      if (factors[h] != 1) multiply(partial + h * partial_stride, d, factors[h]);
  } else {
    weigh(scores);
  }
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

// out = the attention of one query: its chunks first .. last, joined. partials: [chunks, d + 2].
D3RT_INLINE void join_chunks(const float* partials, int first, int last, int d, float* out) {
  const int64_t width = d + 2;
  float maximum = partials[first * width + d];
  for (int c = first + 1; c <= last; ++c) {
    const float other = partials[c * width + d];
    maximum = other > maximum ? other : maximum;
  }
  for (int i = 0; i < d; ++i) out[i] = 0;
  float total = 0;
  for (int c = first; c <= last; ++c) {
    const float* partial = partials + c * width;
    const float weight = expf(partial[d] - maximum);
    total += weight * partial[d + 1];
    add_scaled(out, partial, weight, d);
  }
  for (int i = 0; i < d; ++i) out[i] /= total;
}

static void attention(const AttentionArgs& a, float* scratch, int, const Worker& me) {
  const int64_t chunks = (a.S + kAttentionChunk - 1) / kAttentionChunk, width = a.d + 2;
  const int group = a.H / a.G;
  // Chunks are counted over absolute positions; a window only moves the first one.
  const auto begin_of = [&](int slot) {
    const int length = a.pos[slot] + 1;
    return a.window > 0 && length > a.window ? length - a.window : 0;
  };
  const auto first_chunk = [&](int slot) { return begin_of(slot) / kAttentionChunk; };
  const auto last_chunk = [&](int slot) { return a.pos[slot] / kAttentionChunk; };
  const auto span_of = [&](int slot, int head, int chunk) {
    const int begin = begin_of(slot), length = a.pos[slot] + 1;
    const int from = chunk * kAttentionChunk > begin ? chunk * kAttentionChunk : begin;
    const int to = (chunk + 1) * kAttentionChunk < length ? (chunk + 1) * kAttentionChunk : length;
    return Span{head_offset(a.cache, slot, head) + from * a.cache.pos_stride, to - from};
  };
  int64_t units = 0;
  for (int slot = 0; slot < a.B; ++slot) units += (last_chunk(slot) - first_chunk(slot) + 1) * a.G;
  const Range mine = share(units, me);
  alignas(64) float ready[kQueryGroup * kMostPaired];
  float scales[kQueryGroup];
  const float* made_ready = nullptr;  // of which those are: chunk after chunk has the same queries
  int64_t unit = 0;                   // at the first chunk of each head
  for (int slot = 0; slot < a.B; ++slot) {
    const int first = first_chunk(slot), last = last_chunk(slot), count = last - first + 1;
    for (int head = 0; head < a.G; ++head, unit += count) {
      const int begin = mine.begin > unit ? static_cast<int>(mine.begin - unit) : 0;
      const int end = mine.end < unit + count ? static_cast<int>(mine.end - unit) : count;
      if (begin >= end) continue;
      for (int chunk = first + begin; chunk < first + end; ++chunk) {
        const Span span = span_of(slot, head, chunk);
        Span following = {0, 0};
        if (chunk + 1 < first + end)
          following = span_of(slot, head, chunk + 1);
        else if (unit + end < mine.end && head + 1 < a.G)
          following = span_of(slot, head + 1, first);
        else if (unit + end < mine.end && slot + 1 < a.B)
          following = span_of(slot + 1, 0, first_chunk(slot + 1));
        for (int h = 0; h < group; h += kQueryGroup) {
          const int queries = group - h < kQueryGroup ? group - h : kQueryGroup;
          const Span next = h + queries < group ? Span{0, 0} : following;
          const int64_t query = static_cast<int64_t>(slot) * a.H + head * group + h;
          float* partial = scratch + (query * chunks + chunk) * width;
          const float* q = a.q + query * a.d;
          const auto attend = [&](auto of) {  // a null pointer to what the cache is made of
            using C = std::remove_const_t<std::remove_pointer_t<decltype(of)>>;
            using M = typename MultipliedAs<C>::type;
            for (int i = 0; made_ready != q && i < queries; ++i) {
              M* one = reinterpret_cast<M*>(ready) + i * a.d;
              scales[i] = a.scale * (in_pairs(a.d) ? make_ready(q + i * a.d, a.d, of, one) : 1);
            }
            made_ready = q;
            attend_chunk<C>(a, span, next, q, ready, scales, queries, partial, chunks * width);
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
      if (!completes(me.made[slot * a.G + head], static_cast<uint32_t>(end - begin),
                     static_cast<uint32_t>(count)))
        continue;
      for (int h = 0; h < group; ++h) {
        const int64_t query = static_cast<int64_t>(slot) * a.H + head * group + h;
        join_chunks(scratch + query * chunks * width, first, last, a.d, a.out + query * a.d);
      }
    }
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
