#include "ops.h"

#include <algorithm>
#include <memory>

namespace d3rt {

void Arena::add(const TensorView& view) {
  const auto begin = reinterpret_cast<uintptr_t>(view.data);
  spans_.push_back({begin, begin + static_cast<uintptr_t>(view.span_bytes())});
}

bool Arena::owns(const TensorView& view) const {
  const auto begin = reinterpret_cast<uintptr_t>(view.data);
  const auto end = begin + static_cast<uintptr_t>(view.span_bytes());
  return std::any_of(spans_.begin(), spans_.end(),
                     [&](const Span& span) { return span.begin <= begin && end <= span.end; });
}

void Arena::reserve_scratch(int64_t floats) {
  if (floats <= scratch_floats_) return;
  scratch_.reset(new float[static_cast<size_t>(floats)]);  // pages that no op touches cost nothing
  scratch_floats_ = floats;
}

namespace {

// Turns the checked views of one op into kernel arguments.
class Binder {
 public:
  Binder(const char* op, const Arena& arena) : op_(op), arena_(arena) {}

  [[noreturn]] void refuse(const std::string& why) const {
    throw InvalidArgument(std::string(op_) + ": " + why);
  }

  int64_t batch(const TensorView& x) const {
    if (!x || x.ndim < 1 || x.size(0) < 1 || x.size(0) > kMaxBatch)
      refuse("batch of " + (x && x.ndim ? std::to_string(x.size(0)) : "?") +
             " slots; the kernels take 1 to " + std::to_string(kMaxBatch));
    return x.size(0);
  }
  float* f32(const char* name, const TensorView& view, std::initializer_list<int64_t> sizes) const {
    check_view(op_, name, view, DType::f32, sizes);
    return owned(name, view).ptr<float>();
  }
  // Any float type, contiguous.
  void* plain(const char* name, const TensorView& view, std::initializer_list<int64_t> sizes) const {
    check_view(op_, name, view, view.dtype, sizes);
    return owned(name, view).data;
  }
  const float* optional_f32(const char* name, const TensorView& view,
                            std::initializer_list<int64_t> sizes) const {
    return view ? f32(name, view, sizes) : nullptr;
  }
  const int32_t* i32(const char* name, const TensorView& view, std::initializer_list<int64_t> sizes) const {
    check_view(op_, name, view, DType::i32, sizes);
    return owned(name, view).ptr<int32_t>();
  }
  cpu::Store store(const char* name, const TensorView& view) const {
    if (view && view.dtype == DType::f32) return cpu::Store::f32;
    if (view && view.dtype == DType::bf16) return cpu::Store::bf16;
    if (view && view.dtype == DType::f16) return cpu::Store::f16;
    refuse(std::string(name) + " is " + (view ? view.describe() : "missing") +
           ", but must be float32, bfloat16 or float16");
  }
  // rows, cols: -1 accepts any number.
  cpu::Matrix matrix(const char* name, const MatrixView& w, int64_t rows, int64_t cols,
                     const TensorView& bias = {}) const {
    if (!w.format.empty()) return packed(name, w, rows, cols, bias);
    const cpu::Store kept = store(name, w.data);
    check_view(op_, name, w.data, w.data.dtype, {rows, cols}, false);
    const int64_t found = w.data.size(0);
    return {owned(name, w.data).data,
            found,
            w.data.size(1),
            w.data.strides[0],
            optional_f32("bias", bias, {found}),
            kept,
            nullptr,
            nullptr};
  }
  cpu::Matrix packed(const char* name, const MatrixView& w, int64_t rows, int64_t cols,
                     const TensorView& bias) const {
    const bool is_int8 = w.format == "int8";
    if (!is_int8 && w.format != "int4")
      refuse(std::string(name) + " is packed as '" + w.format + "', which is unknown");
    if ((rows >= 0 && rows != w.rows) || (cols >= 0 && cols != w.cols) || w.cols % cpu::kGroup)
      refuse(std::string(name) + " is packed [" + std::to_string(w.rows) + ", " + std::to_string(w.cols) +
             "], but must be [" + (rows < 0 ? "*" : std::to_string(rows)) + ", " +
             (cols < 0 ? "*" : std::to_string(cols)) + "], columns a multiple of " +
             std::to_string(cpu::kGroup));
    const int64_t tiles = (w.rows + cpu::kTileRows - 1) / cpu::kTileRows, groups = w.cols / cpu::kGroup;
    check_view(op_, name, w.data, DType::byte, {tiles, groups, is_int8 ? 8 : 4, cpu::kTileRows, 4});
    check_view(op_, name, w.scales, DType::f16, {tiles, groups, cpu::kTileRows});
    if (w.minima) check_view(op_, name, w.minima, DType::f16, {tiles, groups, cpu::kTileRows});
    return {owned(name, w.data).data,
            w.rows,
            w.cols,
            w.cols,
            optional_f32("bias", bias, {w.rows}),
            is_int8 ? cpu::Store::int8 : cpu::Store::int4,
            owned(name, w.scales).ptr<cpu::f16>(),
            w.minima ? owned(name, w.minima).ptr<cpu::f16>() : nullptr};
  }
  cpu::Cache cache(const TensorView& k, const TensorView& v, const TensorView& lines, int64_t B, int64_t G,
                   int64_t S, int64_t d) const {
    const bool is_int8 = k && k.dtype == DType::byte;
    const cpu::Store kept = is_int8 ? cpu::Store::int8 : store("k_cache", k);
    const int64_t line = is_int8 ? d + cpu::kLineScaleBytes : d;
    check_view(op_, "k_cache", k, k.dtype, {lines ? -1 : B, G, S, line}, false);
    check_view(op_, "v_cache", v, k.dtype, {k.size(0), G, S, line}, false);
    if (k.strides != v.strides) refuse("k_cache and v_cache must have the same strides");
    const int32_t* of = lines ? i32("lines", lines, {B}) : nullptr;
    return {owned("k_cache", k).data,
            owned("v_cache", v).data,
            k.strides[0],
            k.strides[1],
            k.strides[2],
            kept,
            of};
  }
  cpu::Rope rope(const TensorView& cos, const TensorView& sin, const TensorView& pos, int64_t B,
                 int64_t d) const {
    if (d % 2) refuse("head_dim " + std::to_string(d) + " must be even for RoPE");
    const float* cosines = f32("cos", cos, {-1, d / 2});
    return {cosines, f32("sin", sin, {cos.size(0), d / 2}), i32("pos", pos, {B})};
  }
  const TensorView& owned(const char* name, const TensorView& view) const {
    if (!arena_.owns(view))
      throw ForeignBuffer(
          std::string(op_) + ": " + name + " (" + view.describe() +
          ") is not one of this runtime's static buffers, so a recorded step cannot read or write it; " +
          "register it in the arena first");
    return view;
  }

