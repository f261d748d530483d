// What the kernels of one op get: plain addresses and sizes, already checked by ops.cpp.
// Only plain structs live here: these headers are compiled once per ISA, and an inline function or a std
// container would leave a weak symbol that the linker may take from the AVX-512 object into the scalar path.
#pragma once

#include <cstdint>

namespace d3rt::cpu {

// A value of bfloat16: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

enum class Store : uint8_t { f32, bf16 };  // how weights and cache are kept; arithmetic is always float32

// One weight matrix [rows, cols], as torch.nn.Linear keeps it; bias [rows] or null.
struct Matrix {
  const void* data;
  int64_t rows, cols, stride;  // stride in elements
  const float* bias;
  Store store;
};

// K and V of one layer: [B, G, S, d], innermost contiguous; strides in elements.
struct Cache {
  void* k;
  void* v;
  int64_t slot_stride, head_stride, pos_stride;
  Store store;
};

// cos, sin: [S, d/2], the rotation of HF's half-split layout: pair (j, j + d/2).
struct Rope {
  const float* cos;
  const float* sin;
  const int32_t* pos;  // [B]
};

struct EmbedArgs {
  float* x;  // [B, D]
  const int32_t* token;
  const void* table;  // [V, D]
  int64_t stride;
  Store store;
  int B, D;
};

struct NormQkvRopeArgs {
  float* q;        // [B, H, d]
  const float* x;  // [B, D]
  const float* norm;
  Matrix w[3];          // q, k, v
  const float* q_norm;  // [d] or null
  const float* k_norm;
  Cache cache;
  Rope rope;
  float eps;
  int B, D, H, G, d;
};

struct AttentionArgs {
  float* out;      // [B, H, d]
  const float* q;  // [B, H, d]
  Cache cache;
  const int32_t* pos;  // [B]; position pos[b] is the last one read
  float scale;
  int window;  // 0: all positions; w: the last w
  int B, H, G, d, S;
};

struct ProjAddArgs {
  float* x;        // [B, rows], added to
  const float* a;  // [B, cols]
  Matrix w;
  int B;
};

struct NormGateUpArgs {
  float* h;        // [B, F]
  const float* x;  // [B, D]
  const float* norm;
  Matrix gate, up;
  float eps;
  int B, D, F;
};

// One skipped layer of a kv_fill.
struct FillLayer {
  const float* norm;
  Matrix w[2];  // k, v
  const float* k_norm;
  Cache cache;
};

struct KvFillArgs {
  const float* x;  // [B, D]
  const FillLayer* layers;
  int num_layers;
  Rope rope;
  float eps;
  int B, D, G, d;
};

struct NormLogitsArgs {
  float* logits;   // [B, V]
  const float* x;  // [B, D]
  const float* norm;
  Matrix w;
  float eps;
  int B, D;
};

// Positions that one unit of split-KV attention covers. Fixed, so that results do not depend on the thread
// count.
constexpr int kAttentionChunk = 64;

// Every kernel is called once per phase on every thread; all threads finish a phase before any starts the
// next.
template <class Args>
using Kernel = void (*)(const Args& args, float* scratch, int phase, int thread, int num_threads);

// The kernels of one ISA.
struct Kernels {
  const char* isa;
  Kernel<EmbedArgs> embed;
  Kernel<NormQkvRopeArgs> norm_qkv_rope;
  Kernel<AttentionArgs> attention;
  Kernel<ProjAddArgs> proj_add;
  Kernel<NormGateUpArgs> norm_gate_up;
  Kernel<KvFillArgs> kv_fill;
  Kernel<NormLogitsArgs> norm_logits;
  // Lowest index of the maximum of values[n]; -1 if one of them is NaN or none is above -inf.
  int64_t (*argmax)(const float* values, int64_t n);
};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

}  // namespace d3rt::cpu
