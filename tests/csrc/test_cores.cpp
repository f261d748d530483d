// Cores: a thread leaves those that others have, and may run where it could before.
#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "../../csrc/cores.h"
#include "../../csrc/threads.h"
#include "check.h"

#if defined(__linux__)
#include <sched.h>

namespace d3rt {
namespace {

using Clock = std::chrono::steady_clock;

std::vector<int> allowed_cores() {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(static_cast<size_t>(core), &allowed)) cores.push_back(core);
  return cores;
}

void stay_on(const std::vector<int>& cores) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int core : cores) CPU_SET(static_cast<size_t>(core), &set);
  sched_setaffinity(0, sizeof set, &set);
}

TEST(cores, "a thread leaves its core for one that nobody has, and may come back") {
  const auto before = allowed_cores();
  std::thread([&] {
    for (const int core : before) {
      stay_on({core});
      CHECK_EQ(current_core(), core);
      stay_on(before);
      const int here = current_core();
      const bool left = leave_cores(&here, 1);
      CHECK_EQ(left, before.size() > 1);
      CHECK(allowed_cores() == before);
    }
  }).join();
}

TEST(cores, "a thread stays where every core is taken") {
  const auto before = allowed_cores();
  CHECK(!leave_cores(before.data(), static_cast<int>(before.size())));
  CHECK(allowed_cores() == before);
}

TEST(cores, "threads of a pool that share a core come to every barrier, and may run where they could") {
  const auto before = allowed_cores();
  struct Job {
    const std::vector<int>& all;
    ThreadPool& pool;
    int rounds[3] = {0, 0, 0};
  };
  std::thread([&] {
    ThreadPool pool(3);
    Job job{before, pool};
    for (int i = 0; i < 20; ++i) {
      pool.run([](void* context, int, int) { stay_on({static_cast<Job*>(context)->all.front()}); }, &job);
      pool.run(
          [](void* context, int thread, int) {
            Job& of = *static_cast<Job*>(context);
            stay_on(of.all);
            for (int barrier = 0; barrier < 50; ++barrier) {
              of.pool.barrier(thread);
              ++of.rounds[thread];
            }
            CHECK(allowed_cores() == of.all);
          },
          &job);
    }
    for (const int rounds : job.rounds) CHECK_EQ(rounds, 1000);
  }).join();
}

TEST(cores, "a thread that waits for another of its pool on its own core leaves it") {
  const auto before = allowed_cores();
  if (before.size() < 2) return;
  struct Job {
    const std::vector<int>& all;
    ThreadPool& pool;
    int parted = 0;
  };
  std::thread([&] {
    ThreadPool pool(2);
    Job job{before, pool};
    for (int i = 0; i < 20; ++i) {
      pool.run([](void* context, int, int) { stay_on({static_cast<Job*>(context)->all.front()}); }, &job);
      pool.run(
          [](void* context, int thread, int) {
            Job& of = *static_cast<Job*>(context);
            if (thread == 0) stay_on(of.all);
            if (thread == 1)  // too short a while for the system's own load balancing
              for (const auto end = Clock::now() + std::chrono::microseconds(300); Clock::now() < end;)
                continue;
            of.pool.barrier(thread);
            if (thread == 0) of.parted += current_core() != of.all.front();
          },
          &job);
    }
    CHECK(job.parted >= 5);  // where others keep the cores busy, the system takes some of them back
  }).join();
}

TEST(cores, "of two threads that share a core one leaves, and then both stay") {
  const auto before = allowed_cores();
  if (before.size() < 2) return;
  struct Job {
    const std::vector<int>& all;
    ThreadPool& pool;
    int changes[2] = {0, 0};
  };
  int fewest = 1000;  // of 20 times: others move threads too
  std::thread([&] {
    ThreadPool pool(2);
    for (int i = 0; i < 20; ++i) {
      Job job{before, pool};
      pool.run([](void* context, int, int) { stay_on({static_cast<Job*>(context)->all.front()}); }, &job);
      pool.run(
          [](void* context, int thread, int) {
            Job& of = *static_cast<Job*>(context);
            stay_on(of.all);
            int last = current_core();
            for (int barrier = 0; barrier < 200; ++barrier) {
              of.pool.barrier(thread);
              const int now = current_core();
              of.changes[thread] += now != last;
              last = now;
            }
          },
          &job);
      fewest = std::min(fewest, job.changes[0] + job.changes[1]);
    }
  }).join();
  CHECK(fewest <= 2);
}

}  // namespace
}  // namespace d3rt
#endif
