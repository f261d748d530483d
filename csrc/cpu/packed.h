// packed_dot: products with an int8 or int4 matrix packed in tiles (args.h), activations quantised to int8 by
// groups. Per group of 32 columns the integer products of a tile's 16 rows are summed exactly, one row a
// lane, then scaled into a float32 accumulator; nothing is summed across lanes. The result is the same
// whatever the ISA, up to the order of float32 additions over groups, which is the same too.
#pragma once

#include "vec.h"

extern "C" float rintf(float);

namespace d3rt::cpu::D3RT_ISA {

// The activations of B slots: codes int8 [B, cols]; scales and sums (of a group's codes) [B, groups].
struct Quantised {
  int8_t* codes;
  float* scales;
  int32_t* sums;
  int64_t cols, groups;
};

// Where in `memory` the codes, scales and sums of B slots lie.
D3RT_INLINE Quantised quantised_at(float* memory, int64_t B, int64_t cols) {
  Quantised q;
  q.cols = cols;
  q.groups = cols / kGroup;
  q.codes = reinterpret_cast<int8_t*>(memory);
  q.scales = memory + B * (cols / 4);
  q.sums = reinterpret_cast<int32_t*>(q.scales + B * q.groups);
  return q;
}

// Slots begin .. end - 1 of x [B, cols]. scale = max |x| / 127, code = round(x * 127 / max |x|), half to
// even: kernels/packing.py quantise_activations.
D3RT_INLINE void quantise_rows(const Quantised& q, const float* x, int64_t x_stride, int64_t begin,
                               int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t g = 0; g < q.groups; ++g) {
      const float* in = x + b * x_stride + g * kGroup;
      int8_t* codes = q.codes + b * q.cols + g * kGroup;
      int32_t sum = 0;
#if defined(D3RT_AVX512)
      const __m512 lo = _mm512_loadu_ps(in), hi = _mm512_loadu_ps(in + 16);
      const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(lo), _mm512_abs_ps(hi)));
      const __m512 inverse = _mm512_set1_ps(largest == 0 ? 0.0f : 127.0f / largest);
      const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(lo, inverse));
      const __m512i b32 = _mm512_cvtps_epi32(_mm512_mul_ps(hi, inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(a));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtepi32_epi8(b32));
      sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b32));
#elif defined(D3RT_NEON)
      float32x4_t v[kGroup / 4], size = vdupq_n_f32(0);
      for (int i = 0; i < kGroup / 4; ++i)
        v[i] = vld1q_f32(in + 4 * i), size = vmaxq_f32(size, vabsq_f32(v[i]));
      const float largest = vmaxvq_f32(size);
      const float inverse = largest == 0 ? 0.0f : 127.0f / largest;
      for (int i = 0; i < kGroup / 4; i += 4) {
        int16x4_t part[4];
        for (int j = 0; j < 4; ++j) part[j] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(v[i + j], inverse)));
        const int8x16_t line = vcombine_s8(vqmovn_s16(vcombine_s16(part[0], part[1])),
                                           vqmovn_s16(vcombine_s16(part[2], part[3])));
        vst1q_s8(codes + 4 * i, line);
        sum += vaddlvq_s8(line);
      }
#else
      float largest = 0;
      for (int i = 0; i < kGroup; ++i) {
        const float size = in[i] < 0 ? -in[i] : in[i];
        largest = size > largest ? size : largest;
      }
      const float inverse = largest == 0 ? 0.0f : 127.0f / largest;
      for (int i = 0; i < kGroup; ++i) {
        codes[i] = static_cast<int8_t>(rintf(in[i] * inverse));
        sum += codes[i];
      }
#endif
      q.scales[b * q.groups + g] = largest / 127.0f;
      q.sums[b * q.groups + g] = sum;
    }
  }
}

// One group of one tile against NB slots: products[b] gets kTileRows sums of code * code (of the codes less
// `zero`). codes[b]: the group's 32 activation codes of slot b; sums[b]: their sum.
#if defined(D3RT_AVX512)

