// Vec: the few float32 SIMD operations the kernels are written in, once per ISA.
// D3RT_ISA_<name> chooses; everything sits in that ISA's own namespace and is static, so nothing leaks
// between ISAs. A new ISA is one more block here and one more object library in CMakeLists.txt.
#pragma once

#include "floats.h"

#if defined(D3RT_ISA_avx512) || defined(D3RT_ISA_avx512_bf16)
#define D3RT_AVX512  // the two differ in how bfloat16 is multiplied: attend_products.h, halves_dot.h
#endif
#if defined(D3RT_ISA_avx2) || defined(D3RT_AVX512)
#include <immintrin.h>
#elif defined(D3RT_ISA_neon) || defined(D3RT_ISA_neon_dotprod)
#define D3RT_NEON  // the two differ only in packed.h, in how int8 products are summed
#include <arm_neon.h>
#endif

// The kernels call libm only in the scalar build; declared here because <cmath> brings inline std::
// overloads.
extern "C" {
float expf(float);
float sqrtf(float);
}

namespace d3rt::cpu::D3RT_ISA {

// Asks for the kBytes that lie `ahead` bytes after p to be brought near: into the second cache, or the first.
// Never faults, wherever that is.
constexpr int kSecondCache = 2, kFirstCache = 3;
template <int kBytes, int kCache = kSecondCache>
D3RT_INLINE void prefetch(const void* p, int64_t ahead) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead);
  for (int line = 0; line < kBytes; line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(at + static_cast<uintptr_t>(line)), 0, kCache);
}
D3RT_INLINE void prefetch_lines(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) prefetch<64>(p, at);
}
// How far ahead of its loads a stream of weights is prefetched. The hardware's own prefetch leaves a quarter
// of the bandwidth unused on some processors (Xeon, fourth generation: 24 GB/s without, 32 with); 1 to 4 KiB
// do as well.
constexpr int kStreamAhead = 2048;

