// ThreadPool: the persistent workers that replay a tape together, and the barrier between its phases.
// Workers spin for a short while after each job (the next decode step is microseconds away) and then park, so
// an idle runtime costs no CPU.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace d3rt {

class ThreadPool {
 public:
  using Job = void (*)(void* context, int thread, int num_threads);

  explicit ThreadPool(int num_threads);  // the caller of run() is thread 0, so num_threads - 1 are started
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }
  // Runs job on every thread and returns when all have. One caller at a time; others wait their turn.
  void run(Job job, void* context);
  // To be called by every thread of the job, with its number: nobody passes before all have arrived.
  void barrier(int thread);

 private:
  void work(int thread);
  // What a thread does that has waited for long: others may need its core. Moves away from another of this
  // pool, if `may_move`, or yields. True if it moved.
  bool give_way(int thread, bool may_move);
  void end_workers();

  const int num_threads_;
  const int owner_pid_;
  std::vector<std::thread> workers_;
  std::mutex run_mutex_;  // held for a whole run()

  alignas(64) std::atomic<uint64_t> job_number_{0};
  alignas(64) std::atomic<int> unfinished_{0};
  // Barriers that each thread has come to. With few threads everybody looks at everybody: one line travels
  // from core to core where a common counter would travel twice, and then a word that all have arrived.
  struct alignas(64) Arrivals {
    std::atomic<uint32_t> count{0};
    std::atomic<int> core{-1};  // where it was when its job began or it last waited for long; -1: on the way
  };
  const std::unique_ptr<Arrivals[]> arrivals_;
  alignas(64) std::atomic<uint32_t> arrived_{0};  // by all threads together, where they are many
  alignas(64) Job job_ = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stop_{false};
  struct Parking {
    std::mutex mutex;
    std::condition_variable wake;
  };
  std::unique_ptr<Parking> parking_ = std::make_unique<Parking>();
  std::atomic<int> parked_{0};
};

}  // namespace d3rt
