// kv_fill: K,V of all skipped layers of a run, from one hidden state x: each layer's own norm, K,V projection
// and RoPE, scattered at pos by the thread that projects the last of a head. Scratch: [layers, B, 2 G d]
// projections, then norm_scratch for each thread.
#pragma once

#include "rope.h"

namespace d3rt::cpu::D3RT_ISA {

static void kv_fill(const KvFillArgs& a, float* scratch, int phase, const Worker& me) {
  const int64_t rows = 2 * static_cast<int64_t>(a.G) * a.d;
  const int heads = 2 * a.G;
  int64_t total = 0;
  for (int layer = 0; layer < a.num_layers; ++layer)
    total += granules(a.layers[layer].w[0]) + granules(a.layers[layer].w[1]);
  const Range mine = share(total, me);
  float* own = scratch + a.num_layers * a.B * rows + me.thread * norm_scratch(a.B, a.D);
  int64_t offset = 0;
  for (int layer = 0; layer < a.num_layers; ++layer) {
    const FillLayer& fill = a.layers[layer];
    const int64_t both = granules(fill.w[0]) + granules(fill.w[1]);
    const Range streamed = {mine.begin - offset, mine.end - offset};
    offset += both;
    if (streamed.begin >= both || streamed.end <= 0) continue;
    if (phase == kWarm) {
      warm(fill.w, 2, streamed);
      continue;
    }
    const Input in = norm_input(own, a.x, fill.norm, a.eps, a.B, a.D, fill.w, 2);
    float* projected = scratch + layer * a.B * rows;
    const auto finish = [&](int head) {
      const bool is_key = head < a.G;
      for (int slot = 0; slot < a.B; ++slot) {
        float* values = projected + slot * rows + static_cast<int64_t>(head) * a.d;
        if (is_key) norm_and_rotate(values, fill.k_norm, a.rope, slot, a.d, a.eps);
        write_cache(fill.cache, is_key ? fill.cache.k : fill.cache.v, slot, is_key ? head : head - a.G,
                    a.rope.pos[slot], values, a.d);
      }
    };
    project_heads(fill.w, 2, in, a.B, streamed, projected, a.d, me.made + layer * heads, finish);
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
