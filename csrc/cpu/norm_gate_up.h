// norm_gate_up: h = silu(gate(n)) * up(n), n = RMSNorm(x). Each thread computes both halves of its own
// columns, so no barrier stands between them. Scratch: norm_scratch for each thread.
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

static void norm_gate_up(const NormGateUpArgs& a, float* scratch, int phase, const Worker& me) {
  constexpr int kN = Vec::kLanes;
  // Blocks of columns: gate's rows and up's, at once or one after the other, then the activation while h is
  // still in L1.
  constexpr int64_t kBlock = 64;
  const int64_t granule = is_packed(a.gate) ? kTileRows : 1;
  const int64_t total = granules(a.gate);  // gate and up are kept alike
  const int64_t most = kBlock / granule, wanted = block_of(a.gate, total, me.num_threads);
  const int64_t step = wanted > 0 && wanted < most ? wanted : most;
  if (phase == kWarm) {
    const Range mine = first_share(total, wanted ? step : 0, me);
    warm(a.gate, mine);
    if (!is_packed(a.gate)) warm(a.up, mine);  // both at once
    return;
  }
  float* own = scratch + me.thread * norm_scratch(a.B, a.D);
  const Input in = norm_input(own, a.x, a.norm, a.eps, a.B, a.D, &a.gate, 1);
  share_out(total, wanted ? step : 0, me, [&](Range mine) {
    for (int64_t first = mine.begin; first < mine.end; first += step) {
      const Range block = {first, first + step < mine.end ? first + step : mine.end};
      const int64_t begin = block.begin * granule;
      const int64_t end = block.end * granule < a.F ? block.end * granule : a.F;
      float up[16][kBlock];
      const auto biased = [](const Matrix& m, int64_t row, float value) {
        return m.bias ? value + m.bias[row] : value;
      };
      const bool at_once =
          both_rows_dot(a.gate, a.up, in, a.B, block, [&](int slot, int64_t row, float gate, float other) {
            a.h[static_cast<int64_t>(slot) * a.F + row] = biased(a.gate, row, gate);
            up[slot][row - begin] = biased(a.up, row, other);
          });
      if (!at_once) {
        warm(a.up, block);
        rows_dot(a.gate, in, a.B, block, [&](int slot, int64_t row, float value) {
          a.h[static_cast<int64_t>(slot) * a.F + row] = biased(a.gate, row, value);
        });
        warm(a.gate, {block.end, total});  // ours, most likely
        rows_dot(a.up, in, a.B, block, [&](int slot, int64_t row, float value) {
          up[slot][row - begin] = biased(a.up, row, value);
        });
      }
      const int64_t n = end - begin;
      for (int b = 0; b < a.B; ++b) {
        float* h = a.h + static_cast<int64_t>(b) * a.F + begin;
        int64_t i = 0;
        for (; i + kN <= n; i += kN) store(h + i, mul(silu(load(h + i)), load(up[b] + i)));
        const int rest = static_cast<int>(n - i);
        if (rest)
          store_partial(h + i, mul(silu(load_partial(h + i, rest)), load_partial(up[b] + i, rest)), rest);
      }
    }
  });
}

}  // namespace d3rt::cpu::D3RT_ISA