using Products = __m512i;
D3RT_INLINE __m512i word(const int8_t* codes, int c) {
  int32_t four;
  __builtin_memcpy(&four, codes + 4 * c, 4);
  return _mm512_set1_epi32(four);
}
template <int NB>
D3RT_INLINE void group_int8(const int8_t* tile, const int8_t* const* codes, const int32_t* sums,
                            Products* out) {
  // vpdpbusd wants its first factor unsigned: code + 128, and 128 * sum taken off beforehand.
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i even[NB], odd[NB];
  for (int b = 0; b < NB; ++b) even[b] = _mm512_set1_epi32(-128 * sums[b]), odd[b] = _mm512_setzero_si512();
  for (int c = 0; c < 8; c += 2) {
    const __m512i w0 = _mm512_xor_si512(_mm512_loadu_si512(tile + 64 * c), flip);
    const __m512i w1 = _mm512_xor_si512(_mm512_loadu_si512(tile + 64 * c + 64), flip);
    for (int b = 0; b < NB; ++b) {
      even[b] = _mm512_dpbusd_epi32(even[b], w0, word(codes[b], c));
      odd[b] = _mm512_dpbusd_epi32(odd[b], w1, word(codes[b], c + 1));
    }
  }
  for (int b = 0; b < NB; ++b) out[b] = _mm512_add_epi32(even[b], odd[b]);
}
template <int NB>
D3RT_INLINE void group_int4(const uint8_t* tile, int zero, const int8_t* const* codes, const int32_t* sums,
                            Products* out) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i low[NB], high[NB];
  for (int b = 0; b < NB; ++b) low[b] = _mm512_set1_epi32(-zero * sums[b]), high[b] = _mm512_setzero_si512();
  for (int c = 0; c < 4; ++c) {
    const __m512i line = _mm512_loadu_si512(tile + 64 * c);
    const __m512i w0 = _mm512_and_si512(line, nibble),
                  w1 = _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble);
    for (int b = 0; b < NB; ++b) {
      low[b] = _mm512_dpbusd_epi32(low[b], w0, word(codes[b], c));
      high[b] = _mm512_dpbusd_epi32(high[b], w1, word(codes[b], c + 4));
    }
  }
  for (int b = 0; b < NB; ++b) out[b] = _mm512_add_epi32(low[b], high[b]);
}
struct TileAcc {
  __m512 v;
};
struct TileScale {
  __m512 v;
};
D3RT_INLINE TileScale tile_scale(const f16* p) { return {load(p).v}; }
D3RT_INLINE void scale_add(TileAcc& acc, Products products, TileScale scale, float activation) {
  acc.v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_mul_ps(scale.v, _mm512_set1_ps(activation)),
                          acc.v);
}
D3RT_INLINE void minimum_add(TileAcc& acc, TileScale minimum, float activation) {
  acc.v = _mm512_fmadd_ps(minimum.v, _mm512_set1_ps(activation), acc.v);
}
D3RT_INLINE TileAcc tile_zero() { return {_mm512_setzero_ps()}; }
D3RT_INLINE void tile_store(float* out, TileAcc acc) { _mm512_storeu_ps(out, acc.v); }

#elif defined(D3RT_ISA_avx2)

