// What the kernels of one op get: plain addresses and sizes, already checked by ops.cpp.
// Only plain structs live here: these headers are compiled once per ISA, and an inline function or a std
// container would leave a weak symbol that the linker may take from the AVX-512 object into the scalar path.
#pragma once

#include <cstdint>

namespace d3rt::cpu {

// A value of bfloat16: the upper half of a float32. A value of IEEE float16.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// How weights and cache are kept. int8 and int4 are packed in tiles (below) and are for weights only; with
// them the activations are quantised to int8 on the fly; bf16 may round them to bfloat16 (halves_dot.h);
// otherwise arithmetic is float32 throughout.
enum class Store : uint8_t { f32, bf16, f16, int8, int4 };

// A packed matrix is cut into tiles of kTileRows rows, and a tile into groups of kGroup columns, each with
// one float16 scale a row. Inside a group four neighbouring columns of a row make a 32-bit word, and the
// words of the tile's rows lie side by side: one vector load brings the same columns of all rows, the
// products are summed lane by lane, and no horizontal sum is ever needed. The definition is
// kernels/packing.py.
//   int8: [tiles, groups, 8, kTileRows, 4] signed bytes; word c of a row holds columns 4 c .. 4 c + 3 of its
//   group. int4: [tiles, groups, 4, kTileRows, 4] bytes; low nibbles are word c = 0..3, high nibbles word c
//   + 4. A nibble q
//         stands for (q - 8) * scale, or, with minima, for q * scale + minimum.
constexpr int kTileRows = 16;
constexpr int kGroup = 32;
// Scratch for the quantised activations of one slot, in floats per 16 columns: codes, and a scale and a sum a
// group.
constexpr int kQuantisedFloatsPer16 = 5;

// bfloat16 values that the activations of B slots take where they are rounded to it (halves_dot.h): up to 2,
// 4 or 8 slots at once, up to 32 columns.
static inline int64_t rounded_halves(int64_t B, int64_t cols) {
  const int64_t rest = B % 8, slots = B - rest + (rest > 4 ? 8 : rest > 2 ? 4 : rest);
  return slots * ((cols + 31) / 32 * 32);
}

// Scratch for the activations of an op in the forms that its matrices want beside float32: quantised; and one
// slot in the order of pairs (vec.h), or all rounded to bfloat16.
static inline int64_t prepared_floats(int64_t B, int64_t cols) {
  const int64_t rounded = rounded_halves(B, cols) / 2;
  return B * cols / 16 * kQuantisedFloatsPer16 + (rounded > cols ? rounded : cols);
}

// One weight matrix [rows, cols]; bias [rows] or null. Plain: as torch.nn.Linear keeps it, `stride` elements
// a row. Packed: cols is a multiple of kGroup; rows are padded to whole tiles in memory.
struct Matrix {
  const void* data;
  int64_t rows, cols, stride;
  const float* bias;
  Store store;
  const f16* scales;  // [tiles, groups, kTileRows]
  const f16* minima;  // the same, or null
};

// K and V of one layer: [B, G, S, d], innermost contiguous; strides in elements. As int8, a line (one
// position of one head) is d codes and then their float32 scale, unaligned: [B, G, S, d + 4] bytes.
constexpr int kLineScaleBytes = 4;
struct Cache {
  void* k;
  void* v;
  int64_t slot_stride, head_stride, pos_stride;
  Store store;
  const int32_t* lines;  // [B], which line of the cache is whose; null: slot b has line b
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
  Matrix table;  // [V, D]
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

// hidden[line of b, pos[b]] = x[b]
struct KeepHiddenArgs {
  void* hidden;
  int64_t line_stride, pos_stride;
  Store store;
  const float* x;        // [B, D]
  const int32_t* pos;    // [B]
  const int32_t* lines;  // [B] or null
  int B, D;
};

struct NormLogitsArgs {
  float* logits;   // [B, V]
  const float* x;  // [B, D]
  const float* norm;
  Matrix w;
  float eps;
  int B, D;
};

struct CopyHiddenArgs {
  float* out;      // [B, D]
  const float* x;  // [B, D]
  int B, D;
};

struct HiddenCosineArgs {
  float* out;      // [B]
  const float* a;  // [B, D]
  const float* b;  // [B, D]
  int B, D;
};
// What stands for the product of the two lengths where that is less: no direction is like that of zeros.
constexpr float kSmallestNorms = 1e-30f;

struct Top2MarginArgs {
  float* out;           // [B]
  const float* logits;  // [B, V]
  int B;
  int64_t V;
};
// Logits that one unit of top2_margin covers. Fixed, so that results do not depend on the thread count.
constexpr int64_t kMarginChunk = 4096;

struct LinearArgs {
  float* out;      // [T, rows]
  const float* a;  // [T, cols]
  Matrix w;        // packed
  int T;
};

struct UnpackArgs {
  void* out;  // [rows, cols]
  Matrix w;   // packed
  Store as;   // f32 or bf16
};

// Positions that one unit of split-KV attention covers. Fixed, so that results do not depend on the thread
// count.
constexpr int kAttentionChunk = 128;

// Every kernel is called once per phase on every thread; all threads finish a phase before any starts the
// next. Those that stream weights also know the phase kWarm, called before the barrier in front of them: it
// only prefetches where this thread will start, so that memory's latency passes while the threads wait for
// each other.
constexpr int kWarm = -1;

// What is left of one thread's share of a phase: blocks of work next .. end - 1, `next` in the upper half.
// The thread itself takes them from the front; who has nothing left takes others' from the back. Between
// phases all are empty, so nothing need be reset. On a line of its own.
struct alignas(64) Left {
  uint64_t blocks = 0;
};

// How many parts of a thing are made that several threads make together, like the rows of a head. Who makes
// the last one goes on with the whole (completes in gemv.h), so that no barrier is needed. 0 between phases.
struct alignas(64) Made {
  uint32_t parts = 0;
};

// The thread that runs a kernel. left: [num_threads], or null where the shares are fixed. made: as many as
// the op asked for (Node::shared_things in ops.h).
struct Worker {
  int thread, num_threads;
  Left* left;
  Made* made;
};

template <class Args>
using Kernel = void (*)(const Args& args, float* scratch, int phase, const Worker& me);

// The kernels of one ISA.
struct Kernels {
  const char* isa;
  Kernel<EmbedArgs> embed;
  Kernel<NormQkvRopeArgs> norm_qkv_rope;
  Kernel<AttentionArgs> attention;
  Kernel<ProjAddArgs> proj_add;
  Kernel<NormGateUpArgs> norm_gate_up;
  Kernel<KvFillArgs> kv_fill;
  Kernel<KeepHiddenArgs> keep_hidden;
  Kernel<NormLogitsArgs> norm_logits;
  Kernel<CopyHiddenArgs> copy_hidden;
  Kernel<HiddenCosineArgs> hidden_cosine;
  Kernel<Top2MarginArgs> top2_margin;
  Kernel<LinearArgs> linear;
  Kernel<UnpackArgs> unpack;
  // Lowest index of the maximum of values[n]; -1 if one of them is NaN or none is above -inf.
  int64_t (*argmax)(const float* values, int64_t n);
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_empty;  // not an ISA: empty.cpp
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
extern const Kernels kernels_neon_dotprod;
#endif

}  // namespace d3rt::cpu
