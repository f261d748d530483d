// Dispatcher: the whole decode loop on the CPU. For step i it takes the recorded step (tape) that the
// schedule names, checks that it reads no hole, replays it, samples, tests for EOS, logs the token and
// advances.
#pragma once

#include <memory>
#include <vector>

#include "loop.h"
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

// step_seconds() is replay and sampling of each step.
class Dispatcher : public Loop {
 public:
  // token: [B] int32; logits: [B, V] float32; pos and filled: see KvState.
  Dispatcher(TensorView token, TensorView pos, TensorView logits, TensorView filled,
             const cpu::Kernels& kernels);
  ~Dispatcher() { end(); }

  // Adds a recorded step; returns its number. `reads`: layers whose attention runs; `fills`: layers it only
  // writes.
  int add(std::shared_ptr<Tape> tape, std::vector<int> reads, std::vector<int> fills);

  // Starts a generation on the dispatcher's thread: samples step 0 from the logits, then runs the schedule.
  void start(RunSpec spec);

  // The same loop, driven from outside (custom logits processors): begin once, then for each step replay it
  // (step 0 has nothing to replay), choose tokens from the logits, and commit them.
  void step(int program);
  void commit(const std::vector<int32_t>& tokens, const std::vector<bool>& finished);

 private:
  void generate(const RunSpec& spec);
  void replay(int number);
  void advance(const std::vector<int32_t>& tokens, const std::vector<bool>& finished);

  TensorView token_, logits_;
  const cpu::Kernels& kernels_;
  int64_t vocab_size_;
  std::vector<std::shared_ptr<Tape>> tapes_;  // by program number
};

}  // namespace d3rt
