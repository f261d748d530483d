// ThreadPool: every thread runs every job once, the barrier holds, parked workers wake, callers take turns.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>

#include "check.h"
#include "errors.h"
#include "threads.h"

namespace d3rt {
namespace {

// Sanitizers and emulation make every step slow; what is tested are orders, not times.
constexpr int kRuns = 300;
constexpr int kMaxThreads = 5;

template <class Body>
void run(ThreadPool& pool, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  pool.run([](void* context, int thread,
              int num_threads) { (*static_cast<Plain*>(context))(thread, num_threads); },
           &body);
}

TEST(threads, "every thread runs every job once and run() waits for all") {
  for (int size = 1; size <= kMaxThreads; ++size) {
    ThreadPool pool(size);
    CHECK_EQ(pool.size(), size);
    std::vector<int> calls(static_cast<size_t>(size), 0);  // plain ints: run() must order them for us
    for (int i = 0; i < kRuns; ++i) {
      run(pool, [&](int thread, int num_threads) {
        if (num_threads == size) ++calls[static_cast<size_t>(thread)];
      });
      for (int count : calls) CHECK_EQ(count, i + 1);
    }
  }
}

TEST(threads, "nobody passes a barrier before all have arrived") {
  for (int size : {1, 2, 3, 5, 9}) {  // 9: more than watch each other
    ThreadPool pool(size);
    constexpr int kPhases = 20;
    std::vector<int> written(static_cast<size_t>(size), -1);  // plain, too: the barrier orders them
    std::atomic<int> early{0};
    for (int i = 0; i < kRuns / 10; ++i) {
      run(pool, [&](int thread, int) {
        for (int phase = 0; phase < kPhases; ++phase) {
          written[static_cast<size_t>(thread)] = i * kPhases + phase;
          pool.barrier(thread);
          for (int value : written)
            if (value != i * kPhases + phase) ++early;
          pool.barrier(thread);
        }
      });
    }
    CHECK_EQ(early.load(), 0);
  }
}

TEST(threads, "jobs of other lengths of barriers may follow each other") {
  ThreadPool pool(3);
  std::atomic<int> passed{0};
  int expected = 0;
  for (int i = 0; i < kRuns; ++i) {
    const int barriers = i % 4;
    run(pool, [&](int thread, int) {
      for (int at = 0; at < barriers; ++at) pool.barrier(thread);
      ++passed;
    });
    CHECK_EQ(passed.load(), expected += 3);
  }
}

TEST(threads, "workers that parked wake up for the next job") {
  ThreadPool pool(4);
  std::atomic<int> calls{0};
  for (int pause_us : {0, 100, 300, 310, 1000, 5000, 20000}) {  // around the time that a worker spins
    for (int i = 0; i < 5; ++i) {
      std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
      calls = 0;
      run(pool, [&](int, int) { ++calls; });
      CHECK_EQ(calls.load(), 4);
    }
  }
}

TEST(threads, "callers of run() take turns") {
  for (int size : {1, 3}) {
    ThreadPool pool(size);
    std::atomic<int> inside{0}, mixed{0};
    int total = 0;  // plain: one job at a time may touch it
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) {
      callers.emplace_back([&] {
        for (int i = 0; i < kRuns / 3; ++i) {
          run(pool, [&](int thread, int num_threads) {
            if (thread == 0) {
              if (inside.fetch_add(1) != 0) ++mixed;
              ++total;
            }
            pool.barrier(thread);
            if (thread == num_threads - 1) inside.fetch_sub(1);
          });
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK_EQ(mixed.load(), 0);
    CHECK_EQ(total, 3 * (kRuns / 3));
  }
}

TEST(threads, "a pool is made and ended at any moment") {
  for (int i = 0; i < 30; ++i) {
    ThreadPool pool(1 + i % kMaxThreads);
    if (i % 3 == 1) run(pool, [](int, int) {});
    if (i % 3 == 2) std::this_thread::sleep_for(std::chrono::microseconds(400));  // let them park
  }
}

TEST(threads, "a pool of no thread is refused") {
  CHECK_THROWS(InvalidArgument, "threads=0", ThreadPool(0));
  CHECK_THROWS(InvalidArgument, "threads=-3", ThreadPool(-3));
}

#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer does not follow threads through fork
// Runs body in a forked child; true when it returned 0 within some seconds.
template <class Body>
bool child_succeeds(const Body& body) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) _exit(body());
  for (int tenths = 0; tenths < 100; ++tenths) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return false;
}

TEST(threads, "a forked child is told that the workers are gone, and can end the pool") {
  for (int pause_us : {0, 20000}) {  // workers that spin, workers that have parked
    auto pool = std::make_unique<ThreadPool>(3);
    run(*pool, [](int, int) {});
    std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
    CHECK(child_succeeds([&] {
      try {
        run(*pool, [](int, int) {});
        return 1;
      } catch (const Error&) {
      }
      pool.reset();
      return 0;
    }));
    int calls = 0;
    run(*pool, [&](int thread, int) { calls += thread == 0; });  // the parent's pool still works
    CHECK_EQ(calls, 1);
  }
}

TEST(threads, "a pool of one thread works in a forked child") {
  ThreadPool pool(1);
  CHECK(child_succeeds([&] {
    int calls = 0;
    run(pool, [&](int, int) { ++calls; });
    return calls == 1 ? 0 : 1;
  }));
}
#endif

}  // namespace
}  // namespace d3rt
