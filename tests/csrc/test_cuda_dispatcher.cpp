// The loop on a GPU, over the fake libcuda: what is enqueued when, which graph for which step, and what the
// host makes of the tokens that arrive.
#include <atomic>
#include <thread>

#include "fake_gpu.h"

namespace d3rt::cuda {
namespace {

// Both kinds of device: one that does nothing until it is waited for, and one that is always ahead of the
// host.
template <class Test>
void on_both(const Test& test) {
  for (int eager : {0, 1}) {
    check::at(eager ? "an eager device" : "a lazy device");
    const Fake fake;
    fakecuda_set_eager(eager);
    test();
    CHECK_EQ(fakecuda_pending(), 0);
  }
}

TEST(cuda_dispatcher, "step 0 only chooses, each further one is the graph that the schedule names") {
  on_both([] {
    Gpu gpu({4});
    const int shallow = gpu.add({2}, {0}, {}), filling = gpu.add({3, 4}, {0}, {1});
    RunSpec spec = gpu.spec(5);
    spec.programs = {gpu.count, gpu.count, filling, shallow, shallow};
    CHECK(gpu.run(spec) == (Tokens{5, 6, 7, 8, 9, 10}));
    CHECK(gpu.trace == (Tokens{1, 1, 3, 4, 2, 2}));
    CHECK(gpu.host_pos == gpu.pos);
    CHECK(gpu.host_pos == Tokens{6});
    CHECK(gpu.host_filled == (Tokens{6, 4}));
    CHECK_EQ(gpu.dispatcher->step_seconds().size(), size_t{6});
  });
}

TEST(cuda_dispatcher, "many steps of several slots come in order, around the rings again and again") {
  for (int ahead : {1, 2, 4, 7})
    on_both([ahead] {
      Gpu gpu({0, 100, 1000}, ahead);
      const Tokens tokens = gpu.run(gpu.spec(200));
      CHECK_EQ(tokens.size(), size_t{3 * 201});
      for (size_t i = 0; i < tokens.size(); ++i)
        if (tokens[i] != static_cast<int32_t>(1 + i / 3) + (Tokens{0, 100, 1000})[i % 3])
          CHECK_EQ(i, size_t{0});
    });
}

TEST(cuda_dispatcher,
     "exactly `ahead` steps are enqueued before the first token is read, then one for each read") {
  for (int ahead : {1, 3, 4}) {
    const Fake fake;
    Gpu gpu({0}, ahead);
    gpu.run(gpu.spec(10));
    int enqueued = 0, read = 0;
    std::istringstream log(fakecuda_log());
    for (std::string line; std::getline(log, line);) {
      if (line.rfind("cuGraphLaunch", 0) == 0) ++enqueued;
      if (line.rfind("cuEventSynchronize", 0) != 0) continue;
      CHECK_EQ(enqueued, std::min(read + ahead, 11));
      ++read;
    }
    CHECK_EQ(enqueued, 11);
    CHECK_EQ(read, 11);
  }
}

TEST(cuda_dispatcher, "a step is its graph, the copy of its line of the ring, and the event behind both") {
  const Fake fake;
  Gpu gpu({0, 1}, 2);
  gpu.run(gpu.spec(0));
  std::istringstream log(std::strstr(fakecuda_log(), "cuGraphLaunch"));
  std::vector<std::string> lines;
  for (std::string line; std::getline(log, line);) lines.push_back(line);
  CHECK(lines == (std::vector<std::string>{"cuGraphLaunch 1", "cuMemcpyDtoHAsync 8", "cuEventRecord",
                                           "cuEventSynchronize", "run next", "cuStreamSynchronize",
                                           "cuCtxPopCurrent"}));
}

TEST(cuda_dispatcher, "eos is seen late: steps ahead run for nothing, and change nothing") {
  on_both([] {
    Gpu gpu({0}, 4);
    gpu.eos = {3};
    CHECK(gpu.run(gpu.spec(100)) == (Tokens{1, 2, 3}));
    CHECK_EQ(gpu.trace.size(), size_t{5});  // steps 1, 2 and the three more that were enqueued by then
    CHECK(gpu.host_pos == gpu.pos);
    CHECK(gpu.host_pos == Tokens{3});
    CHECK(gpu.host_filled == (Tokens{3, 3}));
    CHECK_EQ(gpu.dispatcher->step_seconds().size(), size_t{3});
  });
}

TEST(cuda_dispatcher, "eos at step 0 logs nothing more") {
  on_both([] {
    Gpu gpu({4});
    gpu.eos = {7, 5};
    CHECK(gpu.run(gpu.spec(100)) == Tokens{5});
    CHECK(gpu.host_pos == Tokens{1});
    CHECK(gpu.host_filled == (Tokens{1, 1}));
  });
}

TEST(cuda_dispatcher, "a finished slot gives pad and stands still while the others go on") {
  on_both([] {
    Gpu gpu({4, 0, 2});
    gpu.eos = {6}, gpu.pad = -1;  // a pad that looks like an error is none
    CHECK(gpu.run(gpu.spec(100)) == (Tokens{5, 1, 3, 6, 2, 4, -1, 3, 5, -1, 4, 6, -1, 5, -1, -1, 6, -1}));
    CHECK(gpu.host_pos == (Tokens{2, 6, 4}));
    CHECK(gpu.host_pos == gpu.pos);
    CHECK(gpu.host_filled == (Tokens{2, 6, 4, 2, 6, 4}));
  });
}

TEST(cuda_dispatcher, "a hole stops the step that would read it; the steps before are read") {
  on_both([] {
    Gpu gpu({0, 0});
    const int skipping = gpu.add({2}, {0}, {});
    RunSpec spec = gpu.spec(3);
    spec.programs = {gpu.count, skipping, gpu.count};
    gpu.dispatcher->start(spec);
    CHECK_THROWS(Hole, "layer 1 of slot 0 has K,V for 2 positions, but this step reads 3",
                 gpu.dispatcher->wait(kLong));
    CHECK(gpu.all() == (Tokens{1, 1, 2, 2, 3, 3}));
    CHECK(gpu.trace == (Tokens{1, 2}));  // it did not run
    CHECK(gpu.host_filled == (Tokens{3, 3, 2, 2}));
    bool ended = false;
    CHECK_THROWS(Hole, "layer 1", gpu.dispatcher->read(3, 0, &ended));
  });
}

TEST(cuda_dispatcher, "a hole behind the eos that is still on its way is none") {
  on_both([] {
    Gpu gpu({0});
    gpu.eos = {3};
    const int skipping = gpu.add({2}, {0}, {});
    RunSpec spec = gpu.spec(3);
    spec.programs = {gpu.count, skipping, gpu.count};  // step 3 would read one, but token 2 is the last
    CHECK(gpu.run(spec) == (Tokens{1, 2, 3}));
    CHECK(gpu.host_filled == (Tokens{3, 2}));
  });
}

TEST(cuda_dispatcher, "what a finished slot holds is known as well as on the CPU") {
  on_both(
      [] {  // slot 0 ends with a hole in layer 1: the step that attends there reads it, though for nothing
        Gpu gpu({1, 100}, 2);
        gpu.eos = {3};
        const int skipping = gpu.add({2}, {0}, {}), deep = gpu.count;
        RunSpec spec = gpu.spec(6);
        spec.programs = {skipping, skipping, skipping, skipping, skipping, deep};
        gpu.dispatcher->start(spec);
        CHECK_THROWS(Hole, "layer 1 of slot 0 has K,V for 1 positions, but this step reads 2",
                     gpu.dispatcher->wait(kLong));
        CHECK_EQ(gpu.all().size(), size_t{2 * 6});
      });
}

TEST(cuda_dispatcher, "an error in place of a token ends the generation, and the next one works") {
  for (bool with_eos : {false, true})
    on_both([with_eos] {
      Gpu gpu({0, 10});
      if (with_eos) gpu.eos = {99};
      gpu.instead[{2, 1}] = kNotFinite;
      gpu.dispatcher->start(gpu.spec(50));
      CHECK_THROWS(NotFinite, "the logits of slot 1 at step 2 hold NaN or no finite value",
                   gpu.dispatcher->wait(kLong));
      CHECK(gpu.all() == (Tokens{1, 11, 2, 12}));
      gpu.instead = {{{1, 0}, kNoDistribution}};
      gpu.prefill({0, 10});
      gpu.dispatcher->start(gpu.spec(50));
      CHECK_THROWS(NotFinite, "the logits of slot 0 at step 1 are infinite once divided by the temperature",
                   gpu.dispatcher->wait(kLong));
      gpu.instead.clear();
      gpu.prefill({0, 10});
      CHECK(gpu.run(gpu.spec(1)) == (Tokens{1, 11, 2, 12}));
    });
}

TEST(cuda_dispatcher, "cancel enqueues no more, and reads what was enqueued") {
  on_both([] {
    Gpu gpu({0});
    fakecuda_set_logging(0);
    gpu.dispatcher->start(gpu.spec(10'000'000));
    bool ended = false;
    while (gpu.dispatcher->read(100, kLong, &ended).empty()) CHECK(!ended);
    gpu.dispatcher->cancel();
    CHECK(gpu.dispatcher->wait(0));
    const Tokens tokens = gpu.all();
    CHECK(tokens.size() > 100 && tokens.size() < 10'000'000);
    for (size_t i = 0; i < tokens.size(); ++i)
      if (tokens[i] != static_cast<int32_t>(i + 1)) CHECK_EQ(i, size_t{0});
    CHECK_EQ(gpu.trace.size() + 1, tokens.size());
    CHECK_EQ(gpu.host_pos[0], static_cast<int32_t>(tokens.size()));
    CHECK(gpu.host_pos == gpu.pos);
    gpu.dispatcher->cancel();  // nothing to stop
    gpu.prefill({3});
    CHECK(gpu.run(gpu.spec(1)) == (Tokens{4, 5}));
  });
}

TEST(cuda_dispatcher, "ends with the object, also in the middle of a generation") {
  for (int i = 0; i < 10; ++i) {
    const Fake fake;
    Gpu gpu({0});
    fakecuda_set_logging(0);
    gpu.dispatcher->start(gpu.spec(10'000'000));
    if (i % 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    gpu.dispatcher.reset();
    CHECK_EQ(fakecuda_pending(), 0);
  }
}

TEST(cuda_dispatcher, "is busy while a generation runs") {
  const Fake fake;
  Gpu gpu({0});
  fakecuda_set_logging(0);
  gpu.dispatcher->start(gpu.spec(10'000'000));
  CHECK_THROWS(Error, "cannot start while", gpu.dispatcher->start(gpu.spec(1)));
  CHECK_THROWS(Error, "cannot add a program while", gpu.add({}, {}, {}));
  CHECK_THROWS(Error, "cannot begin while", gpu.dispatcher->begin());
  CHECK_THROWS(Error, "cannot step while", gpu.dispatcher->step(gpu.count));
  CHECK_THROWS(Error, "cannot commit while", gpu.dispatcher->commit({false}));
  CHECK(!gpu.dispatcher->wait(0));
  gpu.dispatcher->cancel();
}

TEST(cuda_dispatcher, "readers see every token in order while it runs") {
  const Fake fake;
  Gpu gpu({0, 50});
  gpu.dispatcher->start(gpu.spec(1000));
  std::atomic<int> wrong{0};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 2; ++reader) {
    readers.emplace_back([&] {
      int32_t step = 0;
      for (bool ended = false; !ended;) {
        const Tokens tokens = gpu.dispatcher->read(static_cast<size_t>(step), kLong, &ended);
        for (size_t i = 0; i < tokens.size(); i += 2, ++step)
          if (tokens[i] != step + 1 || tokens[i + 1] != step + 51) ++wrong;
      }
      if (step != 1001) ++wrong;
    });
  }
  for (std::thread& reader : readers) reader.join();
  CHECK_EQ(wrong.load(), 0);
}

TEST(cuda_dispatcher, "eager and captured steps run in the same loop") {
  on_both([] {
    Gpu gpu({0});
    const int eager = gpu.dispatcher->add(Step::eager(gpu.tape({7, 8})), {0, 1}, {});
    RunSpec spec = gpu.spec(3);
    spec.programs = {gpu.count, eager, gpu.count};
    CHECK(gpu.run(spec) == (Tokens{1, 2, 3, 4}));
    CHECK(gpu.trace == (Tokens{1, 7, 8, 1}));
  });
}

TEST(cuda_dispatcher, "driven from outside, a step has run when the call returns") {
  on_both([] {
    Gpu gpu({4, 0});
    gpu.dispatcher->begin();
    gpu.dispatcher->commit({false, false});  // step 0 needs no launch
    CHECK(gpu.host_pos == (Tokens{1, 1}));
    gpu.dispatcher->step(gpu.count);
    CHECK(gpu.trace == Tokens{1});
    CHECK(gpu.host_filled == (Tokens{2, 2, 2, 2}));
    gpu.dispatcher->commit({true, false});
    gpu.dispatcher->step(gpu.count);
    gpu.dispatcher->commit({true, false});
    CHECK(gpu.host_pos == (Tokens{2, 3}));  // the first one finished, and stands
    CHECK(gpu.host_filled == (Tokens{2, 3, 2, 3}));
    gpu.host_filled[2] = 1;
    CHECK_THROWS(Hole, "layer 1 of slot 0", gpu.dispatcher->step(gpu.count));
    CHECK_EQ(gpu.trace.size(), size_t{2});
  });
}

TEST(cuda_dispatcher,
     "a generation starts with no slot finished, whoever drives it and whatever came before") {
  on_both([] {
    Gpu gpu({0, 7});
    gpu.eos = {3, 9};
    CHECK(gpu.run(gpu.spec(100)) == (Tokens{1, 8, 2, 9, 3, 0}));
    gpu.prefill({0, 7});
    CHECK(gpu.run(gpu.spec(1)) == (Tokens{1, 8, 2, 9}));
    const Tokens before = gpu.host_pos;
    gpu.dispatcher->begin();
    gpu.dispatcher->commit({true, false});
    gpu.dispatcher->begin();
    gpu.dispatcher->commit({false, false});
    CHECK(gpu.host_pos == (Tokens{before[0] + 2, before[1] + 2}));
  });
}

TEST(cuda_dispatcher, "refuses what does not fit") {
  const Fake fake;
  Gpu gpu({0, 0});
  Dispatcher& d = *gpu.dispatcher;
  CHECK_THROWS(InvalidArgument, "layer 2 is not in 0..1", gpu.add({}, {2}, {}));
  CHECK_THROWS(InvalidArgument, "no program 7; there are 2", d.step(7));
  RunSpec spec = gpu.spec(1);
  spec.first = 9;
  CHECK_THROWS(InvalidArgument, "no program 9", d.start(spec));
  spec = gpu.spec(1);
  spec.programs = {-1};
  CHECK_THROWS(InvalidArgument, "no program -1", d.start(spec));
  CHECK_THROWS(InvalidArgument, "each of the 2 slots", d.commit({true}));
  CHECK_THROWS(InvalidArgument, "a step of another context", d.add(nullptr, {}, {}));
  const auto other = std::make_shared<Context>(gpu.driver, 0);
  CHECK_THROWS(InvalidArgument, "a step of another context", d.add(Step::eager(Tape(other)), {}, {}));
  const TensorView pos = Gpu::view(gpu.host_pos, {2}), filled = Gpu::view(gpu.host_filled, {2, 2});
  CHECK_THROWS(InvalidArgument, "ahead is 0", Dispatcher(gpu.context, nullptr, pos, filled, 64, 5, 0));
  CHECK_THROWS(InvalidArgument, "a ring of 4 lines for 4 steps ahead",
               Dispatcher(gpu.context, nullptr, pos, filled, 64, 4, 4));
  CHECK_THROWS(InvalidArgument, "address is null", Dispatcher(gpu.context, nullptr, pos, filled, 0, 5, 4));
  CHECK_THROWS(InvalidArgument, "dispatcher: filled", Dispatcher(gpu.context, nullptr, pos, pos, 64, 5, 4));
  CHECK(gpu.run(gpu.spec(1)) == (Tokens{1, 1, 2, 2}));  // and nothing of that did harm
}

}  // namespace
}  // namespace d3rt::cuda