#if defined(D3RT_AVX512)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};
D3RT_INLINE Vec set1(float value) { return {_mm512_set1_ps(value)}; }
D3RT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
D3RT_INLINE Vec load(const bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
D3RT_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
D3RT_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
D3RT_INLINE Vec load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
D3RT_INLINE Vec load_partial(const bf16* p, int n) {
  const __m256i raw = _mm256_maskz_loadu_epi16(first(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
D3RT_INLINE Vec load_partial(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}
D3RT_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
D3RT_INLINE void store_partial(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
D3RT_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
D3RT_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
D3RT_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
D3RT_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
D3RT_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
D3RT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
D3RT_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
D3RT_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
D3RT_INLINE __m256 halves_added(__m512 a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
// out[0..3] = sum(a), sum(b), sum(c), sum(d)
D3RT_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m256 ab = _mm256_hadd_ps(halves_added(a.v), halves_added(b.v));
  const __m256 abcd = _mm256_hadd_ps(ab, _mm256_hadd_ps(halves_added(c.v), halves_added(d.v)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
D3RT_INLINE Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
D3RT_INLINE Vec load_partial(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}
D3RT_INLINE Vec round_nearest(Vec a) { return {_mm512_roundscale_ps(a.v, 0)}; }
D3RT_INLINE Vec scale_by_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
D3RT_INLINE bool any_nan_or_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_UQ) != 0; }

#elif defined(D3RT_ISA_avx2)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};
D3RT_INLINE Vec set1(float value) { return {_mm256_set1_ps(value)}; }
D3RT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
D3RT_INLINE Vec widen(__m128i raw) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
D3RT_INLINE Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
D3RT_INLINE Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
D3RT_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
D3RT_INLINE Vec load_partial(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
D3RT_INLINE Vec load_partial(const bf16* p, int n) {
  alignas(16) uint16_t lanes[8] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i].bits;
  return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
}
D3RT_INLINE Vec load_partial(const f16* p, int n) {
  alignas(16) f16 lanes[8] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
D3RT_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
D3RT_INLINE void store_partial(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
D3RT_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
D3RT_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
D3RT_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
D3RT_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
D3RT_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
D3RT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
D3RT_INLINE float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
D3RT_INLINE float largest(Vec a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
// out[0..3] = sum(a), sum(b), sum(c), sum(d)
D3RT_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
D3RT_INLINE Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
D3RT_INLINE Vec load_partial(const int8_t* p, int n) {
  alignas(8) int8_t lanes[8] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
D3RT_INLINE Vec round_nearest(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
D3RT_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
D3RT_INLINE bool any_nan_or_equal(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_UQ)) != 0;
}

#elif defined(D3RT_NEON)

struct Vec {
  static constexpr int kLanes = 4;
  float32x4_t v;
};
D3RT_INLINE Vec set1(float value) { return {vdupq_n_f32(value)}; }
D3RT_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
D3RT_INLINE Vec load(const bf16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}
D3RT_INLINE Vec load(const f16* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
template <class T>
D3RT_INLINE Vec load_partial(const T* p, int n) {
  float lanes[4] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return {vld1q_f32(lanes)};
}
D3RT_INLINE void store(float* p, Vec a) { vst1q_f32(p, a.v); }
D3RT_INLINE void store_partial(float* p, Vec a, int n) {
  float lanes[4];
  vst1q_f32(lanes, a.v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
D3RT_INLINE Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
D3RT_INLINE Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
D3RT_INLINE Vec div(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
D3RT_INLINE Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
D3RT_INLINE Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
D3RT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
D3RT_INLINE float sum(Vec a) { return vaddvq_f32(a.v); }
D3RT_INLINE float largest(Vec a) { return vmaxvq_f32(a.v); }
// out[0..3] = sum(a), sum(b), sum(c), sum(d)
D3RT_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v)));
}
D3RT_INLINE Vec load(const int8_t* p) {
  int8_t lanes[8] = {p[0], p[1], p[2], p[3]};
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(lanes)))))};
}
D3RT_INLINE Vec round_nearest(Vec a) { return {vrndnq_f32(a.v)}; }
D3RT_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}
D3RT_INLINE bool any_nan_or_equal(Vec a, Vec b) {
  const uint32x4_t less_or_greater = vorrq_u32(vcltq_f32(a.v, b.v), vcgtq_f32(a.v, b.v));
  return vminvq_u32(less_or_greater) == 0;
}

#else  // scalar

struct Vec {
  static constexpr int kLanes = 1;
  float v;
};
D3RT_INLINE Vec set1(float value) { return {value}; }
template <class T>
D3RT_INLINE Vec load(const T* p) {
  return {to_float(*p)};
}
template <class T>
D3RT_INLINE Vec load_partial(const T* p, int n) {
  return {n > 0 ? to_float(*p) : 0.0f};
}
D3RT_INLINE void store(float* p, Vec a) { *p = a.v; }
D3RT_INLINE void store_partial(float* p, Vec a, int n) {
  if (n > 0) *p = a.v;
}
D3RT_INLINE Vec add(Vec a, Vec b) { return {a.v + b.v}; }
D3RT_INLINE Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
D3RT_INLINE Vec div(Vec a, Vec b) { return {a.v / b.v}; }
D3RT_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
D3RT_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
D3RT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
D3RT_INLINE float sum(Vec a) { return a.v; }
D3RT_INLINE float largest(Vec a) { return a.v; }
D3RT_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = a.v, out[1] = b.v, out[2] = c.v, out[3] = d.v;
}
D3RT_INLINE bool any_nan_or_equal(Vec a, Vec b) { return !(a.v < b.v || a.v > b.v); }

#endif

// 2 kLanes neighbours at p as two vectors, in whichever order is cheapest to make.
struct Pair {
  Vec first, second;
};
template <class T>
D3RT_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + Vec::kLanes)};
}
// 2 kLanes neighbours of x as they meet load_pair's of a T.
template <class T>
D3RT_INLINE Pair pair_of(const float* p, const T*) {
  return {load(p), load(p + Vec::kLanes)};
}
// A pair that belongs to load_pair's of a T, as 2 kLanes neighbours at p again.
template <class T>
D3RT_INLINE void store_pair(float* p, Pair a, const T*) {
  store(p, a.first);
  store(p + Vec::kLanes, a.second);
}
#if !defined(D3RT_ISA_scalar)
// A bfloat16 is the upper half of a float, so a vector of 32-bit words is its odd elements as they are and
// its even ones shifted: half the work of widening neighbours.
#if defined(D3RT_AVX512)
D3RT_INLINE Pair pair_of_words(__m512i words) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}};
}
#endif
D3RT_INLINE Pair load_pair(const bf16* p) {
#if defined(D3RT_AVX512)
  return pair_of_words(_mm512_loadu_si512(p));
#elif defined(D3RT_ISA_avx2)
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))}};
#else
  const uint32x4_t words = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  return {{vreinterpretq_f32_u32(vshlq_n_u32(words, 16))},
          {vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000u)))}};
