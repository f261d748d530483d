// Loop: what every native decode loop has, whatever it launches. A generation runs on the loop's own thread;
// callers wait for it or read its tokens as they come, and can cancel it. What stopped it is rethrown to
// whoever asks. Which steps there are and what one is, is up to the class derived from it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "kv_state.h"

namespace d3rt {

class Loop {
 public:
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  // Waits until the generation has ended or the time is over; true when ended. Rethrows what stopped it.
  // `interrupted`, which the calling thread asks ten times a second, ends the wait as well.
  bool wait(double seconds, const std::function<bool()>& interrupted = {});
  // Tokens of steps from `first_step` on that exist, [steps * B], waiting for at least one; `ended` when none
  // follow.
  std::vector<int32_t> read(size_t first_step, double seconds, bool* ended);
  // Asks the generation to stop after the current step; returns when it has.
  void cancel();
  // Readies a loop that is driven from outside: no slot has finished.
  void begin();

  std::vector<double> step_seconds() const;  // of each step of the last generation
  int64_t batch() const { return kv_.batch(); }

 protected:
  using Turn = std::unique_lock<std::mutex>;

  // pos, filled: see KvState.
  Loop(TensorView pos, TensorView filled);
  ~Loop() = default;

  // Whoever adds, starts or drives holds a turn: those calls come one after the other, and never while a
  // generation runs.
  Turn idle_turn(const char* what);
  // The last thing to happen before the members of a derived class go: its destructor calls this.
  void end();
  // Runs body on the thread; it logs up to `steps` steps. Takes a turn to call.
  void run(size_t steps, std::function<void()> body);

  // For body: one step's tokens [B], and its time.
  void log(const std::vector<int32_t>& tokens, double seconds);
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

  int add_program(LayerUse use);
  const LayerUse& program(int number) const;  // throws InvalidArgument when there is none

  KvState kv_;
  std::vector<bool> finished_;  // per slot, before the step at hand

 private:
  void join();
  bool is_running() const;

  const int owner_pid_;
  std::vector<LayerUse> programs_;
  std::mutex control_;  // held during a turn
  std::thread thread_;
  std::atomic<bool> cancelled_{false};
  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable progress_;
  bool running_ = false;
  int token_readers_ = 0;
  std::vector<int32_t> log_;  // tokens of every step, [steps * B]
  std::vector<double> step_seconds_;
  std::exception_ptr error_;
};

}  // namespace d3rt
