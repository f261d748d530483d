#include "dispatcher.h"

#include <algorithm>
#include <chrono>

namespace d3rt {
namespace {

// pos, which has a line for each token.
const TensorView& fitting(const TensorView& pos, const TensorView& token) {
  check_view("dispatcher", "token", token, DType::i32, {-1});
  check_view("dispatcher", "pos", pos, DType::i32, {token.size(0)});
  return pos;
}

}  // namespace

Dispatcher::Dispatcher(TensorView token, TensorView pos, TensorView logits, TensorView filled,
                       const cpu::Kernels& kernels)
    : Loop(fitting(pos, token), filled), token_(token), logits_(logits), kernels_(kernels) {
  check_view("dispatcher", "logits", logits, DType::f32, {batch(), -1});
  vocab_size_ = logits.size(1);
}

int Dispatcher::add(std::shared_ptr<Tape> tape, std::vector<int> reads, std::vector<int> fills) {
  const Turn turn = idle_turn("add a program");
  const int number = add_program({std::move(reads), std::move(fills)});
  tapes_.push_back(std::move(tape));
  climbs_.emplace_back();
  return number;
}

int Dispatcher::add_ladder(std::vector<Rung> rungs, int top, TensorView confidence) {
  const Turn turn = idle_turn("add a ladder");
  if (rungs.empty()) throw InvalidArgument("dispatcher: a ladder without rungs is a program; add it as one");
  check_view("dispatcher", "confidence", confidence, DType::f32, {batch()});
  std::vector<int> parts = {top};
  for (const Rung& rung : rungs) parts.insert(parts.end(), {rung.segment, rung.exit});
  for (int number : parts) {
    program(number);
    if (!tapes_[static_cast<size_t>(number)])
      throw InvalidArgument("dispatcher: program " + std::to_string(number) +
                            " is a climb, so it cannot be a part of a ladder");
  }
  ladders_.push_back({std::move(rungs), top, confidence});
  return static_cast<int>(ladders_.size()) - 1;
}

int Dispatcher::add_climb(int ladder, double threshold) {
  const Turn turn = idle_turn("add a climb");
  if (ladder < 0 || ladder >= static_cast<int>(ladders_.size()))
    throw InvalidArgument("dispatcher: no ladder " + std::to_string(ladder) + "; there are " +
                          std::to_string(ladders_.size()));
  const int number = add_program({});  // each of its parts has the layers that it uses
  tapes_.push_back(nullptr);
  climbs_.push_back({ladder, threshold});
  return number;
}

std::vector<int> Dispatcher::exits() const {
  std::lock_guard<std::mutex> lock(exits_mutex_);
  return exits_;
}

void Dispatcher::start(RunSpec spec) {
  const Turn turn = idle_turn("start");
  for (int number : spec.programs) program(number);
  if (spec.sampling.repetition_penalty != 1.0f && spec.seen.size() != static_cast<size_t>(batch()))
    throw InvalidArgument("dispatcher: a repetition penalty needs the tokens seen by each of the " +
                          std::to_string(batch()) + " slots");
  const size_t steps = spec.programs.size() + 1;
  {
    std::lock_guard<std::mutex> lock(exits_mutex_);
    exits_.clear();
    exits_.reserve(steps);
  }
  run(steps, [this, spec = std::move(spec)] { generate(spec); });
}

void Dispatcher::generate(const RunSpec& spec) {
  using Clock = std::chrono::steady_clock;
  Sampler sampler(spec.sampling, vocab_size_, spec.seen, kernels_);
  std::vector<int32_t> tokens(static_cast<size_t>(batch()));
  std::vector<bool> finished(static_cast<size_t>(batch()), false);
  for (size_t i = 0; i <= spec.programs.size() && !cancelled(); ++i) {
    const auto begin = Clock::now();
    if (i > 0) replay(spec.programs[i - 1]);
    for (size_t slot = 0; slot < tokens.size(); ++slot) {
      if (finished[slot]) {
        tokens[slot] = spec.pad_token;
        continue;
      }
      float* row = logits_.ptr<float>() + static_cast<int64_t>(slot) * vocab_size_;
      tokens[slot] = sampler.sample(row, static_cast<int>(slot), static_cast<int64_t>(i));
      finished[slot] =
          std::find(spec.eos_tokens.begin(), spec.eos_tokens.end(), tokens[slot]) != spec.eos_tokens.end();
    }
    advance(tokens, finished);
    log(tokens, std::chrono::duration<double>(Clock::now() - begin).count());
    if (std::all_of(finished.begin(), finished.end(), [](bool f) { return f; })) break;
  }
}

void Dispatcher::begin() {
  Loop::begin();
  std::lock_guard<std::mutex> lock(exits_mutex_);
  exits_.clear();
}

void Dispatcher::step(int number) {
  const Turn turn = idle_turn("step");
  replay(number);
}

void Dispatcher::commit(const std::vector<int32_t>& tokens, const std::vector<bool>& finished) {
  const Turn turn = idle_turn("commit");
  if (tokens.size() != static_cast<size_t>(batch()) || finished.size() != static_cast<size_t>(batch()))
    throw InvalidArgument("dispatcher: commit takes one token and one flag for each of the " +
                          std::to_string(batch()) + " slots");
  advance(tokens, finished);
}

void Dispatcher::replay(int number) {
  program(number);
  const Climb& step = climbs_[static_cast<size_t>(number)];
  int exit = kNoClimb;
  if (step.ladder == kNoClimb)
    play(number);
  else
    exit = climb(ladders_[static_cast<size_t>(step.ladder)], step.threshold);
  std::lock_guard<std::mutex> lock(exits_mutex_);
  exits_.push_back(exit);
}

int Dispatcher::climb(const Ladder& ladder, double threshold) {
  int at = 0;
  for (const Rung& rung : ladder.rungs) {
    play(rung.segment);
    if (confident(ladder.confidence, finished_, threshold)) {
      play(rung.exit);
      return at;
    }
    ++at;
  }
  play(ladder.top);
  return at;
}

void Dispatcher::play(int number) {
  const LayerUse& use = program(number);
  kv_.check_holes(use);
  tapes_[static_cast<size_t>(number)]->replay();
  kv_.wrote(use, finished_);
}

void Dispatcher::advance(const std::vector<int32_t>& tokens, const std::vector<bool>& finished) {
  kv_.advance(finished_);
  std::copy(tokens.begin(), tokens.end(), token_.ptr<int32_t>());
  finished_ = finished;
}

}  // namespace d3rt
