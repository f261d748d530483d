// proj_add: x += a W^T (+ bias): o_proj or down_proj with the residual.
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

static void proj_add(const ProjAddArgs& a, float*, int, int thread, int num_threads) {
  rows_dot(a.w, a.a, a.w.cols, a.B, share(a.w.rows, thread, num_threads),
           [&](int slot, int64_t row, float value) {
             a.x[slot * a.w.rows + row] += a.w.bias ? value + a.w.bias[row] : value;
           });
}

}  // namespace d3rt::cpu::D3RT_ISA
