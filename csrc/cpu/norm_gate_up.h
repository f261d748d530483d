// norm_gate_up: h = silu(gate(n)) * up(n), n = RMSNorm(x). Each thread computes both halves of its own
// columns, so no barrier stands between them. Scratch: [threads, B, D] normed x.
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

static void norm_gate_up(const NormGateUpArgs& a, float* scratch, int, int thread, int num_threads) {
  constexpr int kN = Vec::kLanes;
  float* normed = scratch + static_cast<int64_t>(thread) * a.B * a.D;
  for (int b = 0; b < a.B; ++b) rms_norm(normed + b * a.D, a.x + b * a.D, a.norm, a.eps, a.D);
  const Range mine = share(a.F, thread, num_threads);
  // Blocks of columns: gate's rows, then up's, then the activation while h is still in L1.
  constexpr int64_t kBlock = 64;
  for (int64_t begin = mine.begin; begin < mine.end; begin += kBlock) {
    const Range block = {begin, begin + kBlock < mine.end ? begin + kBlock : mine.end};
    float up[16][kBlock];
    rows_dot(a.gate, normed, a.D, a.B, block, [&](int slot, int64_t row, float value) {
      a.h[static_cast<int64_t>(slot) * a.F + row] = a.gate.bias ? value + a.gate.bias[row] : value;
    });
    rows_dot(a.up, normed, a.D, a.B, block, [&](int slot, int64_t row, float value) {
      up[slot][row - begin] = a.up.bias ? value + a.up.bias[row] : value;
    });
    const int64_t n = block.end - block.begin;
    for (int b = 0; b < a.B; ++b) {
      float* h = a.h + static_cast<int64_t>(b) * a.F + begin;
      int64_t i = 0;
      for (; i + kN <= n; i += kN) store(h + i, mul(silu(load(h + i)), load(up[b] + i)));
      const int rest = static_cast<int>(n - i);
      if (rest)
        store_partial(h + i, mul(silu(load_partial(h + i, rest)), load_partial(up[b] + i, rest)), rest);
    }
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
