// Tape, Arena and the checks of every op: what may be recorded, what a replay refuses, and that a refusal
// comes before anything is written.
#include <algorithm>

#include "check.h"
#include "cpu/isa.h"
#include "memory.h"
#include "tape.h"

namespace d3rt {
namespace {

std::shared_ptr<ThreadPool> one_thread() { return std::make_shared<ThreadPool>(1); }

Tape new_tape(const Memory& memory) { return Tape(one_thread(), memory.arena, cpu::kernels_for("scalar")); }

// A valid call of every op on one set of sizes; the tests break one view at a time.
struct Calls {
  static constexpr int64_t B = 2, D = 6, H = 4, G = 2, d = 4, S = 5, F = 7, V = 9;
  Memory memory;
  TensorView token = memory.ints({1, 2}), pos = memory.ints({0, 4});
  TensorView x = memory.random(DType::f32, {B, D}), norm = memory.random(DType::f32, {D});
  TensorView q = memory.random(DType::f32, {B, H, d}), out = memory.random(DType::f32, {B, H, d});
  TensorView k_cache = memory.random(DType::f32, {B, G, S, d}),
             v_cache = memory.random(DType::f32, {B, G, S, d});
  TensorView cos = memory.random(DType::f32, {S, d / 2}), sin = memory.random(DType::f32, {S, d / 2});
  TensorView wq = memory.random(DType::f32, {H * d, D}), wk = memory.random(DType::f32, {G * d, D});
  TensorView wv = memory.random(DType::f32, {G * d, D}), kv_bias = memory.random(DType::f32, {G * d});
  TensorView head_norm = memory.random(DType::f32, {d});
  TensorView a = memory.random(DType::f32, {B, F}), down = memory.random(DType::f32, {D, F});
  TensorView up = memory.random(DType::f32, {F, D}), h = memory.random(DType::f32, {B, F});
  TensorView table = memory.random(DType::f32, {V, D}), logits = memory.random(DType::f32, {B, V});

  Embed embed() { return {x, token, table}; }
  NormQkvRope norm_qkv_rope() {
    return {q,       k_cache, v_cache,   x,         norm, wq,  wk,  wv,   {},
            kv_bias, kv_bias, head_norm, head_norm, cos,  sin, pos, 1e-5f};
  }
  Attention attention() { return {out, q, k_cache, v_cache, pos, 1, 0}; }
  ProjAdd proj_add() { return {x, a, down, norm}; }
  NormGateUp norm_gate_up() { return {h, x, norm, up, up, {}, {}, 1e-5f}; }
  KvFill kv_fill() {
    return {x, {{k_cache, v_cache, norm, wk, wv, kv_bias, kv_bias, head_norm}}, cos, sin, pos, 1e-5f};
  }
  NormLogits norm_logits() { return {logits, x, norm, table, 1e-5f}; }

