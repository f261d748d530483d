// No allocation happens between tokens: a run of many steps allocates as often as a run of few. Every
// operator new of this program is counted.
#include <atomic>
#include <cstdlib>
#include <new>

#include "check.h"
#include "cpu/isa.h"
#include "dispatcher.h"
#include "memory.h"

namespace {
std::atomic<long> allocations{0};
}

// Not inlined: GCC would see malloc's twin on one side only, and warn.
#define KEPT __attribute__((noinline))
KEPT void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
KEPT void operator delete(void* memory) noexcept { std::free(memory); }
KEPT void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace d3rt {
namespace {

// Every op of a decode step, twice over, on sizes that no vector width divides.
struct Step {
  static constexpr int64_t B = 2, D = 32, H = 2, G = 1, d = 16, S = 600, F = 33, V = 41;
  Memory memory;
  TensorView token = memory.ints({1, 2}), pos = memory.ints({0, 0}), filled = memory.ints({1, 1});
  TensorView x = memory.random(DType::f32, {B, D}), norm = memory.random(DType::f32, {D});
  TensorView q = memory.random(DType::f32, {B, H, d}), out = memory.random(DType::f32, {B, H, d});
  TensorView flat = out;
  TensorView k = memory.random(DType::f32, {B, G, S, d}), v = memory.random(DType::f32, {B, G, S, d});
  TensorView cos = memory.random(DType::f32, {S, d / 2}), sin = memory.random(DType::f32, {S, d / 2});
  TensorView wq = memory.random(DType::f32, {H * d, D}), wk = memory.random(DType::f32, {G * d, D});
  TensorView wo = memory.random(DType::f32, {D, H * d}), up = memory.random(DType::f32, {F, D});
  TensorView down = memory.random(DType::f32, {D, F}), h = memory.random(DType::f32, {B, F});
  TensorView table = memory.random(DType::f32, {V, D}), logits = memory.random(DType::f32, {B, V});
  std::shared_ptr<ThreadPool> pool = std::make_shared<ThreadPool>(2);

  TensorView before = memory.random(DType::f32, {B, D}), confidence = memory.random(DType::f32, {B});

  // A part of a ladder: a test of either kind.
  std::shared_ptr<Tape> segment() {
    auto made = tape();
    made->record(CopyHidden{before, x});
    made->record(HiddenCosine{confidence, before, x});
    made->record(Top2Margin{confidence, logits});
    return made;
  }

  std::shared_ptr<Tape> tape() {
    flat.ndim = 2, flat.sizes[1] = H * d, flat.strides[1] = 1;
    auto made = std::make_shared<Tape>(pool, memory.arena, cpu::kernels_for());
    made->record(Embed{x, token, table});
    made->record(KvFill{x, {{k, v, norm, wk, wk, {}, {}, {}}}, cos, sin, pos, 1e-5f});
    made->record(NormQkvRope{q, k, v, x, norm, wq, wk, wk, {}, {}, {}, {}, {}, cos, sin, pos, 1e-5f});
    made->record(Attention{out, q, k, v, pos, 0.25f, 0});
    made->record(ProjAdd{x, flat, wo, {}});
    made->record(NormGateUp{h, x, norm, up, up, {}, {}, 1e-5f});
    made->record(ProjAdd{x, h, down, {}});
    made->record(NormLogits{logits, x, norm, table, 1e-5f});
    return made;
  }
};

TEST(allocation, "none happens between tokens, greedy or drawn, recorded or climbed") {
  Step step;
  step.filled.ndim = 2, step.filled.sizes[0] = 1, step.filled.sizes[1] = Step::B,
  step.filled.strides[0] = Step::B, step.filled.strides[1] = 1;
  Dispatcher dispatcher(step.token, step.pos, step.logits, step.filled, cpu::kernels_for());
  const int recorded = dispatcher.add(step.tape(), {0}, {}),
            segment = dispatcher.add(step.segment(), {0}, {});
  const int ladder =
      dispatcher.add_ladder({{segment, recorded}, {segment, recorded}}, recorded, step.confidence);
  const int climb = dispatcher.add_climb(ladder, 0.05);
  for (const auto& [drawn, program] : {std::pair{false, recorded}, {true, recorded}, {false, climb}}) {
    const auto run = [&, drawn = drawn, program = program](size_t steps) {
      for (int64_t b = 0; b < Step::B; ++b) step.pos.ptr<int32_t>()[b] = 0, step.filled.ptr<int32_t>()[b] = 1;
      RunSpec spec;
      spec.programs.assign(steps, program);
      spec.sampling.do_sample = drawn;
      spec.sampling.top_k = 5;
      spec.sampling.top_p = 0.9;
      const long before = allocations.load();
      dispatcher.start(std::move(spec));
      CHECK(dispatcher.wait(60));
      return allocations.load() - before;
    };
    run(500);  // what is allocated once
    const long few = run(5);
    CHECK_EQ(run(500), few);
  }
}

}  // namespace
}  // namespace d3rt
