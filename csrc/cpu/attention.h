// attention: one query per slot over its cached positions, grouped heads, split over chunks of positions.
// Phase 0: each (slot, K,V head, chunk) gives, per query head, a maximum, a sum and a weighted V (online
// softmax, Milakov & Gimelshein 2018, arXiv 1805.02867; split over K,V as in Flash-Decoding). Phase 1 joins
// the chunks in order. Scratch: [B, H, chunks, d + 2] with chunks = ceil(S / kAttentionChunk).
#pragma once

#include "kv_line.h"

namespace d3rt::cpu::D3RT_ISA {

constexpr int kQueryGroup = 8;  // query heads that share one pass over a chunk's K,V

// scores[q * kAttentionChunk + t] = scale * q . K[t] for NQ queries and four positions. Four at a time: their
// horizontal sums cost little more than one.
template <int NQ, class C>
D3RT_INLINE void scores_of_four(const C* k, int64_t pos_stride, const float* q, int d, float scale,
                                float* scores) {
  constexpr int kN = Vec::kLanes;
  Vec acc[NQ][4];
  for (int h = 0; h < NQ; ++h)
    for (int t = 0; t < 4; ++t) acc[h][t] = set1(0);
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
  for (int h = 0; h < NQ; ++h) {
    float* four = scores + h * kAttentionChunk;
    sum4(acc[h][0], acc[h][1], acc[h][2], acc[h][3], four);
    for (int t = 0; t < 4; ++t) four[t] *= scale;
  }
}

// out[q][column] = sum over positions of weights[q][t] * V[t][column], for NQ queries and NC vectors of
// columns (the last of which may be cut short): all sums stay in registers.
template <int NQ, int NC, class C>
D3RT_INLINE void weigh_columns(const C* v, int64_t pos_stride, int positions,
                               float (*weights)[kAttentionChunk], int columns, float* out,
                               int64_t out_stride) {
  constexpr int kN = Vec::kLanes;
  Vec acc[NQ][NC];
  for (int h = 0; h < NQ; ++h)
    for (int c = 0; c < NC; ++c) acc[h][c] = set1(0);
  const int last = columns - (NC - 1) * kN;
  for (int t = 0; t < positions; ++t) {
    const C* row = v + t * pos_stride;
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

template <int NQ, class C>
D3RT_INLINE void weigh_values(const C* v, int64_t pos_stride, int positions,
                              float (*weights)[kAttentionChunk], int d, float* out, int64_t out_stride) {
  constexpr int kN = Vec::kLanes;
  for (int i = 0; i < d; i += 4 * kN) {
    const int columns = d - i < 4 * kN ? d - i : 4 * kN;
    switch ((columns + kN - 1) / kN) {
      case 1:
        weigh_columns<NQ, 1>(v + i, pos_stride, positions, weights, columns, out + i, out_stride);
        break;
      case 2:
        weigh_columns<NQ, 2>(v + i, pos_stride, positions, weights, columns, out + i, out_stride);
        break;
      case 3:
        weigh_columns<NQ, 3>(v + i, pos_stride, positions, weights, columns, out + i, out_stride);
        break;
      default:
        weigh_columns<NQ, 4>(v + i, pos_stride, positions, weights, columns, out + i, out_stride);
    }
  }
}

// The `positions` positions from element `at` of the cache on. partial: d values, then maximum, then sum; one
// per query head of the group.
template <class C>
D3RT_INLINE void attend_chunk(const AttentionArgs& a, int64_t at, const float* q, int queries, int positions,
                              float* partial, int64_t partial_stride) {
  constexpr int kN = Vec::kLanes;
  const C* k = static_cast<const C*>(a.cache.k) + at;
  const C* v = static_cast<const C*>(a.cache.v) + at;
  const int64_t pos_stride = a.cache.pos_stride;
  const int d = a.d;
  alignas(64) float scores[kQueryGroup][kAttentionChunk];
  int t = 0;
  for (; t + 4 <= positions; t += 4) {
    // V is read next, in the same order; its lines come while K is multiplied.
    prefetch_lines(v + t * pos_stride, 4 * pos_stride * static_cast<int64_t>(sizeof(C)));
    int h = 0;
    for (; h + 2 <= queries; h += 2)
      scores_of_four<2>(k + t * pos_stride, pos_stride, q + static_cast<int64_t>(h) * d, d, a.scale,
                        &scores[h][t]);
    if (h < queries)
      scores_of_four<1>(k + t * pos_stride, pos_stride, q + static_cast<int64_t>(h) * d, d, a.scale,
                        &scores[h][t]);
  }
  for (; t < positions; ++t)
    for (int h = 0; h < queries; ++h)
      scores[h][t] = dot(k + t * pos_stride, q + static_cast<int64_t>(h) * d, d) * a.scale;
  if (is_int8(k))
    for (t = 0; t < positions; ++t)
      for (int h = 0; h < queries; ++h) scores[h][t] *= line_scale(k + t * pos_stride, d);

  for (int h = 0; h < queries; ++h) {
    float* out = partial + h * partial_stride;
    float maximum = scores[h][0];
    for (t = 1; t < positions; ++t) maximum = scores[h][t] > maximum ? scores[h][t] : maximum;
    Vec total = set1(0);
    for (t = 0; t + kN <= positions; t += kN) {
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
  if (is_int8(v))
    for (t = 0; t < positions; ++t)
      for (int h = 0; h < queries; ++h) scores[h][t] *= line_scale(v + t * pos_stride, d);
  // The next chunk of K, which is read next: most often by this very thread.
  if (positions == kAttentionChunk) prefetch_lines(k + positions * pos_stride, kStreamAhead);
  int h = 0;
  for (; h + 2 <= queries; h += 2)
    weigh_values<2>(v, pos_stride, positions, scores + h, d, partial + h * partial_stride, partial_stride);
  if (h < queries)
    weigh_values<1>(v, pos_stride, positions, scores + h, d, partial + h * partial_stride, partial_stride);
}

static void attention(const AttentionArgs& a, float* scratch, int phase, int thread, int num_threads) {
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
    int64_t units = 0;
    for (int slot = 0; slot < a.B; ++slot) units += (last_chunk(slot) - first_chunk(slot) + 1) * a.G;
    const Range mine = share(units, thread, num_threads);
    int64_t unit = 0;
    for (int slot = 0; slot < a.B; ++slot) {
      const int length = a.pos[slot] + 1, begin = begin_of(slot);
      for (int head = 0; head < a.G; ++head) {
        for (int chunk = first_chunk(slot); chunk <= last_chunk(slot); ++chunk, ++unit) {
          if (unit < mine.begin || unit >= mine.end) continue;
          const int from = chunk * kAttentionChunk > begin ? chunk * kAttentionChunk : begin;
          const int to = (chunk + 1) * kAttentionChunk < length ? (chunk + 1) * kAttentionChunk : length;
          const int64_t at =
              slot * a.cache.slot_stride + head * a.cache.head_stride + from * a.cache.pos_stride;
          for (int h = 0; h < group; h += kQueryGroup) {
            const int queries = group - h < kQueryGroup ? group - h : kQueryGroup;
            const int64_t query = static_cast<int64_t>(slot) * a.H + head * group + h;
            float* partial = scratch + (query * chunks + chunk) * width;
            const float* q = a.q + query * a.d;
            switch (a.cache.store) {
              case Store::f32:
                attend_chunk<float>(a, at, q, queries, to - from, partial, chunks * width);
                break;
              case Store::bf16:
                attend_chunk<bf16>(a, at, q, queries, to - from, partial, chunks * width);
                break;
              case Store::int8:
                attend_chunk<int8_t>(a, at, q, queries, to - from, partial, chunks * width);
                break;
              default:
                attend_chunk<f16>(a, at, q, queries, to - from, partial, chunks * width);
            }
          }
        }
      }
    }
    return;
  }
  const Range mine = share(static_cast<int64_t>(a.B) * a.H, thread, num_threads);
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
      for (int i = 0; i < a.d; ++i) out[i] += weight * partial[i];
    }
    for (int i = 0; i < a.d; ++i) out[i] /= total;
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
