// Dispatcher: the whole decode loop on the CPU. For step i it takes the recorded step (tape) that the
// schedule names, checks that it reads no hole, replays it, samples, tests for EOS, logs the token and
// advances. A step may also be a climb: tapes one after the other, until one is confident (ladder.h).
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "ladder.h"
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

  // Adds a ladder of programs that are there already; returns its number. confidence: [B] float32, which
  // their tapes write.
  int add_ladder(std::vector<Rung> rungs, int top, TensorView confidence);
  // Adds a program that climbs that ladder, and ends at the first rung whose confidence reaches the
  // threshold; returns its number.
  int add_climb(int ladder, double threshold);
  // Of each step that was replayed since `start` or `begin`: the rung where a climb ended, as many as there
  // are for the top, and kNoClimb for a step that was none.
  std::vector<int> exits() const;
  static constexpr int kNoClimb = -1;

  // Starts a generation on the dispatcher's thread: samples step 0 from the logits, then runs the schedule.
  void start(RunSpec spec);

  // The same loop, driven from outside (custom logits processors): begin once, then for each step replay it
  // (step 0 has nothing to replay), choose tokens from the logits, and commit them.
  void begin();
  void step(int program);
  void commit(const std::vector<int32_t>& tokens, const std::vector<bool>& finished);

 private:
  void generate(const RunSpec& spec);
  // One step: a recorded one, or a climb.
  void replay(int number);
  void play(int number);
  int climb(const Ladder& ladder, double threshold);
  void advance(const std::vector<int32_t>& tokens, const std::vector<bool>& finished);

  TensorView token_, logits_;
  const cpu::Kernels& kernels_;
  int64_t vocab_size_;
  struct Climb {
    int ladder = kNoClimb;
    double threshold = 0;
  };
  std::vector<std::shared_ptr<Tape>> tapes_;  // by program number; null for a climb
  std::vector<Climb> climbs_;                 // by program number
  std::vector<Ladder> ladders_;
  mutable std::mutex exits_mutex_;
  std::vector<int> exits_;
};

}  // namespace d3rt