  template <class Op>
  void record(const Op& op) {
    Tape tape = new_tape(memory);
    tape.record(op);
  }
};

TensorView resized(TensorView view, int dim, int64_t size) {
  view.sizes[static_cast<size_t>(dim)] = size;
  return view;
}
TensorView retyped(TensorView view, DType dtype) {
  view.dtype = dtype;
  return view;
}
TensorView spread_out(TensorView view) {  // the last dimension with gaps
  view.strides[static_cast<size_t>(view.ndim - 1)] = 2;
  return view;
}

const TensorView& plain(const TensorView& view) { return view; }
const TensorView& plain(const MatrixView& matrix) { return matrix.data; }

// Breaks one view of an op in each way that must be refused, by op and buffer name.
template <class Op, class View>
void check_refusals(Calls& calls, const Op& valid, View Op::* member, const std::string& op,
                    const std::string& name, bool required = true) {
  const std::string prefix = op + ": " + name;
  const auto with = [&](const TensorView& view) {
    Op broken = valid;
    broken.*member = view;
    return broken;
  };
  check::at(prefix);
  calls.record(valid);
  const TensorView good = plain(valid.*member);
  const DType other = good.dtype == DType::i32 ? DType::f32 : DType::i32;
  CHECK_THROWS(InvalidArgument, op + ": ", calls.record(with(retyped(good, other))));
  if (required) CHECK_THROWS(InvalidArgument, op + ": ", calls.record(with({})));
  for (int dim = 0; dim < good.ndim; ++dim)
    CHECK_THROWS(InvalidArgument, op + ": ", calls.record(with(resized(good, dim, good.size(dim) - 1))));
  if (good.size(good.ndim - 1) > 1)
    CHECK_THROWS(InvalidArgument, prefix, calls.record(with(spread_out(good))));
  TensorView fewer = good;
  --fewer.ndim;
  CHECK_THROWS(InvalidArgument, op + ": ", calls.record(with(fewer)));
  Memory elsewhere;  // a tensor of the right shape that this arena does not know
  TensorView foreign = good;
  const TensorView backing = elsewhere.tensor(DType::f32, {good.numel()});
  foreign.data = backing.data;
  CHECK_THROWS(ForeignBuffer, prefix, calls.record(with(foreign)));
}

TEST(tape, "every op refuses every view of another dtype, shape, layout or owner, by name") {
  Calls c;
  check_refusals(c, c.embed(), &Embed::x, "embed", "x");
  check_refusals(c, c.embed(), &Embed::token, "embed", "token");

  const NormQkvRope qkv = c.norm_qkv_rope();
  check_refusals(c, qkv, &NormQkvRope::q, "norm_qkv_rope", "q");
  check_refusals(c, qkv, &NormQkvRope::k_cache, "norm_qkv_rope", "k_cache");
  check_refusals(c, qkv, &NormQkvRope::v_cache, "norm_qkv_rope", "v_cache");
  check_refusals(c, qkv, &NormQkvRope::x, "norm_qkv_rope", "x");
  check_refusals(c, qkv, &NormQkvRope::norm, "norm_qkv_rope", "norm");
  check_refusals(c, qkv, &NormQkvRope::wq, "norm_qkv_rope", "wq");
  check_refusals(c, qkv, &NormQkvRope::wk, "norm_qkv_rope", "wk");
  check_refusals(c, qkv, &NormQkvRope::wv, "norm_qkv_rope", "wv");
  check_refusals(c, qkv, &NormQkvRope::bk, "norm_qkv_rope", "bias", false);
  check_refusals(c, qkv, &NormQkvRope::q_norm, "norm_qkv_rope", "q_norm", false);
  check_refusals(c, qkv, &NormQkvRope::k_norm, "norm_qkv_rope", "k_norm", false);
  check_refusals(c, qkv, &NormQkvRope::sin, "norm_qkv_rope", "sin");
  check_refusals(c, qkv, &NormQkvRope::pos, "norm_qkv_rope", "pos");

  const Attention attention = c.attention();
  check_refusals(c, attention, &Attention::out, "attention", "out");
  check_refusals(c, attention, &Attention::k_cache, "attention", "k_cache");
  check_refusals(c, attention, &Attention::v_cache, "attention", "v_cache");
  check_refusals(c, attention, &Attention::pos, "attention", "pos");

  check_refusals(c, c.proj_add(), &ProjAdd::x, "proj_add", "x");
  check_refusals(c, c.proj_add(), &ProjAdd::a, "proj_add", "a");
  check_refusals(c, c.proj_add(), &ProjAdd::w, "proj_add", "w");
  check_refusals(c, c.proj_add(), &ProjAdd::bias, "proj_add", "bias", false);

  check_refusals(c, c.norm_gate_up(), &NormGateUp::h, "norm_gate_up", "h");
  check_refusals(c, c.norm_gate_up(), &NormGateUp::x, "norm_gate_up", "x");
  check_refusals(c, c.norm_gate_up(), &NormGateUp::norm, "norm_gate_up", "norm");
  check_refusals(c, c.norm_gate_up(), &NormGateUp::w_gate, "norm_gate_up", "w_gate");
  check_refusals(c, c.norm_gate_up(), &NormGateUp::w_up, "norm_gate_up", "w_up");

  check_refusals(c, c.kv_fill(), &KvFill::x, "kv_fill", "x");
  check_refusals(c, c.kv_fill(), &KvFill::sin, "kv_fill", "sin");
  check_refusals(c, c.kv_fill(), &KvFill::pos, "kv_fill", "pos");

  check_refusals(c, c.norm_logits(), &NormLogits::logits, "norm_logits", "logits");
  check_refusals(c, c.norm_logits(), &NormLogits::x, "norm_logits", "x");
  check_refusals(c, c.norm_logits(), &NormLogits::norm, "norm_logits", "norm");
  check_refusals(c, c.norm_logits(), &NormLogits::w, "norm_logits", "w");
}

TEST(tape, "a refusal names op, buffer and both shapes") {
  Calls c;
  ProjAdd op = c.proj_add();
  op.w = c.up;  // [F, D] where [D, F] belongs
  CHECK_THROWS(InvalidArgument, "proj_add: w is float32 [7, 6], but must be float32 [6, 7]", c.record(op));
  op = c.proj_add();
  op.w = {};
  CHECK_THROWS(InvalidArgument, "proj_add: w is missing", c.record(op));
}

TEST(tape, "kv_fill checks every layer") {
  Calls c;
  KvFill op = c.kv_fill();
  op.layers.push_back(op.layers[0]);
  c.record(op);
  op.layers[1].wk = resized(op.layers[1].wk.data, 0, 4);
  CHECK_THROWS(InvalidArgument, "kv_fill: wk is float32 [4, 6]", c.record(op));
  op = c.kv_fill();
  op.layers.clear();
  CHECK_THROWS(InvalidArgument, "kv_fill: no layer", c.record(op));
}

TEST(tape, "batches of 1 to 16 slots") {
  for (int64_t B : {0, 1, 16, 17}) {
    Memory memory;
    const TensorView x = memory.random(DType::f32, {std::max<int64_t>(B, 1), 3}),
                     w = memory.random(DType::f32, {3, 3});
    const TensorView batch = resized(x, 0, B);
    Tape tape = new_tape(memory);
    if (B == 1 || B == 16)
      tape.record(ProjAdd{batch, batch, w, {}});
    else
      CHECK_THROWS(InvalidArgument, "batch of " + std::to_string(B),
                   tape.record(ProjAdd{batch, batch, w, {}}));
  }
}

TEST(tape, "query heads must divide over key-value heads, windows are not negative, head_dim is even") {
  Calls c;
  Attention op = c.attention();
  op.q = resized(op.q, 1, 3), op.out = resized(op.out, 1, 3);
  CHECK_THROWS(InvalidArgument, "3 query heads do not divide over 2", c.record(op));
  op = c.attention();
  op.window = -1;
  CHECK_THROWS(InvalidArgument, "window=-1", c.record(op));

  Memory memory;
  NormQkvRope odd{};
  odd.q = memory.tensor(DType::f32, {1, 1, 3});
  odd.k_cache = memory.tensor(DType::f32, {1, 1, 2, 3}),
  odd.v_cache = memory.tensor(DType::f32, {1, 1, 2, 3});
  odd.x = memory.tensor(DType::f32, {1, 4}), odd.norm = memory.tensor(DType::f32, {4});
  odd.wq = odd.wk = odd.wv = memory.tensor(DType::f32, {3, 4});
  odd.cos = odd.sin = memory.tensor(DType::f32, {2, 1});
  odd.pos = memory.ints({0});
  CHECK_THROWS(InvalidArgument, "head_dim 3 must be even", new_tape(memory).record(odd));
}

TEST(tape, "K and V must be laid out alike and kept in one dtype") {
  Calls c;
  Attention op = c.attention();
  op.v_cache = retyped(op.v_cache, DType::bf16);
  CHECK_THROWS(InvalidArgument, "attention: v_cache", c.record(op));
  op = c.attention();
  op.v_cache.strides = {40, 4, 8, 1};  // the same storage, transposed
  CHECK_THROWS(InvalidArgument, "same strides", c.record(op));
}

TEST(tape, "a token or position out of range stops the replay before anything is written") {
  struct Bad {
    bool token;
    int32_t value;
    std::string message;
  };
  for (const Bad& bad : {Bad{true, -1, "embed: token[1] is -1, but must be in 0..8"},
                         Bad{true, 9, "token[1] is 9"}, Bad{false, -1, "pos[1] is -1, but must be in 0..4"},
                         Bad{false, 5, "pos[1] is 5"}, Bad{false, INT32_MIN, "pos[1]"}}) {
    for (int first = 0; first < 3; ++first) {  // whichever op has the guard, the others do not start
      Calls c;
      Tape tape = new_tape(c.memory);
      tape.record(c.proj_add());
      if (bad.token) tape.record(c.embed());
      if (!bad.token && first == 0) tape.record(c.norm_qkv_rope());
      if (!bad.token && first == 1) tape.record(c.attention());
      if (!bad.token && first == 2) tape.record(c.kv_fill());
      const std::vector<TensorView> views = {c.x, c.q, c.out, c.k_cache, c.v_cache};
      std::vector<std::vector<float>> before;
      for (const TensorView& view : views)
        before.emplace_back(view.ptr<float>(), view.ptr<float>() + view.numel());
      (bad.token ? c.token : c.pos).ptr<int32_t>()[1] = bad.value;
      CHECK_THROWS(InvalidArgument, bad.message, tape.replay());
      for (size_t i = 0; i < views.size(); ++i)
        CHECK(std::equal(before[i].begin(), before[i].end(), views[i].ptr<float>()));
      (bad.token ? c.token : c.pos).ptr<int32_t>()[1] = 1;  // and the tape is still good
      tape.replay();
    }
  }
}

TEST(tape, "a cos table shorter than the cache limits the positions") {
  Calls c;
  NormQkvRope op = c.norm_qkv_rope();
  op.cos = resized(op.cos, 0, 3), op.sin = resized(op.sin, 0, 3);
  Tape tape = new_tape(c.memory);
  tape.record(op);
  CHECK_THROWS(InvalidArgument, "pos[1] is 4, but must be in 0..2", tape.replay());
}

TEST(tape, "an empty tape replays, and a tape keeps pool, arena and order") {
  Memory memory;
  Tape empty = new_tape(memory);
  empty.replay();
  CHECK_EQ(empty.size(), size_t{0});

  const TensorView x = memory.floats({1}, {1, 1}), two = memory.floats({2}, {1, 1}),
                   a = memory.floats({1}, {1, 1});
  auto tape = std::make_unique<Tape>(std::make_shared<ThreadPool>(2), memory.arena, cpu::kernels_for());
  tape->record(ProjAdd{x, a, two, {}});  // x += 2
  tape->record(ProjAdd{a, x, two, {}});  // a += 2 x
  tape->replay();
  tape->replay_after_torch();  // there is no torch here
  tape->replay();
  CHECK_EQ(get(x, 0), 99.0);  // (1, 1) -> (3, 7) -> (17, 41) -> (99, 239)
  CHECK_EQ(get(a, 0), 239.0);
}

TEST(arena, "owns what lies wholly inside one registered span") {
  Memory memory;
  const TensorView whole = memory.tensor(DType::f32, {4, 6});
  CHECK(memory.arena->owns(whole));
  TensorView part = whole;
  part.data = whole.ptr<float>() + 6;
  CHECK(!memory.arena->owns(part));  // the same shape, one row further
  part.sizes[0] = 3;
  CHECK(memory.arena->owns(part));
  part.data = whole.ptr<float>() - 1;
  CHECK(!memory.arena->owns(part));
  TensorView wide = whole;
  wide.strides[0] = 7;
  CHECK(!memory.arena->owns(wide));
  CHECK(!Arena().owns(whole));
}

TEST(arena, "scratch grows to the largest op and never shrinks") {
  Arena arena;
  CHECK_EQ(arena.scratch_bytes(), int64_t{0});
  arena.reserve_scratch(10);
  float* first = arena.scratch();
  arena.reserve_scratch(5);
  CHECK(arena.scratch() == first);
  CHECK_EQ(arena.scratch_bytes(), int64_t{40});
  arena.reserve_scratch(11);
  CHECK_EQ(arena.scratch_bytes(), int64_t{44});
}

TEST(isa, "kernels that do nothing are found by name and chosen by nobody") {
  CHECK_EQ(std::string(cpu::kernels_for("empty").isa), std::string("empty"));
  for (const std::string& isa : cpu::available_isas()) CHECK(isa != "empty");
  Calls calls;
  Tape tape(one_thread(), calls.memory.arena, cpu::kernels_for("empty"));
  tape.record(calls.proj_add());
  const float before = calls.x.ptr<float>()[0];
  tape.replay();
  CHECK_EQ(calls.x.ptr<float>()[0], before);
}

TEST(isa, "each is found by name, an unknown one is refused with the list") {
  const std::vector<std::string> names = cpu::available_isas();
  CHECK_EQ(names.front(), "scalar");
  for (const std::string& name : names) CHECK_EQ(std::string(cpu::kernels_for(name).isa), name);
  CHECK_THROWS(InvalidArgument, "scalar", cpu::kernels_for("sse9"));
}

}  // namespace
}  // namespace d3rt
