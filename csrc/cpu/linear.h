// linear: out = a W^T for the T tokens of a prefill, W packed. (Plain weights go through torch's GEMM.)
// Phase 0 quantises the tokens, each thread its share; phase 1 shares out tiles, and a tile stays in L2 while
// the tokens pass over it. Scratch: the quantised activations of all tokens.
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

static void linear(const LinearArgs& a, float* scratch, int phase, const Worker& me) {
  if (phase == 0) {
    const Range mine = share(a.T, me);
    quantise_rows(quantised_at(scratch, a.T, a.w.cols), a.a, a.w.cols, mine.begin, mine.end);
    return;
  }
  Input in = {a.a, a.w.cols, quantised_at(scratch, a.T, a.w.cols), nullptr, nullptr};
  rows_dot(a.w, in, a.T, share(granules(a.w), me),
           [&](int token, int64_t row, float value) { a.out[token * a.w.rows + row] = value; });
}

}  // namespace d3rt::cpu::D3RT_ISA
