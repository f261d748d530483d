// Climbs: steps that the dispatcher ends early. On a model that counts, whose confidence is a table by token:
// the cosine between a vector of the token and a fixed one, so that a test can say which tokens are certain.
#include "check.h"
#include "cpu/isa.h"
#include "dispatcher.h"
#include "memory.h"

namespace d3rt {
namespace {

using Tokens = std::vector<int32_t>;
constexpr double kLong = 60;

// Three layers of which nothing but the books is real. x is the token's one-hot row. Segment k sets the
// confidence to table[k][token]; which exit was taken shows in the logits: rung k's adds k + 1 to the token,
// the top adds 3.
struct Climbing {
  static constexpr int64_t V = 10, L = 3, D = V;
  const int64_t B;
  Memory memory;
  TensorView token, pos, logits, filled, x, table, norm, confidence, direction, state;
  TensorView certain[2], heads[3];
  std::shared_ptr<ThreadPool> pool;
  std::unique_ptr<Dispatcher> dispatcher;
  std::vector<int> parts;  // segment 0, exit 0, segment 1, exit 1, top
  int ladder = -1;

  // certain[k]: tokens at which rung k is confident (cosine 1; else 0).
  Climbing(const Tokens& last, const std::vector<Tokens>& tokens, int threads = 1,
           const std::vector<std::vector<int>>& reads = {{0}, {1}, {2}},
           const std::vector<std::vector<int>>& fills = {{1, 2}, {2}})
      : B(static_cast<int64_t>(last.size())) {
    token = memory.ints(Tokens(last.size(), 0));
    pos = memory.ints(Tokens(last.size(), 0));
    filled = memory.tensor(DType::i32, {L, B});
    logits = memory.tensor(DType::f32, {B, V});
    x = memory.tensor(DType::f32, {B, D});
    state = memory.tensor(DType::f32, {B, 2});
    confidence = memory.tensor(DType::f32, {B});
    direction = memory.tensor(DType::f32, {B, 2});
    for (int64_t b = 0; b < B; ++b) direction.ptr<float>()[2 * b] = 1, direction.ptr<float>()[2 * b + 1] = 0;
    table = memory.tensor(DType::f32, {V, D});
    for (int64_t i = 0; i < V * D; ++i) table.ptr<float>()[i] = i / D == i % D;
    norm = memory.floats(std::vector<float>(D, 1), {D});
    for (int64_t k = 0; k < 3; ++k) {
      TensorView& head = heads[k];
      head = memory.tensor(DType::f32, {V, D});
      for (int64_t i = 0; i < V * D; ++i) head.ptr<float>()[i] = i / D == (i % D + k + 1) % V;
    }
    for (size_t k = 0; k < 2; ++k) {
      certain[k] = memory.tensor(DType::f32, {V, 2});
      for (int64_t v = 0; v < V; ++v) mark(k, v, 0);
      for (int32_t v : tokens[k]) mark(k, v, 1);
    }
    pool = std::make_shared<ThreadPool>(threads);
    dispatcher = std::make_unique<Dispatcher>(token, pos, logits, filled, cpu::kernels_for());
    for (size_t k = 0; k < 2; ++k) {
      auto segment = tape();
      if (k == 0) segment->record(Embed{x, token, table});
      segment->record(Embed{state, token, certain[k]});
      segment->record(HiddenCosine{confidence, direction, state});
      parts.push_back(dispatcher->add(segment, reads[k], {}));
      parts.push_back(dispatcher->add(leave(k), {}, fills[k]));
    }
    parts.push_back(dispatcher->add(leave(2), reads[2], {}));
    ladder = dispatcher->add_ladder({{parts[0], parts[1]}, {parts[2], parts[3]}}, parts[4], confidence);
    prefill(last);
  }

  // Rung k's cosine at token v: 1 when certain, 0 else; a fraction is one of its own.
  void mark(size_t k, int64_t v, float cosine) {
    certain[k].ptr<float>()[2 * v] = cosine;
    certain[k].ptr<float>()[2 * v + 1] = std::sqrt(1 - cosine * cosine);
  }
  void prefill(const Tokens& last) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t v = 0; v < V; ++v)
        logits.ptr<float>()[b * V + v] = (last[static_cast<size_t>(b)] + 1) % V == v;
      pos.ptr<int32_t>()[b] = 0;
      for (int64_t layer = 0; layer < L; ++layer) row(layer)[b] = 1;
    }
  }
  int32_t* row(int64_t layer) const { return filled.ptr<int32_t>() + layer * filled.strides[0]; }
  std::shared_ptr<Tape> tape() { return std::make_shared<Tape>(pool, memory.arena, cpu::kernels_for()); }
  std::shared_ptr<Tape> leave(size_t k) {
    auto made = tape();
    made->record(NormLogits{logits, x, norm, heads[k], 1e-5f});
    return made;
  }
  RunSpec spec(std::vector<int> programs, Tokens eos = {}, int32_t pad = 0) const {
    RunSpec made;
    made.programs = std::move(programs);
    made.eos_tokens = std::move(eos);
    made.pad_token = pad;
    return made;
  }
  Tokens run(const RunSpec& wanted) {
    dispatcher->start(wanted);
    CHECK(dispatcher->wait(kLong));
    bool ended = false;
    return dispatcher->read(0, 0, &ended);
  }
};

