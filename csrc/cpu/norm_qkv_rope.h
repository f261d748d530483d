// norm_qkv_rope: RMSNorm + Q,K,V projection (+ bias, + q/k norm) + RoPE, K,V written at pos. The fused
// kernel. The three weight matrices are streamed as one range of rows, so that threads share them evenly
// whatever the number of heads; a head is finished by the thread that projects the last of it. Scratch: [B,
// rows] projections, then norm_scratch for each thread.
#pragma once

#include "rope.h"

namespace d3rt::cpu::D3RT_ISA {

static void norm_qkv_rope(const NormQkvRopeArgs& a, float* scratch, int phase, const Worker& me) {
  const int64_t rows = static_cast<int64_t>(a.H + 2 * a.G) * a.d;
  float* projected = scratch;
  const int64_t total = granules(a.w[0]) + granules(a.w[1]) + granules(a.w[2]);
  const int64_t block = block_of(a.w[0], total, me.num_threads);
  if (phase == kWarm) return warm(a.w, 3, first_share(total, block, me));
  const auto finish = [&](int head) {
    for (int slot = 0; slot < a.B; ++slot) {
      float* values = projected + slot * rows + static_cast<int64_t>(head) * a.d;
      const int64_t pos = a.rope.pos[slot];
      if (head < a.H) {
        norm_and_rotate(values, a.q_norm, a.rope, slot, a.d, a.eps);
        float* q = a.q + (static_cast<int64_t>(slot) * a.H + head) * a.d;
        for (int i = 0; i < a.d; ++i) q[i] = values[i];
      } else if (head < a.H + a.G) {
        norm_and_rotate(values, a.k_norm, a.rope, slot, a.d, a.eps);
        write_cache(a.cache, a.cache.k, slot, head - a.H, pos, values, a.d);
      } else {
        write_cache(a.cache, a.cache.v, slot, head - a.H - a.G, pos, values, a.d);
      }
    }
  };
  float* own = scratch + a.B * rows + me.thread * norm_scratch(a.B, a.D);
  const Input in = norm_input(own, a.x, a.norm, a.eps, a.B, a.D, a.w, 3);
  share_out(total, block, me, [&](Range streamed) {
    project_heads(a.w, 3, in, a.B, streamed, projected, a.d, me.made, finish);
  });
}

}  // namespace d3rt::cpu::D3RT_ISA