struct Products {
  __m256i half[2];
};
D3RT_INLINE __m256i word(const int8_t* codes, int c) {
  int32_t four;
  __builtin_memcpy(&four, codes + 4 * c, 4);
  return _mm256_set1_epi32(four);
}
D3RT_INLINE __m256i line(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
template <int NB>
D3RT_INLINE void group_int8(const int8_t* tile, const int8_t* const* codes, const int32_t*, Products* out) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int h = 0; h < 2; ++h) {
    __m256i sum[NB];
    for (int b = 0; b < NB; ++b) sum[b] = _mm256_setzero_si256();
    for (int c = 0; c < 8; ++c) {
      const __m256i w = line(tile + 64 * c + 32 * h), size = _mm256_abs_epi8(w);
      for (int b = 0; b < NB; ++b) {  // |w| * sign(w) a: 2 * 127 * 127 fits int16
        const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(word(codes[b], c), w));
        sum[b] = _mm256_add_epi32(sum[b], _mm256_madd_epi16(pairs, ones));
      }
    }
    for (int b = 0; b < NB; ++b) out[b].half[h] = sum[b];
  }
}
template <int NB>
D3RT_INLINE void group_int4(const uint8_t* tile, int zero, const int8_t* const* codes, const int32_t* sums,
                            Products* out) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int h = 0; h < 2; ++h) {
    __m256i sum[NB];  // int16: eight additions of 2 * 15 * 127 stay below 32768
    for (int b = 0; b < NB; ++b) sum[b] = _mm256_setzero_si256();
    for (int c = 0; c < 4; ++c) {
      const __m256i both = line(tile + 64 * c + 32 * h);
      const __m256i w0 = _mm256_and_si256(both, nibble),
                    w1 = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
      for (int b = 0; b < NB; ++b) {
        sum[b] = _mm256_add_epi16(sum[b], _mm256_maddubs_epi16(w0, word(codes[b], c)));
        sum[b] = _mm256_add_epi16(sum[b], _mm256_maddubs_epi16(w1, word(codes[b], c + 4)));
      }
    }
    for (int b = 0; b < NB; ++b)
      out[b].half[h] = _mm256_add_epi32(_mm256_madd_epi16(sum[b], ones), _mm256_set1_epi32(-zero * sums[b]));
  }
}
struct TileAcc {
  __m256 half[2];
};
struct TileScale {
  __m256 half[2];
};
D3RT_INLINE TileScale tile_scale(const f16* p) { return {{load(p).v, load(p + 8).v}}; }
D3RT_INLINE void scale_add(TileAcc& acc, Products products, TileScale scale, float activation) {
  const __m256 a = _mm256_set1_ps(activation);
  for (int h = 0; h < 2; ++h)
    acc.half[h] =
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(products.half[h]), _mm256_mul_ps(scale.half[h], a), acc.half[h]);
}
D3RT_INLINE void minimum_add(TileAcc& acc, TileScale minimum, float activation) {
  const __m256 a = _mm256_set1_ps(activation);
  for (int h = 0; h < 2; ++h) acc.half[h] = _mm256_fmadd_ps(minimum.half[h], a, acc.half[h]);
}
D3RT_INLINE TileAcc tile_zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
D3RT_INLINE void tile_store(float* out, TileAcc acc) {
  _mm256_storeu_ps(out, acc.half[0]);
  _mm256_storeu_ps(out + 8, acc.half[1]);
}

#elif defined(D3RT_NEON)

struct Products {
  int32x4_t quad[4];  // rows 4 i .. 4 i + 3
};

#if defined(D3RT_ISA_neon_dotprod)

// Quads summed at once: three or four sums, so that none waits for its last addition, and all stay in
// registers.
template <int NB>
constexpr int kQuads = NB < 3 ? 4 / NB : 1;
template <int NB>
using Sums = int32x4_t[kQuads<NB>][NB];

