// Every op's signature with shapes: the page to read first.
// A decode step is a list of these. Each writes into its out buffers, allocates nothing, and reads token and
// pos from buffers, so that it can be recorded once and replayed. The definition of each is
// kernels/reference.py. Shape letters: B slots, S max_seq_len, D hidden_size, H num_attention_heads, G
// num_key_value_heads, d head_dim, F intermediate_size, V vocab_size. "W" is a weight: float32, bfloat16,
// float16, or packed int8 or int4; the cache is a float type, or int8 with lines of d + 4 bytes (cpu/args.h);
// all other buffers are float32. [] marks a view that may be missing. `lines` says which line of a cache of
// more than B of them is whose; without it, slot b has line b.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/args.h"
#include "tensor.h"

namespace d3rt {

// A weight matrix: a plain tensor, or a packed one (int8 or int4 in tiles: cpu/args.h).
struct MatrixView {
  MatrixView() = default;
  MatrixView(const TensorView& plain) : data(plain) {}  // implicit: most weights are plain tensors

  TensorView data;
  std::string format;          // "" plain, "int8", "int4"
  int64_t rows = 0, cols = 0;  // of a packed matrix
  TensorView scales, minima;   // packed: [tiles, groups, 16] float16; [] minima
};

// x = table[token]
struct Embed {
  TensorView x;      // [B, D] out
  TensorView token;  // [B] int32
  MatrixView table;  // [V, D] W
};

// q, k, v = split(RMSNorm(x) W^T + b); q, k = RoPE(norm(q), norm(k)); k, v written at pos
struct NormQkvRope {
  TensorView q;                 // [B, H, d] out
  TensorView k_cache, v_cache;  // [B, G, S, d] out, at pos
  TensorView x;                 // [B, D]
  TensorView norm;              // [D]
  MatrixView wq, wk, wv;        // [H d, D], [G d, D], [G d, D] W
  TensorView bq, bk, bv;        // [] [H d], [G d], [G d]
  TensorView q_norm, k_norm;    // [] [d]
  TensorView cos, sin;          // [S, d/2]
  TensorView pos;               // [B] int32
  float eps = 0;
  TensorView lines = {};  // [] [B] int32; then the caches are [lines, G, S, d]
};

// out = softmax(scale q K^T) V over positions max(0, pos + 1 - window) .. pos
struct Attention {
  TensorView out;               // [B, H, d] out
  TensorView q;                 // [B, H, d]
  TensorView k_cache, v_cache;  // [B, G, S, d]
  TensorView pos;               // [B] int32
  float scale = 0;
  int64_t window = 0;     // 0: no window
  TensorView lines = {};  // [] [B] int32; then the caches are [lines, G, S, d]
};

// x += a W^T + b
struct ProjAdd {
  TensorView x;     // [B, N] in and out
  TensorView a;     // [B, K]
  MatrixView w;     // [N, K] W
  TensorView bias;  // [] [N]
};

// h = silu(n Wg^T + bg) * (n Wu^T + bu), n = RMSNorm(x)
struct NormGateUp {
  TensorView h;             // [B, F] out
  TensorView x;             // [B, D]
  TensorView norm;          // [D]
  MatrixView w_gate, w_up;  // [F, D] W
  TensorView b_gate, b_up;  // [] [F]
  float eps = 0;
};

// K,V of skipped layers, all from the same hidden state x, written at pos
struct KvFill {
  struct Layer {
    TensorView k_cache, v_cache;  // [B, G, S, d] out, at pos
    TensorView norm;              // [D]
    MatrixView wk, wv;            // [G d, D] W
    TensorView bk, bv;            // [] [G d]
    TensorView k_norm;            // [] [d]
  };
  TensorView x;  // [B, D]
  std::vector<Layer> layers;
  TensorView cos, sin;  // [S, d/2]
  TensorView pos;       // [B] int32
  float eps = 0;
  TensorView lines = {};  // [] [B] int32; then the caches are [lines, G, S, d]
};

// hidden[pos] = x: what a kv_fill of these positions will start from
struct KeepHidden {
  TensorView hidden;      // [B, S, D] float32, bfloat16 or float16, out, at pos
  TensorView x;           // [B, D]
  TensorView pos;         // [B] int32
  TensorView lines = {};  // [] [B] int32; then hidden is [lines, S, D]
};

// logits = RMSNorm(x) W^T
struct NormLogits {
  TensorView logits;  // [B, V] out
  TensorView x;       // [B, D]
  TensorView norm;    // [D]
  MatrixView w;       // [V, D] W
  float eps = 0;
};

// out = x: a hidden state as it is before it changes
struct CopyHidden {
  TensorView out;  // [B, D] out
  TensorView x;    // [B, D]
};

// out = cosine of the angle between a and b
struct HiddenCosine {
  TensorView out;   // [B] out
  TensorView a, b;  // [B, D]
};

// out = p1 - p2, the two largest of softmax(logits)
struct Top2Margin {
  TensorView out;     // [B] out
  TensorView logits;  // [B, V]
};

// out = a W^T for the tokens of a prefill; W packed
struct Linear {
  TensorView out;  // [T, N] out
  TensorView a;    // [T, K]
  MatrixView w;    // [N, K] packed W
};

// out = w as floats, for the matrix products of a long prefill; W packed
struct Unpack {
  TensorView out;  // [N, K] float32 or bfloat16, out
  MatrixView w;    // [N, K] packed W
};

// The static memory of one runtime: weights, cache, activations. A tape records addresses inside it and no
// others, because any other address may be freed or stand for a temporary whose content never changes again.
class Arena {
 public:
  void add(const TensorView& view);
  bool owns(const TensorView& view) const;

  // Working memory of the ops, shared by all tapes: one op runs at a time.
  void reserve_scratch(int64_t floats);
  float* scratch() const { return scratch_.get(); }
  int64_t scratch_bytes() const { return scratch_floats_ * static_cast<int64_t>(sizeof(float)); }

 private:
  struct Span {
    uintptr_t begin, end;
  };
  std::vector<Span> spans_;
  std::unique_ptr<float[]> scratch_;
  int64_t scratch_floats_ = 0;
};

// An op made ready to run: what a tape holds.
struct Node {
  std::string op;
  int phases = 1;
  bool warms = false;  // knows the phase cpu::kWarm
  int64_t scratch_floats = 0;
  int64_t shared_things = 0;  // that several threads may make together (cpu::Made)
  std::function<void(float* scratch, int phase, const cpu::Worker& me)> run;
  std::function<void()> guard;  // checks token or pos before a replay; throws InvalidArgument
};

// Largest batch that the kernels take.
constexpr int64_t kMaxBatch = 16;

// Checks every view (dtype, shape, contiguity, ownership) and binds the kernel of the ISA. Throws
// InvalidArgument or ForeignBuffer, naming op and buffer.
Node bind(const Embed&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const NormQkvRope&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const Attention&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const ProjAdd&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const NormGateUp&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const KvFill&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const KeepHidden&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const NormLogits&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const CopyHidden&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const HiddenCosine&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const Top2Margin&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const Linear&, const Arena&, const cpu::Kernels&, int num_threads);
Node bind(const Unpack&, const Arena&, const cpu::Kernels&, int num_threads);

}  // namespace d3rt
