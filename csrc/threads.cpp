#include "threads.h"

#include <unistd.h>

#include <chrono>
#include <system_error>

#include "cores.h"
#include "errors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace d3rt {
namespace {

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Longer than sampling one token, shorter than anything a person would call busy waiting.
constexpr auto kSpinTime = std::chrono::microseconds(300);
// After this many pauses at a barrier (some 4 us), others probably need this core: give it up between looks.
// With 4000 a step beside a thread on the same core took up to 19 ms, with 300 up to 2; undisturbed steps
// take the same time.
constexpr int kSpinsBeforeYield = 300;
// With more threads than this, looking at each costs more than a common counter.
constexpr int kMostWatched = 8;
// Threads of a larger pool stay where they are.
constexpr int kMostMoved = 256;
// Stands for the core of a thread that is leaving it.
constexpr int kOnTheWay = -1;

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads),
      owner_pid_(getpid()),
      arrivals_(new Arrivals[static_cast<size_t>(num_threads < 1 ? 0 : num_threads)]) {
  if (num_threads < 1)
    throw InvalidArgument("threads=" + std::to_string(num_threads) + ": must be at least 1");
  try {
    for (int thread = 1; thread < num_threads; ++thread)
      workers_.emplace_back([this, thread] { work(thread); });
  } catch (const std::system_error&) {
    end_workers();
    throw Error("threads=" + std::to_string(num_threads) + ": the system gives this process no more than " +
                std::to_string(workers_.size() + 1));
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() != owner_pid_) {
    // A forked child has no workers, only stale handles: neither they nor what the workers wait on can be
    // destroyed.
    static_cast<void>(new std::vector<std::thread>(std::move(workers_)));
    static_cast<void>(parking_.release());
    return;
  }
  end_workers();
}

void ThreadPool::end_workers() {
  {
    std::lock_guard<std::mutex> lock(parking_->mutex);
    stop_.store(true);
  }
  parking_->wake.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(Job job, void* context) {
  if (num_threads_ == 1) {
    std::lock_guard<std::mutex> turn(run_mutex_);
    job(context, 0, 1);
    return;
  }
  if (getpid() != owner_pid_)
    throw Error(
        "this runtime was made before fork(): its threads do not exist in the child; compile the model "
        "again");
  std::lock_guard<std::mutex> turn(run_mutex_);
  job_ = job;
  context_ = context;
  unfinished_.store(num_threads_ - 1, std::memory_order_relaxed);
  job_number_.fetch_add(1);  // seq_cst, against parked_: a worker either sees the job or is seen parked
  if (parked_.load() > 0) {
    std::lock_guard<std::mutex> lock(parking_->mutex);
    parking_->wake.notify_all();
  }
  arrivals_[0].core.store(current_core(), std::memory_order_relaxed);
  job(context, 0, num_threads_);
  bool moved = false;
  for (int spins = 0; unfinished_.load(std::memory_order_acquire) != 0;) {
    pause_cpu();
    if (++spins > kSpinsBeforeYield) moved |= give_way(0, !moved);
  }
}

// The system may wake a worker on the core of the thread that woke it, where both wait for each other until
// its load balancing comes round: tens of milliseconds in which the other core has nothing to do.
bool ThreadPool::give_way(int thread, bool may_move) {
  const int mine = current_core();
  std::atomic<int>& core = arrivals_[static_cast<size_t>(thread)].core;
  core.store(mine, std::memory_order_relaxed);
  if (may_move && mine >= 0 && num_threads_ <= kMostMoved) {
    int taken[kMostMoved], count = 0;  // no vector: a step allocates nothing
    bool shared = false;
    for (int other = 0; other < num_threads_; ++other) {
      if (other == thread) continue;
      taken[count] = arrivals_[static_cast<size_t>(other)].core.load(std::memory_order_relaxed);
      shared |= taken[count++] == mine;
    }
    if (shared) {
      // The other runs as soon as this one is on its way. If it then found both still here, it would leave
      // as well, to where this one goes, and so on at every barrier.
      core.store(kOnTheWay, std::memory_order_relaxed);
      const bool moved = leave_cores(taken, count);
      core.store(current_core(), std::memory_order_relaxed);
      if (moved) return true;
    }
  }
  std::this_thread::yield();
  return false;
}

void ThreadPool::barrier(int thread) {
  if (num_threads_ == 1) return;
  std::atomic<uint32_t>& mine = arrivals_[static_cast<size_t>(thread)].count;
  const uint32_t round = mine.load(std::memory_order_relaxed) + 1;
  // Counts wrap around, so that they are compared by their difference.
  bool moved = false;
  const auto wait_for = [&](const std::atomic<uint32_t>& count, uint32_t least) {
    for (int spins = 0; static_cast<int32_t>(count.load(std::memory_order_acquire) - least) < 0;) {
      pause_cpu();
      if (++spins > kSpinsBeforeYield) moved |= give_way(thread, !moved);
    }
  };
  if (num_threads_ > kMostWatched) {
    mine.store(round, std::memory_order_relaxed);
    arrived_.fetch_add(1, std::memory_order_acq_rel);
    return wait_for(arrived_, round * static_cast<uint32_t>(num_threads_));
  }
  mine.store(round, std::memory_order_release);
  for (int other = 0; other < num_threads_; ++other)
    if (other != thread) wait_for(arrivals_[static_cast<size_t>(other)].count, round);
}

void ThreadPool::work(int thread) {
  uint64_t done = 0;
  while (true) {
    const auto spin_until = std::chrono::steady_clock::now() + kSpinTime;
    int spins = 0;
    while (job_number_.load(std::memory_order_acquire) == done && !stop_.load(std::memory_order_relaxed)) {
      pause_cpu();
      if (++spins % 64 == 0 && std::chrono::steady_clock::now() > spin_until) {
        std::unique_lock<std::mutex> lock(parking_->mutex);
        parked_.fetch_add(1);
        parking_->wake.wait(lock, [&] { return job_number_.load() != done || stop_.load(); });
        parked_.fetch_sub(1);
      }
    }
    if (stop_.load()) return;
    ++done;
    arrivals_[static_cast<size_t>(thread)].core.store(current_core(), std::memory_order_relaxed);
    job_(context_, thread, num_threads_);
    unfinished_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace d3rt
