// The ops of early exit: copy_hidden keeps the hidden state as it is before a layer, hidden_cosine says how
// far the layer turned it, top2_margin by how much the most likely token leads. Scratch of top2_margin: 3
// floats for each chunk of each slot: its largest and second largest logit, and its sum of exp(logit -
// largest).
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

static void copy_hidden(const CopyHiddenArgs& a, float*, int, const Worker& me) {
  const Range mine = share(static_cast<int64_t>(a.B) * a.D, me);
  for (int64_t i = mine.begin; i < mine.end; ++i) a.out[i] = a.x[i];
}

static void hidden_cosine(const HiddenCosineArgs& a, float*, int, const Worker& me) {
  const Range mine = share(a.B, me);
  for (int64_t b = mine.begin; b < mine.end; ++b) {
    const float *u = a.a + b * a.D, *v = a.b + b * a.D;
    const float norms = sqrtf(dot(u, u, a.D)) * sqrtf(dot(v, v, a.D));
    const float cosine = dot(u, v, a.D) / (norms < kSmallestNorms ? kSmallestNorms : norms);
    a.out[b] = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;  // NaN stays
  }
}

D3RT_INLINE float exp_of(float value) {
  float lanes[Vec::kLanes];
  store(lanes, exp(set1(value)));
  return lanes[0];
}

// The two largest of values[n], which may be equal; -inf where there are not as many. NaN is passed over.
struct Top2 {
  float first, second;
};
D3RT_INLINE void put(Top2& top, float value) {
  if (value > top.first) {
    top.second = top.first;
    top.first = value;
  } else if (value > top.second) {
    top.second = value;
  }
}
D3RT_INLINE Top2 top2(const float* values, int64_t n) {
  constexpr int kN = Vec::kLanes;
  const float lowest = -__builtin_inff();
  Vec first = set1(lowest), second = first;
  int64_t i = 0;
  for (; i + kN <= n; i += kN) {
    const Vec value = load(values + i);
    second = max(min(value, first), second);
    first = max(value, first);
  }
  float firsts[kN], seconds[kN];
  store(firsts, first), store(seconds, second);
  Top2 top = {lowest, lowest};
  for (int lane = 0; lane < kN; ++lane) put(top, firsts[lane]), put(top, seconds[lane]);
  for (; i < n; ++i) put(top, values[i]);
  return top;
}

// Sum of exp(values[i] - largest). NaN where a value is NaN or +inf, or all are -inf.
D3RT_INLINE float sum_exp(const float* values, int64_t n, float largest) {
  constexpr int kN = Vec::kLanes;
  const Vec shift = set1(-largest);
  Vec total = set1(0);
  int64_t i = 0;
  for (; i + kN <= n; i += kN) total = add(total, exp(add(load(values + i), shift)));
  float rest = 0;
  for (; i < n; ++i) rest += exp_of(values[i] - largest);
  return sum(total) + rest;
}

static void top2_margin(const Top2MarginArgs& a, float* scratch, int phase, const Worker& me) {
  const int64_t chunks = (a.V + kMarginChunk - 1) / kMarginChunk;
  if (phase == 0) {
    const Range mine = share(a.B * chunks, me);
    for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
      const int64_t begin = unit % chunks * kMarginChunk, left = a.V - begin;
      const float* values = a.logits + unit / chunks * a.V + begin;
      const int64_t n = left < kMarginChunk ? left : kMarginChunk;
      const Top2 top = top2(values, n);
      float* part = scratch + 3 * unit;
      part[0] = top.first, part[1] = top.second;
      part[2] = top.first > -__builtin_inff() ? sum_exp(values, n, top.first) : sum_exp(values, n, 0);
    }
    return;
  }
  const Range mine = share(a.B, me);
  for (int64_t b = mine.begin; b < mine.end; ++b) {
    const float* parts = scratch + 3 * b * chunks;
    Top2 top = {-__builtin_inff(), -__builtin_inff()};
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      put(top, parts[3 * chunk]), put(top, parts[3 * chunk + 1]);
    float total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      total += parts[3 * chunk + 2] * exp_of(parts[3 * chunk] - top.first);
    a.out[b] = (1 - exp_of(top.second - top.first)) / total;
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
