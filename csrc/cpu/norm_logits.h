// norm_logits: the final RMSNorm and the lm_head. Scratch: norm_scratch for each thread. And the argmax over
// one row.
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

static void norm_logits(const NormLogitsArgs& a, float* scratch, int phase, const Worker& me) {
  const int64_t total = granules(a.w), block = block_of(a.w, total, me.num_threads);
  if (phase == kWarm) return warm(a.w, first_share(total, block, me));
  float* own = scratch + me.thread * norm_scratch(a.B, a.D);
  const Input in = norm_input(own, a.x, a.norm, a.eps, a.B, a.D, &a.w, 1);
  share_out(total, block, me, [&](Range part) {
    rows_dot(a.w, in, a.B, part, [&](int slot, int64_t row, float value) {
      a.logits[slot * a.w.rows + row] = a.w.bias ? value + a.w.bias[row] : value;
    });
  });
}

static int64_t argmax(const float* values, int64_t n) {
  constexpr int kN = Vec::kLanes;
  // First the maximum, then the first place that holds it: a running index per lane would cost more.
  const float lowest = -__builtin_inff();
  Vec best = set1(lowest);
  int64_t i = 0;
  for (; i + kN <= n; i += kN) best = max(load(values + i), best);  // a NaN operand leaves `best` on x86
  float lanes[kN];
  store(lanes, best);
  float maximum = lowest;
  for (int lane = 0; lane < kN; ++lane) maximum = lanes[lane] > maximum ? lanes[lane] : maximum;
  for (; i < n; ++i) maximum = values[i] > maximum ? values[i] : maximum;
  int64_t found = -1;
  bool nan = false;
  for (i = 0; i < n; ++i) nan |= values[i] != values[i];
  if (nan || maximum == lowest) return -1;
  const Vec target = set1(maximum);
  for (i = 0; i + kN <= n && found < 0; i += kN) {
    if (!any_nan_or_equal(load(values + i), target)) continue;
    for (int lane = 0; lane < kN && found < 0; ++lane)
      if (values[i + lane] == maximum) found = i + lane;
  }
  for (; i < n && found < 0; ++i)
    if (values[i] == maximum) found = i;
  return found;
}

}  // namespace d3rt::cpu::D3RT_ISA
