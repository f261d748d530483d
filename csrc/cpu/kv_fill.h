// kv_fill: K,V of all skipped layers of a run, from one hidden state x: each layer's own norm, K,V projection
// and RoPE, scattered at pos. Scratch: [layers, B, 2 G d] projections, then [threads, B, D] normed x.
#pragma once

#include "rope.h"

namespace d3rt::cpu::D3RT_ISA {

static void kv_fill(const KvFillArgs& a, float* scratch, int phase, int thread, int num_threads) {
  const int64_t half = static_cast<int64_t>(a.G) * a.d, rows = 2 * half;
  if (phase == 0) {
    float* normed = scratch + a.num_layers * a.B * rows + static_cast<int64_t>(thread) * a.B * a.D;
    const Range mine = share(a.num_layers * rows, thread, num_threads);
    for (int layer = 0; layer < a.num_layers; ++layer) {
      const FillLayer& fill = a.layers[layer];
      const Range here = clip(mine, layer * rows, rows);
      if (here.begin >= here.end) continue;
      for (int b = 0; b < a.B; ++b) rms_norm(normed + b * a.D, a.x + b * a.D, fill.norm, a.eps, a.D);
      float* out = scratch + layer * a.B * rows;
      for (int part = 0; part < 2; ++part) {
        const Matrix& w = fill.w[part];
        rows_dot(w, normed, a.D, a.B, clip(here, part * half, half), [&](int slot, int64_t row, float value) {
          out[slot * rows + part * half + row] = w.bias ? value + w.bias[row] : value;
        });
      }
    }
    return;
  }
  const int heads = 2 * a.G;
  const Range mine = share(static_cast<int64_t>(a.num_layers) * a.B * heads, thread, num_threads);
  for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
    const int head = static_cast<int>(unit % heads), slot = static_cast<int>(unit / heads % a.B);
    const int64_t layer = unit / heads / a.B;
    const FillLayer& fill = a.layers[layer];
    float* values = scratch + (layer * a.B + slot) * rows + static_cast<int64_t>(head) * a.d;
    const bool is_key = head < a.G;
    if (is_key) norm_and_rotate(values, fill.k_norm, a.rope, slot, a.d, a.eps);
    write_cache(fill.cache, is_key ? fill.cache.k : fill.cache.v, slot, is_key ? head : head - a.G,
                a.rope.pos[slot], values, a.d);
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
