// What norm_qkv_rope and kv_fill share: when a head is projected, and then its norm and its rotation.
#pragma once

#include "kv_line.h"

namespace d3rt::cpu::D3RT_ISA {

// These rows of a projection have just been made. Calls finish(head) for each of its heads of d rows that
// this completes. made: [heads].
template <class Finish>
D3RT_INLINE void for_heads_completed(Range rows, int d, Made* made, const Finish& finish) {
  for (int64_t begin = rows.begin; begin < rows.end;) {
    const int64_t head = begin / d, end_of_head = (head + 1) * d;
    const int64_t end = end_of_head < rows.end ? end_of_head : rows.end;
    if (completes(made[head], static_cast<uint32_t>(end - begin), static_cast<uint32_t>(d)))
      finish(static_cast<int>(head));
    begin = end;
  }
}

// Projects these granules of `count` matrices laid end to end into out [B, rows of all], and calls
// finish(head) for each head that is then whole.
template <class Finish>
D3RT_INLINE void project_heads(const Matrix* matrices, int count, const Input& in, int B, Range streamed,
                               float* out, int d, Made* made, const Finish& finish) {
  int64_t rows = 0, offset = 0, first = 0;
  for (int i = 0; i < count; ++i) rows += matrices[i].rows;
  for (int i = 0; i < count; ++i) {
    const Matrix& w = matrices[i];
    const Range part = clip(streamed, offset, granules(w));
    rows_dot(w, in, B, part, [&](int slot, int64_t row, float value) {
      out[slot * rows + first + row] = w.bias ? value + w.bias[row] : value;
    });
    const Range done = rows_of(w, part);
    for_heads_completed({first + done.begin, first + done.end}, d, made, finish);
    offset += granules(w);
    first += w.rows;
  }
}

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
