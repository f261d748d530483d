// attention: one query per slot over its cached positions, grouped heads, split over chunks of positions.
// Phase 0: each (slot, K,V head, chunk) gives, per query head, a maximum, a sum and a weighted V (online
// softmax, Milakov & Gimelshein 2018, arXiv 1805.02867; split over K,V as in Flash-Decoding). Phase 1 joins
// the chunks in order. Scratch: [B, H, chunks, d + 2] with chunks = ceil(S / kAttentionChunk).
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

constexpr int kQueryGroup = 8;  // query heads that share one pass over a chunk's K,V

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
  const float scale = a.scale;
  float scores[kQueryGroup][kAttentionChunk];
  for (int t = 0; t < positions; ++t)
    for (int h = 0; h < queries; ++h)
      scores[h][t] = dot(k + t * pos_stride, q + static_cast<int64_t>(h) * d, d) * scale;

  for (int h = 0; h < queries; ++h) {
    float* out = partial + h * partial_stride;
    float maximum = scores[h][0];
    for (int t = 1; t < positions; ++t) maximum = scores[h][t] > maximum ? scores[h][t] : maximum;
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
    for (int i = 0; i < d; ++i) out[i] = 0;
  }
  for (int t = 0; t < positions; ++t) {
    const C* row = v + t * pos_stride;
    for (int h = 0; h < queries; ++h) {
      float* out = partial + h * partial_stride;
      const Vec weight = set1(scores[h][t]);
      int i = 0;
      for (; i + kN <= d; i += kN) store(out + i, fma(weight, load(row + i), load(out + i)));
      const int rest = d - i;
      if (rest)
        store_partial(out + i, fma(weight, load_partial(row + i, rest), load_partial(out + i, rest)), rest);
    }
  }
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