#endif
}
D3RT_INLINE Pair pair_of(const float* p, const bf16*) {
  const Vec low = load(p), high = load(p + Vec::kLanes);
#if defined(D3RT_AVX512)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(low.v, even, high.v)}, {_mm512_permutex2var_ps(low.v, odd, high.v)}};
#elif defined(D3RT_ISA_avx2)
  const auto in_order = [](__m256 a) {
    return Vec{_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8))};
  };
  return {in_order(_mm256_shuffle_ps(low.v, high.v, 0x88)), in_order(_mm256_shuffle_ps(low.v, high.v, 0xdd))};
#else
  return {{vuzp1q_f32(low.v, high.v)}, {vuzp2q_f32(low.v, high.v)}};
#endif
}
D3RT_INLINE void store_pair(float* p, Pair a, const bf16*) {
#if defined(D3RT_AVX512)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  store(p, {_mm512_permutex2var_ps(a.first.v, low, a.second.v)});
  store(p + Vec::kLanes, {_mm512_permutex2var_ps(a.first.v, high, a.second.v)});
#elif defined(D3RT_ISA_avx2)
  const __m256 low = _mm256_unpacklo_ps(a.first.v, a.second.v);
  const __m256 high = _mm256_unpackhi_ps(a.first.v, a.second.v);
  store(p, {_mm256_permute2f128_ps(low, high, 0x20)});
  store(p + Vec::kLanes, {_mm256_permute2f128_ps(low, high, 0x31)});
#else
  store(p, {vzip1q_f32(a.first.v, a.second.v)});
  store(p + Vec::kLanes, {vzip2q_f32(a.first.v, a.second.v)});
#endif
}
#endif

// load_pair, for what is in a cache already. GCC makes load_pair's one load into two, one for each half,
// which costs where one a cycle is all there is (Zen 4); but what streams from memory comes at 60 GB/s like
// that, and at 43 if each line is loaded once.
template <class T>
D3RT_INLINE Pair load_pair_once(const T* p) {
  return load_pair(p);
}
#if defined(D3RT_AVX512)
D3RT_INLINE Pair load_pair_once(const bf16* p) {
  __m512i words = _mm512_loadu_si512(p);
  asm("" : "+v"(words));
  return pair_of_words(words);
}
#endif

#if defined(D3RT_AVX512) || defined(D3RT_ISA_avx2)
#define D3RT_INT16_PRODUCTS  // int16 are multiplied two to a lane, and summed exactly in int32

// The two 16-bit numbers at p.
D3RT_INLINE int32_t two_at(const void* p) {
  int32_t two;
  __builtin_memcpy(&two, p, sizeof two);
  return two;
}

