// Conversions between float32 and what weights are kept as, in plain integer arithmetic: the same bits on
// every processor. Always inlined and internal to each object, so code compiled for one ISA never serves
// another.
#pragma once

#include "args.h"

#define D3RT_INLINE static inline __attribute__((always_inline))

namespace d3rt::cpu {

D3RT_INLINE float to_float(float value) { return value; }
D3RT_INLINE float to_float(int8_t value) { return value; }
D3RT_INLINE float to_float(bf16 value) {
  union {
    uint32_t bits;
    float value;
  } u = {static_cast<uint32_t>(value.bits) << 16};
  return u.value;
}
D3RT_INLINE float to_float(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  union {
    uint32_t bits;
    float value;
  } u;
  if (rest >= 0x7c00) {
    u.bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;  // inf, NaN
  } else {
    u.bits =
        sign | rest << 13;  // the exponent is 112 short; a multiplication mends that, subnormals included
    u.value *= 0x1p112f;
  }
  return u.value;
}
D3RT_INLINE void from_float(float value, float* out) { *out = value; }
D3RT_INLINE void from_float(float value, bf16* out) {  // round to nearest even, as torch does; NaN stays NaN
  union {
    float value;
    uint32_t bits;
  } u = {value};
  if (value != value)
    out->bits = 0x7fc0;
  else
    out->bits = static_cast<uint16_t>((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
}

D3RT_INLINE void from_float(float value, f16* out) {  // round to nearest even; past the range becomes inf
  union {
    float value;
    uint32_t bits;
  } u = {value};
  const uint32_t sign = u.bits >> 16 & 0x8000;
  u.bits &= 0x7fffffff;
  if (u.bits > 0x7f800000) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00);
  } else if (u.bits >= 0x477ff000) {
    out->bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (u.bits < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded value in the lowest bits
    u.value += 0.5f;
    out->bits = static_cast<uint16_t>(sign | (u.bits - 0x3f000000));
  } else {
    const uint32_t rounded = u.bits + 0xc8000fff + (u.bits >> 13 & 1);
    out->bits = static_cast<uint16_t>(sign | rounded >> 13);
  }
}

}  // namespace d3rt::cpu