TEST(ladder, "a climb ends at the first confident rung, else at the top") {
  for (int threads : {1, 3}) {
    Climbing c({0}, {{1, 7}, {1, 2, 8}}, threads);
    const int climb = c.dispatcher->add_climb(c.ladder, 0.5);
    // 1 is certain at rung 0: + 1; 2 at rung 1: + 2; 4 nowhere: + 3; 7 at rung 0; 8 at rung 1: + 2, which is
    // 0.
    CHECK(c.run(c.spec(std::vector<int>(5, climb))) == (Tokens{1, 2, 4, 7, 8, 0}));
    CHECK(c.dispatcher->exits() == (std::vector<int>{0, 1, 2, 0, 1}));
    for (int64_t layer = 0; layer < 3; ++layer) CHECK_EQ(c.row(layer)[0], 6);  // ran or filled, at every step
  }
}

TEST(ladder, "a threshold is reached by an equal confidence, above 1 by none, at 0 or below by any") {
  Climbing c({0}, {{1, 2, 3, 4, 5}, {}});
  c.mark(0, 3, -1);
  const auto tokens = [&](double threshold) {
    c.prefill({0});
    return c.run(c.spec(std::vector<int>(3, c.dispatcher->add_climb(c.ladder, threshold))));
  };
  CHECK(tokens(1.0) == (Tokens{1, 2, 3, 6}));
  CHECK(tokens(1.0 + 1e-12) == (Tokens{1, 4, 7, 0}));
  CHECK(tokens(0) == (Tokens{1, 2, 3, 4}));
  CHECK(tokens(-5) == (Tokens{1, 2, 3, 4}));
}

TEST(ladder, "NaN is never enough, but at 0 or below") {
  Climbing c({0}, {{1}, {}});
  c.certain[0].ptr<float>()[2] = kNan;  // token 1
  const int climb = c.dispatcher->add_climb(c.ladder, 1e-9), always = c.dispatcher->add_climb(c.ladder, 0);
  CHECK(c.run(c.spec({climb})) == (Tokens{1, 4}));
  c.prefill({0});
  CHECK(c.run(c.spec({always})) == (Tokens{1, 2}));
}

TEST(ladder, "the worst slot decides for all") {
  Climbing c({0, 0}, {{1}, {1, 4}}, 2);
  c.prefill({0, 3});  // tokens 1 and 4: only rung 1 is certain of both
  const int climb = c.dispatcher->add_climb(c.ladder, 0.5);
  CHECK(c.run(c.spec({climb})) == (Tokens{1, 4, 3, 6}));
  CHECK(c.dispatcher->exits() == std::vector<int>{1});
  CHECK(c.row(2)[0] == 2 && c.row(2)[1] == 2);
}

TEST(ladder, "a slot that has finished holds nobody up") {
  Climbing c({0, 0}, {{1, 2, 3, 4, 6, 7, 8}, {}});
  c.prefill({0, 4});  // slot 1 emits 5, which no rung is certain of, and ends there
  const int climb = c.dispatcher->add_climb(c.ladder, 0.5);
  CHECK(c.run(c.spec({climb, climb, climb}, {5}, 9)) == (Tokens{1, 5, 2, 9, 3, 9, 4, 9}));
  CHECK(c.dispatcher->exits() == (std::vector<int>{0, 0, 0}));
  CHECK(c.row(0)[1] == 1 && c.row(2)[1] == 1);  // nothing was written for the finished one
  Climbing other({0, 0}, {{1, 2, 3, 4, 6, 7, 8}, {}});
  other.prefill({0, 4});
  const int waits = other.dispatcher->add_climb(other.ladder, 0.5);
  CHECK(other.run(other.spec({waits}, {}, 9)) == (Tokens{1, 5, 4, 8}));
  CHECK(other.dispatcher->exits() == std::vector<int>{2});
}

TEST(ladder, "each step has the threshold of its own climb, and may be a recorded step instead") {
  Climbing c({0}, {{}, {}});
  for (int64_t v = 0; v < Climbing::V; ++v) c.mark(0, v, 0.6f), c.mark(1, v, 0.8f);
  const int low = c.dispatcher->add_climb(c.ladder, 0.5), middle = c.dispatcher->add_climb(c.ladder, 0.7),
            high = c.dispatcher->add_climb(c.ladder, 0.9);
  auto whole = c.tape();
  whole->record(Embed{c.x, c.token, c.table});
  whole->record(NormLogits{c.logits, c.x, c.norm, c.heads[0], 1e-5f});
  const int recorded = c.dispatcher->add(whole, {0, 1, 2}, {});
  CHECK(c.run(c.spec({low, high, recorded, middle, low})) == (Tokens{1, 2, 5, 6, 8, 9}));
  CHECK(c.dispatcher->exits() == (std::vector<int>{0, 2, Dispatcher::kNoClimb, 1, 0}));
}

