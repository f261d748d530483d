// kv_fill: K,V of all skipped layers of a run, from one hidden state x: each layer's own norm, K,V projection
// and RoPE, scattered at pos. Scratch: [layers, B, 2 G d] projections, then norm_scratch for each thread.
#pragma once

#include "rope.h"

namespace d3rt::cpu::D3RT_ISA {

static void kv_fill(const KvFillArgs& a, float* scratch, int phase, const Worker& me) {
  const int64_t half = static_cast<int64_t>(a.G) * a.d, rows = 2 * half;
  if (phase == kWarm) {
    int64_t total = 0, offset = 0;
    for (int layer = 0; layer < a.num_layers; ++layer)
      total += granules(a.layers[layer].w[0]) + granules(a.layers[layer].w[1]);
    const Range streamed = share(total, me);
    for (int layer = 0; layer < a.num_layers; ++layer) {
      const FillLayer& fill = a.layers[layer];
      warm(fill.w, 2, {streamed.begin - offset, streamed.end - offset});
      offset += granules(fill.w[0]) + granules(fill.w[1]);
    }
    return;
  }
  if (phase == 0) {
    float* own = scratch + a.num_layers * a.B * rows + me.thread * norm_scratch(a.B, a.D);
    int64_t total = 0;
    for (int layer = 0; layer < a.num_layers; ++layer)
      total += granules(a.layers[layer].w[0]) + granules(a.layers[layer].w[1]);
    const Range mine = share(total, me);
    int64_t offset = 0;
    for (int layer = 0; layer < a.num_layers; ++layer) {
      const FillLayer& fill = a.layers[layer];
      const int64_t both = granules(fill.w[0]) + granules(fill.w[1]);
      if (offset < mine.end && mine.begin < offset + both) {
        const Input in = norm_input(own, a.x, fill.norm, a.eps, a.B, a.D, fill.w, 2);
        float* out = scratch + layer * a.B * rows;
        int64_t at = offset;
        for (const Matrix& w : fill.w) {
          rows_dot(w, in, a.B, clip(mine, at, granules(w)), [&](int slot, int64_t row, float value) {
            out[slot * rows + row] = w.bias ? value + w.bias[row] : value;
          });
          at += granules(w);
          out += half;
        }
      }
      offset += both;
    }
    return;
  }
  const int heads = 2 * a.G;
  const Range mine = share(static_cast<int64_t>(a.num_layers) * a.B * heads, me);
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
