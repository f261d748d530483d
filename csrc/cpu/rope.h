// What norm_qkv_rope and kv_fill share once a head is projected: its norm and its rotation.
#pragma once

#include "kv_line.h"

namespace d3rt::cpu::D3RT_ISA {

// In place: optional RMSNorm over the head (Qwen3), then the rotation by the slot's position.
// RoPE (Su et al. 2021, arXiv 2104.09864) in HF's half-split layout: pair (j, j + d/2) turns by pos *
// inv_freq[j].
D3RT_INLINE void norm_and_rotate(float* head, const float* head_norm, const Rope& rope, int slot, int d,
                                 float eps) {
  if (head_norm) rms_norm(head, head, head_norm, eps, d);
  const int half = d / 2;
  const float* cos = rope.cos + static_cast<int64_t>(rope.pos[slot]) * half;
  const float* sin = rope.sin + static_cast<int64_t>(rope.pos[slot]) * half;
  for (int j = 0; j < half; ++j) {
    const float a = head[j], b = head[j + half];
    head[j] = a * cos[j] - b * sin[j];
    head[j + half] = b * cos[j] + a * sin[j];
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
