// Dispatcher: the whole decode loop in C++. For step i it takes the recorded step (tape) that the schedule
// names, checks that it reads no hole, replays it, samples, tests for EOS, logs the token and advances. It
// runs on its own thread; callers wait for it or read the tokens as they come, and can cancel it between two
// steps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "sampler.h"
#include "tape.h"

namespace d3rt {

// One generation, from the logits that the prefill left behind.
struct RunSpec {
  std::vector<int>
      programs;  // programs[i - 1] is replayed at step i, so max_new_tokens is programs.size() + 1
  std::vector<int32_t> eos_tokens;
  int32_t pad_token = 0;  // what a finished slot emits
  SamplingParams sampling;
  std::vector<std::vector<int32_t>> seen;  // per slot, for the repetition penalty; empty when it is 1
};

class Dispatcher {
 public:
  // token, pos: [B] int32; logits: [B, V] float32; filled: [L, B] int32. pos[b] is the position of the token
  // in token[b] once it is consumed; filled[l][b] says that layer l has K,V for positions 0 .. filled - 1 of
  // slot b.
  Dispatcher(TensorView token, TensorView pos, TensorView logits, TensorView filled,
             const cpu::Kernels& kernels);
  ~Dispatcher();
  Dispatcher(const Dispatcher&) = delete;
  Dispatcher& operator=(const Dispatcher&) = delete;

  // Adds a recorded step; returns its number. `reads`: layers whose attention runs; `fills`: layers it only
  // writes.
  int add(std::shared_ptr<Tape> tape, std::vector<int> reads, std::vector<int> fills);

  // Starts a generation on the dispatcher's thread: samples step 0 from the logits, then runs the schedule.
  void start(RunSpec spec);
  // Waits until the generation has ended or the time is over; true when ended. Rethrows what stopped it.
  bool wait(double seconds);
  // Tokens of steps from `first_step` on that exist, [steps * B], waiting for at least one; `ended` when none
  // follow.
  std::vector<int32_t> read(size_t first_step, double seconds, bool* ended);
  // Asks the generation to stop after the current step; returns when it has.
  void cancel();

  // The same loop, driven from outside (custom logits processors): begin once, then for each step replay it
  // (step 0 has nothing to replay), choose tokens from the logits, and commit them.
  void begin();
  void step(int program);
  void commit(const std::vector<int32_t>& tokens, const std::vector<bool>& finished);

  std::vector<double> step_seconds() const;  // replay + sampling of each step of the last generation
  int64_t batch() const { return batch_; }

 private:
  struct Program {
    std::shared_ptr<Tape> tape;
    std::vector<int> reads, fills;
  };

  void loop(const RunSpec& spec);
  void replay(const Program& program);
  void advance(const std::vector<int32_t>& tokens, const std::vector<bool>& finished);
  void check_holes(const Program& program) const;
  const Program& program(int number) const;
  void require_idle(const char* what) const;
  void join();

  TensorView token_, pos_, logits_, filled_;
  const cpu::Kernels& kernels_;
  const int owner_pid_;
  int64_t batch_, vocab_size_, num_layers_;
  std::vector<Program> programs_;
  std::vector<bool> finished_;

  std::mutex control_;  // held by whoever adds, starts, stops or drives: those calls come one after the other
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