// Word kWord (of four) of a row's quad and of the activations: products of four columns.
template <int NB, int kWord>
D3RT_INLINE void add_word(int32x4_t (&sum)[NB], int8x16_t w, const int8x16_t (&codes)[NB]) {
  for (int b = 0; b < NB; ++b) sum[b] = vdotq_laneq_s32(sum[b], w, codes[b], kWord);
}
template <int NB, int kWord>
D3RT_INLINE void add_int8(Sums<NB>& sum, const int8_t* line, const int8x16_t (&codes)[NB]) {
  for (int i = 0; i < kQuads<NB>; ++i) add_word<NB, kWord>(sum[i], vld1q_s8(line + 16 * i), codes);
}
template <int NB, int kWord>
D3RT_INLINE void add_int4(Sums<NB>& sum, const uint8_t* line, const int8x16_t (&low)[NB],
                          const int8x16_t (&high)[NB]) {
  for (int i = 0; i < kQuads<NB>; ++i) {
    const uint8x16_t both = vld1q_u8(line + 16 * i);
    add_word<NB, kWord>(sum[i], vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), low);
    add_word<NB, kWord>(sum[i], vreinterpretq_s8_u8(vshrq_n_u8(both, 4)), high);
  }
}
// The empty asm holds the sums here: compilers would rather sum each slot where it is scaled, with all
// weights of the group unpacked and waiting on the stack.
template <int NB>
D3RT_INLINE void keep(Sums<NB>& sum, int first_quad, Products* out) {
  for (int i = 0; i < kQuads<NB>; ++i)
    for (int b = 0; b < NB; ++b) {
      asm volatile("" : "+w"(sum[i][b]));
      out[b].quad[first_quad + i] = sum[i][b];
    }
}
template <int NB>
D3RT_INLINE void group_int8(const int8_t* tile, const int8_t* const* codes, const int32_t*, Products* out) {
  int8x16_t low[NB], high[NB];
  for (int b = 0; b < NB; ++b) low[b] = vld1q_s8(codes[b]), high[b] = vld1q_s8(codes[b] + 16);
  for (int quad = 0; quad < 4; quad += kQuads<NB>) {
    const int8_t* line = tile + 16 * quad;
    Sums<NB> sum;
    for (int i = 0; i < kQuads<NB>; ++i)
      for (int b = 0; b < NB; ++b) sum[i][b] = vdupq_n_s32(0);
    add_int8<NB, 0>(sum, line, low);
    add_int8<NB, 1>(sum, line + 64, low);
    add_int8<NB, 2>(sum, line + 128, low);
    add_int8<NB, 3>(sum, line + 192, low);
    add_int8<NB, 0>(sum, line + 256, high);
    add_int8<NB, 1>(sum, line + 320, high);
    add_int8<NB, 2>(sum, line + 384, high);
    add_int8<NB, 3>(sum, line + 448, high);
    keep<NB>(sum, quad, out);
  }
}
template <int NB>
D3RT_INLINE void group_int4(const uint8_t* tile, int zero, const int8_t* const* codes, const int32_t* sums,
                            Products* out) {
  int8x16_t low[NB], high[NB];
  for (int b = 0; b < NB; ++b) low[b] = vld1q_s8(codes[b]), high[b] = vld1q_s8(codes[b] + 16);
  for (int quad = 0; quad < 4; quad += kQuads<NB>) {
    const uint8_t* line = tile + 16 * quad;
    Sums<NB> sum;
    for (int i = 0; i < kQuads<NB>; ++i)
      for (int b = 0; b < NB; ++b) sum[i][b] = vdupq_n_s32(-zero * sums[b]);
    add_int4<NB, 0>(sum, line, low, high);
    add_int4<NB, 1>(sum, line + 64, low, high);
    add_int4<NB, 2>(sum, line + 128, low, high);
    add_int4<NB, 3>(sum, line + 192, low, high);
    keep<NB>(sum, quad, out);
  }
}

#else  // ARMv8.0 multiplies int8 into int16: a register is two rows' four columns

// Slots taken at once: the sums of more would not fit the registers, and tiles come from L1 a second time.
template <int NB>
constexpr int kSlots = NB < 2 ? NB : 2;

