// A line of the K,V cache: one position of one head. Floats as they are; or int8 codes and their scale, of
// which kernels/kv_line.py is the definition.
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

// What the d codes at `line` are to be multiplied with.
D3RT_INLINE float line_scale(const int8_t* line, int d) {
  float scale;
  __builtin_memcpy(&scale, line + d, sizeof scale);
  return scale;
}

template <class T>
D3RT_INLINE void write_line(const float* values, T* out, int d) {
  for (int i = 0; i < d; ++i) from_float(values[i], out + i);
}
// scale = max |value| / 127, code = round(value * 127 / max |value|), half to even. A NaN makes the scale
// NaN, so that it shows wherever the line is read. Of values so small that float has no 127 / max, codes are
// 0.
D3RT_INLINE void write_line(const float* values, int8_t* out, int d) {
  float largest = 0, nan = 0;
  for (int i = 0; i < d; ++i) {
    const float size = values[i] < 0 ? -values[i] : values[i];
    largest = size > largest ? size : largest;
    nan += values[i] * 0;  // 0, or NaN for NaN and infinities
  }
  const float inverse = largest < 1e-36f ? 0.0f : 127.0f / largest, scale = largest / 127.0f + nan;
  for (int i = 0; i < d; ++i) out[i] = nan == 0 ? static_cast<int8_t>(rintf(values[i] * inverse)) : int8_t{0};
  __builtin_memcpy(out + d, &scale, sizeof scale);
}

// Where the line of (slot, head) at position 0 begins.
D3RT_INLINE int64_t head_offset(const Cache& cache, int slot, int head) {
  return (cache.lines ? cache.lines[slot] : slot) * cache.slot_stride + head * cache.head_stride;
}

// Writes one head of K or V (data) at (slot, head, pos).
D3RT_INLINE void write_cache(const Cache& cache, void* data, int slot, int head, int64_t pos,
                             const float* values, int d) {
  const int64_t at = head_offset(cache, slot, head) + pos * cache.pos_stride;
  switch (cache.store) {
    case Store::f32:
      return write_line(values, static_cast<float*>(data) + at, d);
    case Store::bf16:
      return write_line(values, static_cast<bf16*>(data) + at, d);
    case Store::int8:
      return write_line(values, static_cast<int8_t*>(data) + at, d);
    default:
      return write_line(values, static_cast<f16*>(data) + at, d);
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
