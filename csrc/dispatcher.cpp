#include "dispatcher.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace d3rt {
namespace {

// A waiting time that the clock can add to now; 3 years stand for anything longer.
std::chrono::duration<double> at_most(double seconds) {
  constexpr double kLongest = 1e8;
  if (!(seconds < kLongest)) return std::chrono::duration<double>(kLongest);
  return std::chrono::duration<double>(std::max(seconds, 0.0));
}

}  // namespace

Dispatcher::Dispatcher(TensorView token, TensorView pos, TensorView logits, TensorView filled,
                       const cpu::Kernels& kernels)
    : token_(token), pos_(pos), logits_(logits), filled_(filled), kernels_(kernels), owner_pid_(getpid()) {
  check_view("dispatcher", "token", token, DType::i32, {-1});
  batch_ = token.size(0);
  check_view("dispatcher", "pos", pos, DType::i32, {batch_});
  check_view("dispatcher", "logits", logits, DType::f32, {batch_, -1});
  check_view("dispatcher", "filled", filled, DType::i32, {-1, batch_}, false);
  vocab_size_ = logits.size(1);
  num_layers_ = filled.size(0);
  finished_.assign(static_cast<size_t>(batch_), false);
}

Dispatcher::~Dispatcher() {
  if (getpid() !=
      owner_pid_) {  // a forked child has not got the thread, only a stale handle that cannot be joined
    static_cast<void>(new std::thread(std::move(thread_)));
    return;
  }
  cancel();
}

int Dispatcher::add(std::shared_ptr<Tape> tape, std::vector<int> reads, std::vector<int> fills) {
  std::lock_guard<std::mutex> turn(control_);
  require_idle("add a program");
  for (const auto* layers : {&reads, &fills})
    for (int layer : *layers)
      if (layer < 0 || layer >= num_layers_)
        throw InvalidArgument("dispatcher: layer " + std::to_string(layer) + " is not in 0.." +
                              std::to_string(num_layers_ - 1));
  programs_.push_back({std::move(tape), std::move(reads), std::move(fills)});
  return static_cast<int>(programs_.size()) - 1;
}

const Dispatcher::Program& Dispatcher::program(int number) const {
  if (number < 0 || number >= static_cast<int>(programs_.size()))
    throw InvalidArgument("dispatcher: no program " + std::to_string(number) + "; there are " +
                          std::to_string(programs_.size()));
  return programs_[static_cast<size_t>(number)];
}

void Dispatcher::require_idle(const char* what) const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (running_) throw Error(std::string("dispatcher: cannot ") + what + " while a generation runs");
}

void Dispatcher::join() {
  if (thread_.joinable()) thread_.join();
}

void Dispatcher::start(RunSpec spec) {
  std::lock_guard<std::mutex> turn(control_);
  require_idle("start");
  join();
  for (int number : spec.programs) program(number);
  if (spec.sampling.repetition_penalty != 1.0f && spec.seen.size() != static_cast<size_t>(batch_))
    throw InvalidArgument("dispatcher: a repetition penalty needs the tokens seen by each of the " +
                          std::to_string(batch_) + " slots");
  finished_.assign(static_cast<size_t>(batch_), false);
  cancelled_.store(false);
  const size_t steps = spec.programs.size() + 1;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    log_.clear();
    log_.reserve(steps * static_cast<size_t>(batch_));  // no allocation between tokens
    step_seconds_.clear();
    step_seconds_.reserve(steps);
    error_ = nullptr;
    running_ = true;
  }
  try {
    thread_ = std::thread([this, spec = std::move(spec)] {
      std::exception_ptr error;
      try {
        loop(spec);
      } catch (...) {
        error = std::current_exception();
      }
      std::lock_guard<std::mutex> lock(mutex_);
      error_ = error;
      running_ = false;
      progress_.notify_all();
    });
  } catch (...) {  // no thread to be had: the dispatcher stays usable
    std::lock_guard<std::mutex> lock(mutex_);
    running_ = false;
    throw;
  }
}

