// Dispatcher: the loop on a model small enough to know its answers. Its table is one-hot and its head is
// shifted by one, so token t is always followed by t + 1, and after the last token comes 0.
#include "dispatcher.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "cpu/isa.h"
#include "memory.h"

namespace d3rt {
namespace {

using Tokens = std::vector<int32_t>;
constexpr double kLong = 60;  // seconds; a test that waits this long has hung

struct Counting {
  static constexpr int64_t V = 10, L = 2, D = V;
  const int64_t B;
  Memory memory;
  TensorView token, pos, logits, filled, x, table, norm, next, broken;
  std::shared_ptr<ThreadPool> pool;
  std::unique_ptr<Dispatcher> dispatcher;
  int count, fail;  // programs: the next token; NaN logits

  explicit Counting(const Tokens& last, const Tokens& length = {}, int threads = 1)
      : B(static_cast<int64_t>(last.size())) {
    token = memory.ints(Tokens(last.size(), 0));
    pos = memory.ints(Tokens(last.size(), 0));
    filled = memory.tensor(DType::i32, {L, B});
    logits = memory.tensor(DType::f32, {B, V});
    x = memory.tensor(DType::f32, {B, D});
    table = memory.tensor(DType::f32, {V, D}), next = memory.tensor(DType::f32, {V, D});
    for (int64_t i = 0; i < V; ++i)
      for (int64_t j = 0; j < D; ++j) {
        table.ptr<float>()[i * D + j] = i == j;
        next.ptr<float>()[i * D + j] = i == (j + 1) % V;
      }
    norm = memory.floats(std::vector<float>(D, 1), {D});
    broken = memory.tensor(DType::f32, {V, D});  // NaN
    pool = std::make_shared<ThreadPool>(threads);
    dispatcher = std::make_unique<Dispatcher>(token, pos, logits, filled, cpu::kernels_for());
    count = dispatcher->add(tape(next), {0, 1}, {});
    fail = dispatcher->add(tape(broken), {0, 1}, {});
    prefill(last, length.empty() ? Tokens(last.size(), 1) : length);
  }

  // As a prefill leaves it: slot b has length[b] tokens, the last of which is last[b].
  void prefill(const Tokens& last, const Tokens& length) {
    for (int64_t b = 0; b < B; ++b) {
      const size_t slot = static_cast<size_t>(b);
      for (int64_t v = 0; v < V; ++v) logits.ptr<float>()[b * V + v] = (last[slot] + 1) % V == v;
      pos.ptr<int32_t>()[b] = length[slot] - 1;
      for (int64_t layer = 0; layer < L; ++layer) row(filled, layer)[b] = length[slot];
    }
  }

  static int32_t* row(const TensorView& view, int64_t index) {
    return view.ptr<int32_t>() + index * view.strides[0];
  }

  std::shared_ptr<Tape> tape(const TensorView& head) {
    auto made = std::make_shared<Tape>(pool, memory.arena, cpu::kernels_for());
    made->record(Embed{x, token, table});
    made->record(NormLogits{logits, x, norm, head, 1e-5f});
    return made;
  }

