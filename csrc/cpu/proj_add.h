// proj_add: x += a W^T (+ bias): o_proj or down_proj with the residual. Scratch: each thread's quantised
// activations.
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

static void proj_add(const ProjAddArgs& a, float* scratch, int phase, const Worker& me) {
  const int64_t total = granules(a.w), block = block_of(a.w, total, me.num_threads);
  if (phase == kWarm) return warm(a.w, first_share(total, block, me));
  float* own = scratch + me.thread * prepared_floats(a.B, a.w.cols);
  const Input in = prepare(own, a.a, a.B, a.w.cols, &a.w, 1);
  share_out(total, block, me, [&](Range part) {
    rows_dot(a.w, in, a.B, part, [&](int slot, int64_t row, float value) {
      a.x[slot * a.w.rows + row] += a.w.bias ? value + a.w.bias[row] : value;
    });
  });
}

}  // namespace d3rt::cpu::D3RT_ISA