struct Words {
  static constexpr int kCount = 2 * Vec::kLanes;
#if defined(D3RT_AVX512)
  __m512i v;
#else
  __m256i v;
#endif
};
// Sums of their products.
struct Whole {
  decltype(Words::v) v;
};
#if defined(D3RT_AVX512)
D3RT_INLINE Words load_factors(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
D3RT_INLINE Words load_factors(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
D3RT_INLINE Whole add_products(Whole sum, Words a, Words b) { return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)}; }
D3RT_INLINE Vec floats_of(Whole a) { return {_mm512_cvtepi32_ps(a.v)}; }
// The nearest whole numbers, half to even.
D3RT_INLINE void store(int16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
D3RT_INLINE Words repeat_two(const int16_t* p) { return {_mm512_set1_epi32(two_at(p))}; }
D3RT_INLINE void zip(Words a, Words b, Words* some, Words* others) {
  *some = {_mm512_unpacklo_epi16(a.v, b.v)};
  *others = {_mm512_unpackhi_epi16(a.v, b.v)};
}
D3RT_INLINE void store_zipped(float* p, Vec some, Vec others) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  store(p, {_mm512_permutex2var_ps(some.v, low, others.v)});
  store(p + Vec::kLanes, {_mm512_permutex2var_ps(some.v, high, others.v)});
}
#else
D3RT_INLINE Words load_factors(const int16_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
D3RT_INLINE Words load_factors(const int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
D3RT_INLINE Whole add_products(Whole sum, Words a, Words b) {
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))};
}
D3RT_INLINE Vec floats_of(Whole a) { return {_mm256_cvtepi32_ps(a.v)}; }
D3RT_INLINE void store(int16_t* p, Vec a) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
D3RT_INLINE Words repeat_two(const int16_t* p) { return {_mm256_set1_epi32(two_at(p))}; }
D3RT_INLINE void zip(Words a, Words b, Words* some, Words* others) {
  *some = {_mm256_unpacklo_epi16(a.v, b.v)};
  *others = {_mm256_unpackhi_epi16(a.v, b.v)};
}
D3RT_INLINE void store_zipped(float* p, Vec some, Vec others) {
  store(p, {_mm256_permute2f128_ps(some.v, others.v, 0x20)});
  store(p + Vec::kLanes, {_mm256_permute2f128_ps(some.v, others.v, 0x31)});
}
#endif
#endif

#if defined(D3RT_ISA_avx512_bf16)
#define D3RT_BF16_PRODUCTS  // bfloat16 are multiplied as they are, two to a lane, and summed in float32

struct Halves {
  static constexpr int kCount = 32;
  __m512bh v;
};
D3RT_INLINE Halves load_factors(const bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
D3RT_INLINE Halves load_partial_factors(const bf16* p, int n) {
  return {(__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p)};
}
// The two at p, in every lane.
D3RT_INLINE Halves repeat_two(const bf16* p) { return {(__m512bh)_mm512_set1_epi32(two_at(p))}; }
// Lane i: a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] more than before.
D3RT_INLINE Vec add_products(Vec sum, Halves a, Halves b) { return {_mm512_dpbf16_ps(sum.v, a.v, b.v)}; }
D3RT_INLINE Vec floats_of(Vec a) { return a; }
// Element i of a beside element i of b, a lane for each i; store_zipped puts sums of these lanes in order.
D3RT_INLINE void zip(Halves a, Halves b, Halves* some, Halves* others) {
  *some = {(__m512bh)_mm512_unpacklo_epi16((__m512i)a.v, (__m512i)b.v)};
  *others = {(__m512bh)_mm512_unpackhi_epi16((__m512i)a.v, (__m512i)b.v)};
}
// A vector's values rounded to the nearest, half to even.
D3RT_INLINE void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
#endif

// What products of 16-bit numbers are made of and summed in.
template <class M>
struct Factors {};
#if defined(D3RT_INT16_PRODUCTS)
template <>
struct Factors<int16_t> {
  using Several = Words;
  using Sum = Whole;
};
#endif
#if defined(D3RT_BF16_PRODUCTS)
template <>
struct Factors<bf16> {
  using Several = Halves;
  using Sum = Vec;
};
#endif

#if defined(D3RT_ISA_scalar)
D3RT_INLINE Vec exp(Vec a) { return {expf(a.v)}; }
#else
// exp to about 1 ulp of float32: 2^n * p(r), |r| <= ln2/2, with Cephes' expf polynomial (S. Moshier, netlib).
// Clamped to the finite range: exp(-1000) is 1e-38 rather than 0, exp(1000) is 2e38 rather than inf. NaN
// stays NaN (x86 max and min return their second operand when one is NaN): a hole that is read by mistake
// must show.
D3RT_INLINE Vec exp(Vec a) {
  a = min(set1(88.0f), max(set1(-87.0f), a));
  const Vec n = round_nearest(mul(a, set1(1.44269504088896341f)));
  Vec r = fma(n, set1(-0.693359375f), a);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return scale_by_power_of_two(p, n);
}
#endif

// x * sigmoid(x)
D3RT_INLINE Vec silu(Vec x) { return div(x, add(set1(1.0f), exp(mul(x, set1(-1.0f))))); }

}  // namespace d3rt::cpu::D3RT_ISA