  RunSpec spec(size_t steps, Tokens eos = {}, int32_t pad = 0) const {
    RunSpec made;
    made.programs.assign(steps, count);
    made.eos_tokens = std::move(eos);
    made.pad_token = pad;
    return made;
  }
  Tokens run(const RunSpec& wanted) {
    dispatcher->start(wanted);
    CHECK(dispatcher->wait(kLong));
    return all();
  }
  Tokens all() {
    bool ended = false;
    return dispatcher->read(0, 0, &ended);
  }
  Tokens positions() const { return {pos.ptr<int32_t>(), pos.ptr<int32_t>() + B}; }
  Tokens complete(int64_t layer) const { return {row(filled, layer), row(filled, layer) + B}; }
};

TEST(dispatcher, "step 0 comes from the logits, each further one from a replay") {
  for (int threads : {1, 3}) {
    Counting c({4}, {7}, threads);
    CHECK(c.run(c.spec(3)) == (Tokens{5, 6, 7, 8}));
    CHECK(c.positions() == Tokens{10});  // 7 is the place of step 0's token
    CHECK(c.complete(0) == Tokens{10});  // K,V of the three tokens that were consumed
    CHECK_EQ(c.dispatcher->step_seconds().size(), size_t{4});
  }
}

TEST(dispatcher, "no program is one token") {
  Counting c({4});
  CHECK(c.run(c.spec(0)) == Tokens{5});
}

TEST(dispatcher, "ends at the eos token, which is the last one given") {
  Counting c({0});
  CHECK(c.run(c.spec(100, {5})) == (Tokens{1, 2, 3, 4, 5}));
  CHECK(c.dispatcher->step_seconds().size() == 5);
}

TEST(dispatcher, "eos at step 0 replays nothing") {
  Counting c({4}, {3});
  CHECK(c.run(c.spec(100, {5})) == Tokens{5});
  CHECK(c.complete(0) == Tokens{3});
}

TEST(dispatcher, "any of several eos tokens ends, the first that comes") {
  Counting c({2});
  CHECK(c.run(c.spec(100, {9, 6, 8})) == (Tokens{3, 4, 5, 6}));
}

TEST(dispatcher, "a finished slot emits pad and stands still while the others go on") {
  Counting c({4, 0, 2}, {1, 20, 5});
  const Tokens tokens = c.run(c.spec(100, {6}, 9));
  CHECK(tokens == (Tokens{5, 1, 3, 6, 2, 4, 9, 3, 5, 9, 4, 6, 9, 5, 9, 9, 6, 9}));
  CHECK(c.positions() == (Tokens{2, 25, 8}));  // its last token's place; the token is never consumed
  CHECK(c.complete(1) == (Tokens{2, 25, 8}));
}

TEST(dispatcher, "an eos that never comes runs the whole schedule") {
  Counting c({0, 5});
  CHECK_EQ(c.run(c.spec(30, {77})).size(), size_t{62});
}

TEST(dispatcher, "can be run again, with a clean log") {
  Counting c({0});
  c.run(c.spec(5, {3}));
  c.prefill({6}, {4});
  CHECK(c.run(c.spec(2)) == (Tokens{7, 8, 9}));
}

TEST(dispatcher, "a layer that skipped a position stops the step that reads it, before it runs") {
  Counting c({0, 0}, {3, 3});
  const int skipping = c.dispatcher->add(c.tape(c.next), {0}, {});
  RunSpec spec = c.spec(3);
  spec.programs = {c.count, skipping, c.count};
  c.dispatcher->start(spec);
  CHECK_THROWS(Hole, "layer 1 of slot 0 has K,V for 4 positions, but this step reads 5",
               c.dispatcher->wait(kLong));
  CHECK(c.all() == (Tokens{1, 1, 2, 2, 3, 3}));  // what came before is still there
  CHECK(c.complete(0) == (Tokens{5, 5}));
  CHECK(c.complete(1) == (Tokens{4, 4}));
  bool ended = false;
  CHECK_THROWS(Hole, "layer 1", c.dispatcher->read(3, 0, &ended));
}

TEST(dispatcher, "a filled layer has no hole, a skipped one keeps its first") {
  Counting c({0}, {3});
  const int filling = c.dispatcher->add(c.tape(c.next), {0}, {1}),
            skipping = c.dispatcher->add(c.tape(c.next), {0}, {});
  RunSpec spec = c.spec(0);
  spec.programs = {filling, filling, c.count};
  CHECK_EQ(c.run(spec).size(), size_t{4});
  CHECK(c.complete(1) == Tokens{6});

  Counting later({0}, {3});
  later.dispatcher->add(later.tape(later.next), {0}, {1});
  later.dispatcher->add(later.tape(later.next), {0}, {});
  spec.programs = {skipping, filling, filling};  // filling after the hole does not close it
  CHECK_EQ(later.run(spec).size(), size_t{4});
  CHECK(later.complete(1) == Tokens{3});
  CHECK(later.complete(0) == Tokens{6});
}

TEST(dispatcher, "NaN logits end the generation with an error, and the next one works") {
  Counting c({0});
  RunSpec spec = c.spec(5);
  spec.programs[2] = c.fail;
  c.dispatcher->start(spec);
  CHECK_THROWS(NotFinite, "slot 0 at step 3", c.dispatcher->wait(kLong));
  CHECK_THROWS(NotFinite, "slot 0 at step 3", c.dispatcher->wait(kLong));  // as often as it is asked
  CHECK(c.all() == (Tokens{1, 2, 3}));
  c.prefill({3}, {4});
  CHECK(c.run(c.spec(1)) == (Tokens{4, 5}));
}

TEST(dispatcher, "a token that the table does not have ends the generation with an error") {
  Counting c({4, 0});
  c.dispatcher->start(c.spec(9, {5}, 10));  // slot 0 ends at once and emits a pad token that is no token
  CHECK_THROWS(InvalidArgument, "embed: token[0] is 10", c.dispatcher->wait(kLong));
}

TEST(dispatcher, "bad parameters of the sampler surface in wait") {
  Counting c({4});
  RunSpec spec = c.spec(2);
  spec.sampling.do_sample = true;
  spec.sampling.temperature = 0;
  c.dispatcher->start(spec);
  CHECK_THROWS(InvalidArgument, "temperature", c.dispatcher->wait(kLong));
}

TEST(dispatcher, "cancel stops between two steps; what was made stays") {
  Counting c({0}, {}, 2);
  c.dispatcher->start(c.spec(10'000'000));
  bool ended = false;
  while (c.dispatcher->read(100, kLong, &ended).empty()) CHECK(!ended);
  c.dispatcher->cancel();
  CHECK(c.dispatcher->wait(0));
  const Tokens tokens = c.all();
  CHECK(tokens.size() > 100 && tokens.size() < 10'000'000);
  for (size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] != static_cast<int32_t>((i + 1) % Counting::V)) CHECK_EQ(i, size_t{0});
  CHECK_EQ(c.pos.ptr<int32_t>()[0], static_cast<int32_t>(tokens.size()));
  c.dispatcher->cancel();  // nothing to stop
  c.prefill({3}, {4});
  CHECK(c.run(c.spec(1)) == (Tokens{4, 5}));
}

TEST(dispatcher, "cancel may come from several threads at once, also while others start") {
  Counting c({0});
  std::atomic<int> started{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 50; ++round) c.dispatcher->cancel();
    });
    threads.emplace_back([&] {
      for (int round = 0; round < 50; ++round) {
        try {
          c.dispatcher->start(c.spec(0));  // step 0 alone, so that no two generations share a cache
          ++started;
        } catch (const Error&) {  // the other thread's generation runs
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(started.load() > 0);
  CHECK(c.dispatcher->wait(kLong));
}

TEST(dispatcher, "is busy while a generation runs") {
  Counting c({0});
  c.dispatcher->start(c.spec(10'000'000));
  CHECK_THROWS(Error, "cannot start while", c.dispatcher->start(c.spec(1)));
  CHECK_THROWS(Error, "cannot begin while", c.dispatcher->begin());
  CHECK_THROWS(Error, "cannot add a program while", c.dispatcher->add(nullptr, {}, {}));
  CHECK_THROWS(Error, "cannot step while", c.dispatcher->step(c.count));
  CHECK_THROWS(Error, "cannot commit while", c.dispatcher->commit({1}, {false}));
  CHECK(!c.dispatcher->wait(0));
  CHECK(!c.dispatcher->wait(0.01));
  c.dispatcher->cancel();
}

TEST(dispatcher, "ends with the object, also in the middle of a generation") {
  for (int i = 0; i < 10; ++i) {
    Counting c({0}, {}, 1 + i % 3);
    c.dispatcher->start(c.spec(10'000'000));
    if (i % 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    c.dispatcher.reset();
  }
}

TEST(dispatcher, "waiting has any length") {
  Counting c({0});
  c.dispatcher->start(c.spec(2000));
  for (double seconds : {1e10, 1e300, static_cast<double>(kInfinity)}) CHECK(c.dispatcher->wait(seconds));
  for (double seconds : {0.0, -1.0, -1e300, -static_cast<double>(kInfinity)})
    CHECK(c.dispatcher->wait(seconds));
  bool ended = false;
  CHECK(c.dispatcher->read(2001, static_cast<double>(kInfinity), &ended).empty());
  CHECK(ended);
}

TEST(dispatcher, "several readers see every token in order, once each") {
  Counting c({0, 3});
  c.dispatcher->start(c.spec(2000));
  std::atomic<int> wrong{0};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 3; ++reader) {
    readers.emplace_back([&, reader] {
      size_t step = 0;
      for (bool ended = false; !ended;) {
        const Tokens tokens = c.dispatcher->read(step, kLong, &ended);
        if (tokens.empty() != ended || tokens.size() % 2) ++wrong;
        for (size_t i = 0; i < tokens.size(); i += 2, ++step)
          if (tokens[i] != static_cast<int32_t>((step + 1) % 10) ||
              tokens[i + 1] != static_cast<int32_t>((step + 4) % 10))
            ++wrong;
        if (reader == 1) std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
      if (step != 2001) ++wrong;
    });
  }
  for (std::thread& reader : readers) reader.join();
  CHECK_EQ(wrong.load(), 0);
}

TEST(dispatcher, "read waits for a token, and gives up in time") {
  Counting c({0});
  bool ended = true;
  c.dispatcher->start(c.spec(3));
  CHECK(c.dispatcher->wait(kLong));
  CHECK_EQ(c.dispatcher->read(3, 0, &ended).size(), size_t{1});
  CHECK(!ended);
  CHECK(c.dispatcher->read(4, kLong, &ended).empty());
  CHECK(ended);
  Counting other({0});
  CHECK(other.dispatcher->read(0, 0.01, &ended).empty());  // never started: nothing will follow
  CHECK(ended);
}

TEST(dispatcher, "driven from outside, it does the same") {
  Counting whole({4, 0}, {1, 6}), driven({4, 0}, {1, 6});
  const Tokens expected = whole.run(whole.spec(6, {6}, 9));
  Tokens tokens;
  std::vector<bool> finished = {false, false};
  driven.dispatcher->begin();
  for (int i = 0; i <= 6; ++i) {
    if (i > 0) driven.dispatcher->step(driven.count);
    Tokens chosen;
    for (size_t b = 0; b < 2; ++b) {
      const float* row = driven.logits.ptr<float>() + b * static_cast<size_t>(Counting::V);
      chosen.push_back(finished[b] ? 9 : static_cast<int32_t>(cpu::kernels_for().argmax(row, Counting::V)));
      finished[b] = finished[b] || chosen.back() == 6;
    }
    driven.dispatcher->commit(chosen, finished);
    tokens.insert(tokens.end(), chosen.begin(), chosen.end());
    if (finished[0] && finished[1]) break;
  }
  CHECK(tokens == expected);
  CHECK(driven.positions() == whole.positions());
  CHECK(driven.complete(0) == whole.complete(0));
}

TEST(dispatcher, "two run at once: on a pool of their own, and on a shared one") {
  for (bool shared : {false, true}) {
    Counting a({0}, {}, 2), b({5}, {}, 2);
    if (shared) {
      b.pool = a.pool;
      b.count = b.dispatcher->add(b.tape(b.next), {0, 1}, {});
    }
    std::thread other([&] {
      for (int i = 0; i < 5; ++i) {
        b.prefill({5}, {1});
        b.dispatcher->start(b.spec(300));
        b.dispatcher->wait(kLong);
      }
    });
    for (int i = 0; i < 5; ++i) {
      a.prefill({0}, {1});
      a.dispatcher->start(a.spec(300));
      a.dispatcher->wait(kLong);
    }
    other.join();
    CHECK_EQ(a.all().back(), 1);
    CHECK_EQ(b.all().back(), 6);
    CHECK_EQ(a.all().size(), size_t{301});
  }
}

TEST(dispatcher, "refuses what does not fit") {
  Counting c({0, 0});
  Dispatcher& d = *c.dispatcher;
  CHECK_THROWS(InvalidArgument, "layer 2 is not in 0..1", d.add(c.tape(c.next), {2}, {}));
  CHECK_THROWS(InvalidArgument, "layer -1 is not in 0..1", d.add(c.tape(c.next), {}, {-1}));
  CHECK_THROWS(InvalidArgument, "no program 7; there are 2", d.step(7));
  CHECK_THROWS(InvalidArgument, "no program -1", d.step(-1));
  RunSpec spec = c.spec(1);
  spec.programs = {2};
  CHECK_THROWS(InvalidArgument, "no program 2", d.start(spec));
  CHECK_THROWS(InvalidArgument, "each of the 2 slots", d.commit({1}, {false, false}));
  CHECK_THROWS(InvalidArgument, "each of the 2 slots", d.commit({1, 1}, {false}));
  spec = c.spec(1);
  spec.sampling.repetition_penalty = 1.5f;
  spec.seen = {{1}};
  CHECK_THROWS(InvalidArgument, "each of the 2 slots", d.start(spec));
  const cpu::Kernels& kernels = cpu::kernels_for();
  CHECK_THROWS(InvalidArgument, "dispatcher: pos",
               Dispatcher(c.token, c.filled, c.logits, c.filled, kernels));
  CHECK_THROWS(InvalidArgument, "dispatcher: token",
               Dispatcher(c.logits, c.pos, c.logits, c.filled, kernels));
  CHECK_THROWS(InvalidArgument, "dispatcher: logits", Dispatcher(c.token, c.pos, c.token, c.filled, kernels));
  CHECK_THROWS(InvalidArgument, "dispatcher: filled", Dispatcher(c.token, c.pos, c.logits, c.pos, kernels));
  CHECK(c.run(c.spec(1)) == (Tokens{1, 1, 2, 2}));  // and nothing of that did harm
}

}  // namespace
}  // namespace d3rt