 private:
  const char* op_;
  const Arena& arena_;
};

// What a thread needs for normed activations (cpu/gemv.h: norm_input).
int64_t norm_scratch(int64_t B, int64_t D) { return B * D + cpu::prepared_floats(B, D); }

// A guard: every index[b] must lie in [0, limit).
std::function<void()> guard_range(const char* op, const char* name, const int32_t* index, int64_t count,
                                  int64_t limit) {
  return [=] {
    for (int64_t b = 0; b < count; ++b) {
      if (index[b] >= 0 && index[b] < limit) continue;
      throw InvalidArgument(std::string(op) + ": " + name + "[" + std::to_string(b) + "] is " +
                            std::to_string(index[b]) + ", but must be in 0.." + std::to_string(limit - 1));
    }
  };
}

// pos within the cache, and lines, where they are given, within its first dimension.
std::function<void()> guard_places(const char* op, const int32_t* pos, int64_t limit, const int32_t* lines,
                                   int64_t num_lines, int64_t count) {
  auto positions = guard_range(op, "pos", pos, count, limit);
  if (!lines) return positions;
  return [positions = std::move(positions), within = guard_range(op, "lines", lines, count, num_lines)] {
    positions();
    within();
  };
}

// The ops whose kernels know the phase cpu::kWarm.
template <class Args>
constexpr bool kWarms = false;
template <>
constexpr bool kWarms<cpu::NormQkvRopeArgs> = true;
template <>
constexpr bool kWarms<cpu::ProjAddArgs> = true;
template <>
constexpr bool kWarms<cpu::NormGateUpArgs> = true;
template <>
constexpr bool kWarms<cpu::KvFillArgs> = true;
template <>
constexpr bool kWarms<cpu::NormLogitsArgs> = true;

template <class Args>
Node node(const char* op, int phases, int64_t scratch_floats, cpu::Kernel<Args> kernel, const Args& args,
          std::function<void()> guard = {}, int64_t shared_things = 0) {
  return {
      op,
      phases,
      kWarms<Args>,
      scratch_floats,
      shared_things,
      [kernel, args](float* scratch, int phase, const cpu::Worker& me) { kernel(args, scratch, phase, me); },
      std::move(guard)};
}

}  // namespace

Node bind(const Embed& op, const Arena& arena, const cpu::Kernels& kernels, int) {
  const Binder to("embed", arena);
  const int64_t B = to.batch(op.x);
  cpu::EmbedArgs args{};
  args.x = to.f32("x", op.x, {B, -1});
  args.token = to.i32("token", op.token, {B});
  args.table = to.matrix("table", op.table, -1, op.x.size(1));
  args.B = static_cast<int>(B);
  args.D = static_cast<int>(op.x.size(1));
  return node("embed", 1, 0, kernels.embed, args,
              guard_range("embed", "token", args.token, B, args.table.rows));
}

Node bind(const NormQkvRope& op, const Arena& arena, const cpu::Kernels& kernels, int num_threads) {
  const Binder to("norm_qkv_rope", arena);
  const int64_t B = to.batch(op.x);
  if (!op.q || op.q.ndim != 3 || !op.k_cache || op.k_cache.ndim != 4)
    to.refuse("q must be [B, H, d] and k_cache [B, G, S, d]");
  const int64_t H = op.q.size(1), d = op.q.size(2), G = op.k_cache.size(1), S = op.k_cache.size(2);
  cpu::NormQkvRopeArgs args{};
  args.x = to.f32("x", op.x, {B, -1});
  const int64_t D = op.x.size(1);
  args.q = to.f32("q", op.q, {B, H, d});
  args.norm = to.f32("norm", op.norm, {D});
  args.w[0] = to.matrix("wq", op.wq, H * d, D, op.bq);
  args.w[1] = to.matrix("wk", op.wk, G * d, D, op.bk);
  args.w[2] = to.matrix("wv", op.wv, G * d, D, op.bv);
  args.q_norm = to.optional_f32("q_norm", op.q_norm, {d});
  args.k_norm = to.optional_f32("k_norm", op.k_norm, {d});
  args.cache = to.cache(op.k_cache, op.v_cache, op.lines, B, G, S, d);
  args.rope = to.rope(op.cos, op.sin, op.pos, B, d);
  args.eps = op.eps;
  args.B = static_cast<int>(B);
  args.D = static_cast<int>(D);
  args.H = static_cast<int>(H);
  args.G = static_cast<int>(G);
  args.d = static_cast<int>(d);
  return node("norm_qkv_rope", 1, B * (H + 2 * G) * d + num_threads * norm_scratch(B, D),
              kernels.norm_qkv_rope, args,
              guard_places("norm_qkv_rope", args.rope.pos, std::min(S, op.cos.size(0)), args.cache.lines,
                           op.k_cache.size(0), B),
              H + 2 * G);
}

Node bind(const Attention& op, const Arena& arena, const cpu::Kernels& kernels, int) {
  const Binder to("attention", arena);
  const int64_t B = to.batch(op.q);
  if (op.q.ndim != 3 || !op.k_cache || op.k_cache.ndim != 4)
    to.refuse("q must be [B, H, d] and k_cache [B, G, S, d]");
  const int64_t H = op.q.size(1), d = op.q.size(2), G = op.k_cache.size(1), S = op.k_cache.size(2);
  if (G < 1 || H % G)
    to.refuse(std::to_string(H) + " query heads do not divide over " + std::to_string(G) +
              " key-value heads");
  if (op.window < 0) to.refuse("window=" + std::to_string(op.window) + " must not be negative");
  cpu::AttentionArgs args{};
  args.out = to.f32("out", op.out, {B, H, d});
  args.q = to.f32("q", op.q, {B, H, d});
  args.cache = to.cache(op.k_cache, op.v_cache, op.lines, B, G, S, d);
  args.pos = to.i32("pos", op.pos, {B});
  args.scale = op.scale;
  args.window = static_cast<int>(std::min(op.window, S));
  args.B = static_cast<int>(B);
  args.H = static_cast<int>(H);
  args.G = static_cast<int>(G);
  args.d = static_cast<int>(d);
  args.S = static_cast<int>(S);
  const int64_t chunks = (S + cpu::kAttentionChunk - 1) / cpu::kAttentionChunk;
  return node("attention", 1, B * H * chunks * (d + 2), kernels.attention, args,
              guard_places("attention", args.pos, S, args.cache.lines, op.k_cache.size(0), B), B * G);
}

Node bind(const ProjAdd& op, const Arena& arena, const cpu::Kernels& kernels, int num_threads) {
  const Binder to("proj_add", arena);
  const int64_t B = to.batch(op.x);
  cpu::ProjAddArgs args{};
  args.x = to.f32("x", op.x, {B, -1});
  args.a = to.f32("a", op.a, {B, -1});
  args.w = to.matrix("w", op.w, op.x.size(1), op.a.size(1), op.bias);
  args.B = static_cast<int>(B);
  return node("proj_add", 1, num_threads * cpu::prepared_floats(B, args.w.cols), kernels.proj_add, args);
}

Node bind(const NormGateUp& op, const Arena& arena, const cpu::Kernels& kernels, int num_threads) {
  const Binder to("norm_gate_up", arena);
  const int64_t B = to.batch(op.x);
  cpu::NormGateUpArgs args{};
  args.x = to.f32("x", op.x, {B, -1});
  args.h = to.f32("h", op.h, {B, -1});
  const int64_t D = op.x.size(1), F = op.h.size(1);
  args.norm = to.f32("norm", op.norm, {D});
  args.gate = to.matrix("w_gate", op.w_gate, F, D, op.b_gate);
  args.up = to.matrix("w_up", op.w_up, F, D, op.b_up);
  args.eps = op.eps;
  args.B = static_cast<int>(B);
  args.D = static_cast<int>(D);
  args.F = static_cast<int>(F);
  if ((args.gate.store >= cpu::Store::int8) != (args.up.store >= cpu::Store::int8))
    to.refuse("w_gate and w_up must both be packed, or neither");
  return node("norm_gate_up", 1, num_threads * norm_scratch(B, D), kernels.norm_gate_up, args);
}

Node bind(const KvFill& op, const Arena& arena, const cpu::Kernels& kernels, int num_threads) {
  const Binder to("kv_fill", arena);
  const int64_t B = to.batch(op.x);
  if (op.layers.empty()) to.refuse("no layer to fill");
  const TensorView& first = op.layers.front().k_cache;
  if (!first || first.ndim != 4) to.refuse("k_cache must be [B, G, S, d]");
  if (!op.cos || op.cos.ndim != 2) to.refuse("cos must be [S, d/2]");
  const int64_t G = first.size(1), S = first.size(2), d = 2 * op.cos.size(1);
  cpu::KvFillArgs args{};
  args.x = to.f32("x", op.x, {B, -1});
  const int64_t D = op.x.size(1);
  auto layers = std::make_shared<std::vector<cpu::FillLayer>>();
  for (const KvFill::Layer& layer : op.layers) {
    cpu::FillLayer fill{};
    fill.norm = to.f32("norm", layer.norm, {D});
    fill.w[0] = to.matrix("wk", layer.wk, G * d, D, layer.bk);
    fill.w[1] = to.matrix("wv", layer.wv, G * d, D, layer.bv);
    fill.k_norm = to.optional_f32("k_norm", layer.k_norm, {d});
    fill.cache = to.cache(layer.k_cache, layer.v_cache, op.lines, B, G, S, d);
    layers->push_back(fill);
  }
  args.layers = layers->data();
  args.num_layers = static_cast<int>(layers->size());
  args.rope = to.rope(op.cos, op.sin, op.pos, B, d);
  args.eps = op.eps;
  args.B = static_cast<int>(B);
  args.D = static_cast<int>(D);
  args.G = static_cast<int>(G);
  args.d = static_cast<int>(d);
  for (const KvFill::Layer& layer : op.layers)
    if (layer.k_cache.size(0) != first.size(0))
      to.refuse("the layers' caches differ in their number of lines");
  Node filled = node("kv_fill", 1, args.num_layers * B * 2 * G * d + num_threads * norm_scratch(B, D),
                     kernels.kv_fill, args,
                     guard_places("kv_fill", args.rope.pos, std::min(S, op.cos.size(0)),
                                  layers->front().cache.lines, first.size(0), B),
                     args.num_layers * 2 * G);
  filled.run = [layers, run = std::move(filled.run)](float* scratch, int phase, const cpu::Worker& me) {
    run(scratch, phase, me);  // `layers` lives as long as the node
  };
  return filled;
}

Node bind(const KeepHidden& op, const Arena& arena, const cpu::Kernels& kernels, int) {
  const Binder to("keep_hidden", arena);
  const int64_t B = to.batch(op.x);
  cpu::KeepHiddenArgs args{};
  args.x = to.f32("x", op.x, {B, -1});
  args.store = to.store("hidden", op.hidden);
  check_view("keep_hidden", "hidden", op.hidden, op.hidden.dtype, {op.lines ? -1 : B, -1, op.x.size(1)},
             false);
  if (op.hidden.strides[2] != 1) to.refuse("the rows of hidden must be contiguous");
  args.hidden = to.owned("hidden", op.hidden).data;
  args.line_stride = op.hidden.strides[0];
  args.pos_stride = op.hidden.strides[1];
  args.pos = to.i32("pos", op.pos, {B});
  args.lines = op.lines ? to.i32("lines", op.lines, {B}) : nullptr;
  args.B = static_cast<int>(B);
  args.D = static_cast<int>(op.x.size(1));
  return node("keep_hidden", 1, 0, kernels.keep_hidden, args,
              guard_places("keep_hidden", args.pos, op.hidden.size(1), args.lines, op.hidden.size(0), B));
}

Node bind(const NormLogits& op, const Arena& arena, const cpu::Kernels& kernels, int num_threads) {
  const Binder to("norm_logits", arena);
  const int64_t B = to.batch(op.x);
  cpu::NormLogitsArgs args{};
  args.x = to.f32("x", op.x, {B, -1});
  const int64_t D = op.x.size(1);
  args.logits = to.f32("logits", op.logits, {B, -1});
  args.norm = to.f32("norm", op.norm, {D});
  args.w = to.matrix("w", op.w, op.logits.size(1), D);
  args.eps = op.eps;
  args.B = static_cast<int>(B);
  args.D = static_cast<int>(D);
  return node("norm_logits", 1, num_threads * norm_scratch(B, D), kernels.norm_logits, args);
}

Node bind(const CopyHidden& op, const Arena& arena, const cpu::Kernels& kernels, int) {
  const Binder to("copy_hidden", arena);
  const int64_t B = to.batch(op.x);
  cpu::CopyHiddenArgs args{};
  args.x = to.f32("x", op.x, {B, -1});
  args.out = to.f32("out", op.out, {B, op.x.size(1)});
  args.B = static_cast<int>(B);
  args.D = static_cast<int>(op.x.size(1));
  return node("copy_hidden", 1, 0, kernels.copy_hidden, args);
}

Node bind(const HiddenCosine& op, const Arena& arena, const cpu::Kernels& kernels, int) {
  const Binder to("hidden_cosine", arena);
  const int64_t B = to.batch(op.a);
  cpu::HiddenCosineArgs args{};
  args.a = to.f32("a", op.a, {B, -1});
  args.b = to.f32("b", op.b, {B, op.a.size(1)});
  args.out = to.f32("out", op.out, {B});
  args.B = static_cast<int>(B);
  args.D = static_cast<int>(op.a.size(1));
  return node("hidden_cosine", 1, 0, kernels.hidden_cosine, args);
}

Node bind(const Top2Margin& op, const Arena& arena, const cpu::Kernels& kernels, int) {
  const Binder to("top2_margin", arena);
  const int64_t B = to.batch(op.logits);
  cpu::Top2MarginArgs args{};
  args.logits = to.f32("logits", op.logits, {B, -1});
  args.out = to.f32("out", op.out, {B});
  args.B = static_cast<int>(B);
  args.V = op.logits.size(1);
  const int64_t chunks = (args.V + cpu::kMarginChunk - 1) / cpu::kMarginChunk;
  return node("top2_margin", 2, 3 * B * chunks, kernels.top2_margin, args);
}

Node bind(const Linear& op, const Arena& arena, const cpu::Kernels& kernels, int) {
  const Binder to("linear", arena);
  cpu::LinearArgs args{};
  args.a = to.f32("a", op.a, {-1, -1});
  const int64_t T = op.a.size(0);
  args.out = to.f32("out", op.out, {T, -1});
  if (op.w.format.empty()) to.refuse("w must be packed; plain weights go through torch");
  args.w = to.matrix("w", op.w, op.out.size(1), op.a.size(1));
  args.T = static_cast<int>(T);
  return node("linear", 2, T * args.w.cols / 16 * cpu::kQuantisedFloatsPer16, kernels.linear, args);
}

Node bind(const Unpack& op, const Arena& arena, const cpu::Kernels& kernels, int) {
  const Binder to("unpack", arena);
  if (op.w.format.empty()) to.refuse("w must be packed");
  cpu::UnpackArgs args{};
  args.w = to.matrix("w", op.w, -1, -1);
  args.as = to.store("out", op.out);
  if (args.as == cpu::Store::f16) to.refuse("out must be float32 or bfloat16");
  args.out = to.plain("out", op.out, {args.w.rows, args.w.cols});
  return node("unpack", 1, 0, kernels.unpack, args);
}

}  // namespace d3rt