D3RT_INLINE int8x16_t word(const int8_t* codes, int c) {
  int32_t four;
  __builtin_memcpy(&four, codes + 4 * c, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
template <int NB>
D3RT_INLINE void group_int8(const int8_t* tile, const int8_t* const* codes, const int32_t* sums,
                            Products* out) {
  constexpr int kN = kSlots<NB>;
  int32x4_t low[kN][4], high[kN][4];  // the first and last two rows of each quad
  for (int b = 0; b < kN; ++b)
    for (int i = 0; i < 4; ++i) low[b][i] = high[b][i] = vdupq_n_s32(0);
  for (int c = 0; c < 8; c += 2) {
    int8x16_t a0[kN], a1[kN];
    for (int b = 0; b < kN; ++b) a0[b] = word(codes[b], c), a1[b] = word(codes[b], c + 1);
    for (int i = 0; i < 4; ++i) {
      const int8x16_t w0 = vld1q_s8(tile + 64 * c + 16 * i), w1 = vld1q_s8(tile + 64 * c + 64 + 16 * i);
      for (int b = 0; b < kN; ++b) {  // int16: 2 * 127 * 127 fits
        const int16x8_t one = vmull_s8(vget_low_s8(w0), vget_low_s8(a0[b])), two = vmull_high_s8(w0, a0[b]);
        low[b][i] = vpadalq_s16(low[b][i], vmlal_s8(one, vget_low_s8(w1), vget_low_s8(a1[b])));
        high[b][i] = vpadalq_s16(high[b][i], vmlal_high_s8(two, w1, a1[b]));
      }
    }
  }
  for (int b = 0; b < kN; ++b)
    for (int i = 0; i < 4; ++i) out[b].quad[i] = vpaddq_s32(low[b][i], high[b][i]);
  if constexpr (NB > kN) group_int8<NB - kN>(tile, codes + kN, sums + kN, out + kN);
}
template <int NB>
D3RT_INLINE void group_int4(const uint8_t* tile, int zero, const int8_t* const* codes, const int32_t* sums,
                            Products* out) {
  constexpr int kN = kSlots<NB>;
  int16x8_t low[kN][4], high[kN][4];
  for (int b = 0; b < kN; ++b)
    for (int i = 0; i < 4; ++i) low[b][i] = high[b][i] = vdupq_n_s16(0);
  for (int c = 0; c < 4; ++c) {
    int8x16_t a0[kN], a1[kN];
    for (int b = 0; b < kN; ++b) a0[b] = word(codes[b], c), a1[b] = word(codes[b], c + 4);
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t both = vld1q_u8(tile + 64 * c + 16 * i);
      const int8x16_t w0 = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      const int8x16_t w1 = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
      for (int b = 0; b < kN; ++b) {
        low[b][i] = vmlal_s8(low[b][i], vget_low_s8(w0), vget_low_s8(a0[b]));
        high[b][i] = vmlal_high_s8(high[b][i], w0, a0[b]);
        low[b][i] = vmlal_s8(low[b][i], vget_low_s8(w1), vget_low_s8(a1[b]));
        high[b][i] = vmlal_high_s8(high[b][i], w1, a1[b]);
      }
    }
  }
  for (int b = 0; b < kN; ++b)
    for (int i = 0; i < 4; ++i) {  // int16: two columns of eight words, 2 * 8 * 15 * 127, fit
      const int32x4_t rows = vpaddlq_s16(vpaddq_s16(low[b][i], high[b][i]));
      out[b].quad[i] = vaddq_s32(rows, vdupq_n_s32(-zero * sums[b]));
    }
  if constexpr (NB > kN) group_int4<NB - kN>(tile, zero, codes + kN, sums + kN, out + kN);
}

#endif

struct TileAcc {
  float32x4_t quad[4];
};
struct TileScale {
  float32x4_t quad[4];
};
D3RT_INLINE TileScale tile_scale(const f16* p) {
  return {{load(p).v, load(p + 4).v, load(p + 8).v, load(p + 12).v}};
}
D3RT_INLINE void scale_add(TileAcc& acc, const Products& products, const TileScale& scale, float activation) {
  for (int i = 0; i < 4; ++i)
    acc.quad[i] =
        vfmaq_f32(acc.quad[i], vcvtq_f32_s32(products.quad[i]), vmulq_n_f32(scale.quad[i], activation));
}
D3RT_INLINE void minimum_add(TileAcc& acc, const TileScale& minimum, float activation) {
  for (int i = 0; i < 4; ++i) acc.quad[i] = vfmaq_n_f32(acc.quad[i], minimum.quad[i], activation);
}
D3RT_INLINE TileAcc tile_zero() { return {{vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)}}; }
D3RT_INLINE void tile_store(float* out, const TileAcc& acc) {
  for (int i = 0; i < 4; ++i) vst1q_f32(out + 4 * i, acc.quad[i]);
}

#else  // scalar: plain loops over the lanes, which compilers turn into vectors