TEST(ladder, "a hole stops the segment that would read it, before it runs") {
  Climbing c({0}, {{1, 2, 3}, {}}, 1, {{0}, {1}, {2}}, {{2}, {2}});  // exit 0 forgets layer 1
  const int climb = c.dispatcher->add_climb(c.ladder, 0.5);
  c.dispatcher->start(c.spec({climb, climb, climb, climb}));
  CHECK_THROWS(Hole, "layer 1 of slot 0 has K,V for 1 positions, but this step reads 4",
               c.dispatcher->wait(kLong));
  CHECK(c.dispatcher->exits() == (std::vector<int>{0, 0, 0}));
  CHECK(c.row(0)[0] == 5 && c.row(1)[0] == 1 && c.row(2)[0] == 4);  // segment 0 ran at the fourth step
  c.prefill({3});                                                   // and the next generation works
  CHECK(c.run(c.spec({climb})) == (Tokens{4, 7}));
}

TEST(ladder, "driven from outside it decides the same, and begin clears the log") {
  Climbing whole({0, 3}, {{1, 4}, {1, 2, 5, 6}}), driven({0, 3}, {{1, 4}, {1, 2, 5, 6}});
  const int climb = whole.dispatcher->add_climb(whole.ladder, 0.5);
  CHECK_EQ(driven.dispatcher->add_climb(driven.ladder, 0.5), climb);
  const Tokens expected = whole.run(whole.spec(std::vector<int>(6, climb), {9}, 0));
  for (int round = 0; round < 2; ++round) {
    driven.prefill({0, 3});
    driven.dispatcher->begin();
    CHECK(driven.dispatcher->exits().empty());
    Tokens tokens;
    std::vector<bool> finished = {false, false};
    for (int i = 0; i <= 6 && !(finished[0] && finished[1]); ++i) {
      if (i > 0) driven.dispatcher->step(climb);
      Tokens chosen;
      for (size_t b = 0; b < 2; ++b) {
        const float* row = driven.logits.ptr<float>() + b * static_cast<size_t>(Climbing::V);
        chosen.push_back(finished[b] ? 0 : static_cast<int32_t>(cpu::kernels_for().argmax(row, Climbing::V)));
        finished[b] = finished[b] || chosen.back() == 9;
      }
      driven.dispatcher->commit(chosen, finished);
      tokens.insert(tokens.end(), chosen.begin(), chosen.end());
    }
    CHECK(tokens == expected);
    CHECK(driven.dispatcher->exits() == whole.dispatcher->exits());
  }
}

TEST(ladder, "cancel stops between two climbs, with K,V whole") {
  Climbing c({0}, {{1, 3, 5}, {2, 4}}, 2);
  const int climb = c.dispatcher->add_climb(c.ladder, 0.5);
  c.dispatcher->start(c.spec(std::vector<int>(5'000'000, climb)));
  bool ended = false;
  while (c.dispatcher->read(100, kLong, &ended).empty()) CHECK(!ended);
  c.dispatcher->exits();  // may be asked at any time
  c.dispatcher->cancel();
  const int32_t steps = static_cast<int32_t>(c.dispatcher->step_seconds().size());
  CHECK_EQ(c.dispatcher->exits().size(), static_cast<size_t>(steps - 1));
  for (int64_t layer = 0; layer < 3; ++layer) CHECK_EQ(c.row(layer)[0], steps);
  c.prefill({0});
  CHECK(c.run(c.spec({climb})) == (Tokens{1, 2}));
}

TEST(ladder, "refuses what does not fit") {
  Climbing c({0}, {{}, {}});
  Dispatcher& d = *c.dispatcher;
  const int climb = d.add_climb(c.ladder, 0.5);
  CHECK_THROWS(InvalidArgument, "a ladder without rungs", d.add_ladder({}, c.parts[4], c.confidence));
  CHECK_THROWS(InvalidArgument, "no program 99", d.add_ladder({{99, c.parts[1]}}, c.parts[4], c.confidence));
  CHECK_THROWS(InvalidArgument, "no program -1", d.add_ladder({{c.parts[0], -1}}, c.parts[4], c.confidence));
  CHECK_THROWS(InvalidArgument, "is a climb, so it cannot be a part of a ladder",
               d.add_ladder({{c.parts[0], c.parts[1]}}, climb, c.confidence));
  CHECK_THROWS(InvalidArgument, "confidence", d.add_ladder({{c.parts[0], c.parts[1]}}, c.parts[4], c.logits));
  CHECK_THROWS(InvalidArgument, "no ladder 1; there are 1", d.add_climb(1, 0.5));
  CHECK_THROWS(InvalidArgument, "no ladder -1", d.add_climb(-1, 0.5));
  CHECK(c.run(c.spec({climb})) == (Tokens{1, 4}));  // and nothing of that did harm
}

}  // namespace
}  // namespace d3rt
