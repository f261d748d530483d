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
  return number;
}

void Dispatcher::start(RunSpec spec) {
  const Turn turn = idle_turn("start");
  for (int number : spec.programs) program(number);
  if (spec.sampling.repetition_penalty != 1.0f && spec.seen.size() != static_cast<size_t>(batch()))
    throw InvalidArgument("dispatcher: a repetition penalty needs the tokens seen by each of the " +
                          std::to_string(batch()) + " slots");
  const size_t steps = spec.programs.size() + 1;
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