struct Products {
  int32_t lane[kTileRows];
};
template <int NB>
D3RT_INLINE void group_int8(const int8_t* tile, const int8_t* const* codes, const int32_t*, Products* out) {
  for (int b = 0; b < NB; ++b) {
    for (int row = 0; row < kTileRows; ++row) out[b].lane[row] = 0;
    for (int c = 0; c < 8; ++c)
      for (int row = 0; row < kTileRows; ++row)
        for (int j = 0; j < 4; ++j) out[b].lane[row] += tile[64 * c + 4 * row + j] * codes[b][4 * c + j];
  }
}
template <int NB>
D3RT_INLINE void group_int4(const uint8_t* tile, int zero, const int8_t* const* codes, const int32_t* sums,
                            Products* out) {
  for (int b = 0; b < NB; ++b) {
    for (int row = 0; row < kTileRows; ++row) out[b].lane[row] = -zero * sums[b];
    for (int c = 0; c < 4; ++c)
      for (int row = 0; row < kTileRows; ++row)
        for (int j = 0; j < 4; ++j) {
          const int both = tile[64 * c + 4 * row + j];
          out[b].lane[row] += (both & 15) * codes[b][4 * c + j] + (both >> 4) * codes[b][16 + 4 * c + j];
        }
  }
}
struct TileAcc {
  float lane[kTileRows];
};
struct TileScale {
  float lane[kTileRows];
};
D3RT_INLINE TileScale tile_scale(const f16* p) {
  TileScale scale;
  for (int row = 0; row < kTileRows; ++row) scale.lane[row] = to_float(p[row]);
  return scale;
}
D3RT_INLINE void scale_add(TileAcc& acc, const Products& products, const TileScale& scale, float activation) {
  for (int row = 0; row < kTileRows; ++row)
    acc.lane[row] += static_cast<float>(products.lane[row]) * (scale.lane[row] * activation);
}
D3RT_INLINE void minimum_add(TileAcc& acc, const TileScale& minimum, float activation) {
  for (int row = 0; row < kTileRows; ++row) acc.lane[row] += minimum.lane[row] * activation;
}
D3RT_INLINE TileAcc tile_zero() { return {}; }
D3RT_INLINE void tile_store(float* out, const TileAcc& acc) {
  for (int row = 0; row < kTileRows; ++row) out[row] = acc.lane[row];
}

#endif

// How a packed matrix is prefetched: codes, and their scales and minima, so many bytes ahead. Where memory is
// fast (60 GB/s, Zen 4), int4 comes at 42 GB/s by way of the second cache and at 60 into the first; int8 at
// 59, and at 54.
template <Store store>
struct Stream {
  static constexpr int kAhead = 2048, kScalesAhead = 512, kCache = kSecondCache;
};
template <>
struct Stream<Store::int4> {
  static constexpr int kAhead = 4096, kScalesAhead = 256, kCache = kFirstCache;
};
template <Store store>
constexpr int64_t kGroupBytes = kTileRows * kGroup / (store == Store::int4 ? 2 : 1);

// kBytes of codes that lie `ahead` bytes after those of `group` (counted over all tiles), and kScaleBytes of
// scales and minima that lie scales_ahead after theirs.
template <Store store, int kBytes, int kScaleBytes>
D3RT_INLINE void prefetch_group(const Matrix& m, int64_t group, int64_t ahead, int64_t scales_ahead) {
  constexpr int kCache = Stream<store>::kCache;
  prefetch<kBytes, kCache>(static_cast<const uint8_t*>(m.data) + group * kGroupBytes<store>, ahead);
  prefetch<kScaleBytes, kCache>(m.scales + group * kTileRows, scales_ahead);
  if (m.minima) prefetch<kScaleBytes, kCache>(m.minima + group * kTileRows, scales_ahead);
}
template <Store store>
D3RT_INLINE void warm_group(const Matrix& m, int64_t group) {
  prefetch_group<store, Stream<store>::kAhead, Stream<store>::kScalesAhead>(m, group, 0, 0);
}