void Dispatcher::loop(const RunSpec& spec) {
  using Clock = std::chrono::steady_clock;
  Sampler sampler(spec.sampling, vocab_size_, spec.seen, kernels_);
  std::vector<int32_t> tokens(static_cast<size_t>(batch_));
  std::vector<bool> finished(static_cast<size_t>(batch_), false);
  for (size_t i = 0; i <= spec.programs.size() && !cancelled_.load(std::memory_order_relaxed); ++i) {
    const auto begin = Clock::now();
    if (i > 0) replay(program(spec.programs[i - 1]));
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
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      log_.insert(log_.end(), tokens.begin(), tokens.end());
      step_seconds_.push_back(seconds);
      if (token_readers_ > 0)
        progress_.notify_all();  // whoever waits for the end only is not woken for a token
    }
    if (std::all_of(finished.begin(), finished.end(), [](bool f) { return f; })) break;
  }
}

void Dispatcher::check_holes(const Program& program) const {
  const int32_t* filled = filled_.ptr<int32_t>();
  const int32_t* pos = pos_.ptr<int32_t>();
  for (int layer : program.reads) {
    for (int64_t slot = 0; slot < batch_; ++slot) {
      const int32_t complete = filled[layer * filled_.strides[0] + slot];
      if (complete >= pos[slot]) continue;
      throw Hole("layer " + std::to_string(layer) + " of slot " + std::to_string(slot) + " has K,V for " +
                 std::to_string(complete) + " positions, but this step reads " + std::to_string(pos[slot]) +
                 ": the steps before skipped this layer without filling its cache; use kv_fill='eager'");
    }
  }
}

void Dispatcher::begin() {
  std::lock_guard<std::mutex> turn(control_);
  require_idle("begin");
  finished_.assign(static_cast<size_t>(batch_), false);
}

void Dispatcher::step(int number) {
  std::lock_guard<std::mutex> turn(control_);
  require_idle("step");
  replay(program(number));
}

void Dispatcher::commit(const std::vector<int32_t>& tokens, const std::vector<bool>& finished) {
  std::lock_guard<std::mutex> turn(control_);
  require_idle("commit");
  if (tokens.size() != static_cast<size_t>(batch_) || finished.size() != static_cast<size_t>(batch_))
    throw InvalidArgument("dispatcher: commit takes one token and one flag for each of the " +
                          std::to_string(batch_) + " slots");
  advance(tokens, finished);
}

void Dispatcher::replay(const Program& current) {
  check_holes(current);
  current.tape->replay();
  // K,V of position pos now exist in the layers that ran or were filled; a layer with an older hole stays
  // where it is.
  int32_t* filled = filled_.ptr<int32_t>();
  const int32_t* pos = pos_.ptr<int32_t>();
  for (const auto* layers : {&current.reads, &current.fills}) {
    for (int layer : *layers) {
      for (int64_t slot = 0; slot < batch_; ++slot) {
        int32_t& complete = filled[layer * filled_.strides[0] + slot];
        if (complete == pos[slot] && !finished_[static_cast<size_t>(slot)]) complete = pos[slot] + 1;
      }
    }
  }
}

void Dispatcher::advance(const std::vector<int32_t>& tokens, const std::vector<bool>& finished) {
  for (int64_t slot = 0; slot < batch_; ++slot) {
    const size_t index = static_cast<size_t>(slot);
    // A slot that finished earlier stands still: it recomputes at one position past its end, which is never
    // read.
    if (!finished_[index]) ++pos_.ptr<int32_t>()[slot];
    token_.ptr<int32_t>()[slot] = tokens[index];
  }
  finished_ = finished;
}

bool Dispatcher::wait(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  const bool ended = progress_.wait_for(lock, at_most(seconds), [&] { return !running_; });
  if (ended && error_) std::rethrow_exception(error_);
  return ended;
}

std::vector<int32_t> Dispatcher::read(size_t first_step, double seconds, bool* ended) {
  std::unique_lock<std::mutex> lock(mutex_);
  const size_t from = first_step * static_cast<size_t>(batch_);
  ++token_readers_;
  progress_.wait_for(lock, at_most(seconds), [&] { return log_.size() > from || !running_; });
  --token_readers_;
  if (log_.size() > from) {
    *ended = false;
    return {log_.begin() + static_cast<std::ptrdiff_t>(from), log_.end()};
  }
  *ended = !running_;
  if (*ended && error_) std::rethrow_exception(error_);
  return {};
}

void Dispatcher::cancel() {
  std::lock_guard<std::mutex> turn(control_);
  cancelled_.store(true);
  join();
}

std::vector<double> Dispatcher::step_seconds() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return step_seconds_;
}

}  // namespace d3rt