// NB slots, one tile: out[b][row].
template <Store store, int NB>
D3RT_INLINE void packed_tile(const Matrix& m, int64_t tile, const Quantised& q, int first_slot,
                             float (&out)[NB][kTileRows]) {
  constexpr int64_t kBytes = kGroupBytes<store>;
  const uint8_t* data = static_cast<const uint8_t*>(m.data) + tile * q.groups * kBytes;
  const f16* scales = m.scales + tile * q.groups * kTileRows;
  const f16* minima = m.minima ? m.minima + tile * q.groups * kTileRows : nullptr;
  TileAcc acc[NB];
  for (int b = 0; b < NB; ++b) acc[b] = tile_zero();
  for (int64_t g = 0; g < q.groups; ++g) {
    prefetch_group<store, kBytes, 64>(m, tile * q.groups + g, Stream<store>::kAhead,
                                      Stream<store>::kScalesAhead);
    const int8_t* codes[NB];
    int32_t sums[NB];
    Products products[NB];
    for (int b = 0; b < NB; ++b) {
      codes[b] = q.codes + (first_slot + b) * q.cols + g * kGroup;
      sums[b] = q.sums[(first_slot + b) * q.groups + g];
    }
    if (store == Store::int8)
      group_int8<NB>(reinterpret_cast<const int8_t*>(data + g * kBytes), codes, sums, products);
    else
      group_int4<NB>(data + g * kBytes, minima ? 0 : 8, codes, sums, products);
    const TileScale scale = tile_scale(scales + g * kTileRows);
    for (int b = 0; b < NB; ++b)
      scale_add(acc[b], products[b], scale, q.scales[(first_slot + b) * q.groups + g]);
    if (minima) {
      const TileScale minimum = tile_scale(minima + g * kTileRows);
      for (int b = 0; b < NB; ++b)
        minimum_add(acc[b], minimum, q.scales[(first_slot + b) * q.groups + g] * static_cast<float>(sums[b]));
    }
  }
  for (int b = 0; b < NB; ++b) tile_store(out[b], acc[b]);
}

template <Store store, int NB, class Sink>
D3RT_INLINE void packed_tile_to(const Matrix& m, int64_t tile, const Quantised& q, int first_slot,
                                const Sink& sink) {
  float out[NB][kTileRows];
  packed_tile<store, NB>(m, tile, q, first_slot, out);
  const int64_t row = tile * kTileRows;
  const int rows = m.rows - row < kTileRows ? static_cast<int>(m.rows - row) : kTileRows;
  for (int b = 0; b < NB; ++b)
    for (int r = 0; r < rows; ++r) sink(first_slot + b, row + r, out[b][r]);
}

// sink(slot, row, value) for every slot and every row of tiles begin .. end - 1.
template <Store store, class Sink>
D3RT_INLINE void packed_dot(const Matrix& m, const Quantised& q, int B, int64_t begin, int64_t end,
                            const Sink& sink) {
  for (int64_t tile = begin; tile < end; ++tile) {
    int b = 0;
    for (; b + 4 <= B; b += 4) packed_tile_to<store, 4>(m, tile, q, b, sink);
    switch (B - b) {
      case 3:
        packed_tile_to<store, 3>(m, tile, q, b, sink);
        break;
      case 2:
        packed_tile_to<store, 2>(m, tile, q, b, sink);
        break;
      case 1:
        packed_tile_to<store, 1>(m, tile, q, b, sink);
        break;
      default:
        break;
    }
  }
}

// Row `row` of a packed matrix, columns begin .. end - 1, as floats.
D3RT_INLINE void unpack_row(const Matrix& m, int64_t row, int64_t begin, int64_t end, float* out) {
  const int64_t groups = m.cols / kGroup, tile = row / kTileRows, lane = row % kTileRows;
  for (int64_t col = begin; col < end; ++col) {
    const int64_t at = tile * groups + col / kGroup, c = col % kGroup / 4, j = col % 4;
    const float scale = to_float(m.scales[at * kTileRows + lane]);
    if (m.store == Store::int8) {
      const int8_t* data = static_cast<const int8_t*>(m.data) + at * kTileRows * kGroup;
      out[col] = static_cast<float>(data[(c * kTileRows + lane) * 4 + j]) * scale;
    } else {
      const uint8_t* data = static_cast<const uint8_t*>(m.data) + at * kTileRows * kGroup / 2;
      const int both = data[(c % 4 * kTileRows + lane) * 4 + j], code = c < 4 ? both & 15 : both >> 4;
      out[col] = m.minima ? static_cast<float>(code) * scale + to_float(m.minima[at * kTileRows + lane])
                          : static_cast<float>(code - 8) * scale;
    }
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
