#include "loop.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "openmp.h"

namespace d3rt {
namespace {

// How long a wait goes on before it asks whether it is interrupted.
constexpr auto kBetweenQuestions = std::chrono::milliseconds(100);

// A waiting time that the clock can add to now; 3 years stand for anything longer.
std::chrono::duration<double> at_most(double seconds) {
  constexpr double kLongest = 1e8;
  if (!(seconds < kLongest)) return std::chrono::duration<double>(kLongest);
  return std::chrono::duration<double>(std::max(seconds, 0.0));
}

}  // namespace

Loop::Loop(TensorView pos, TensorView filled)
    : kv_(pos, filled), finished_(static_cast<size_t>(kv_.batch()), false), owner_pid_(getpid()) {}

void Loop::end() {
  // A forked child has not got the thread, only a stale handle that cannot be joined.
  if (getpid() != owner_pid_) {
    static_cast<void>(new std::thread(std::move(thread_)));
    return;
  }
  cancel();
}

Loop::Turn Loop::idle_turn(const char* what) {
  Turn turn(control_);
  std::lock_guard<std::mutex> lock(mutex_);
  if (running_) throw Error(std::string("dispatcher: cannot ") + what + " while a generation runs");
  return turn;
}

void Loop::join() {
  if (thread_.joinable()) thread_.join();
}

int Loop::add_program(LayerUse use) {
  kv_.check_layers(use);
  programs_.push_back(std::move(use));
  return static_cast<int>(programs_.size()) - 1;
}

const LayerUse& Loop::program(int number) const {
  if (number < 0 || number >= static_cast<int>(programs_.size()))
    throw InvalidArgument("dispatcher: no program " + std::to_string(number) + "; there are " +
                          std::to_string(programs_.size()));
  return programs_[static_cast<size_t>(number)];
}

void Loop::begin() {
  const Turn turn = idle_turn("begin");
  finished_.assign(finished_.size(), false);
}

void Loop::run(size_t steps, std::function<void()> body) {
  join();
  finished_.assign(finished_.size(), false);
  cancelled_.store(false);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    log_.clear();
    log_.reserve(steps * static_cast<size_t>(batch()));  // no allocation between tokens
    step_seconds_.clear();
    step_seconds_.reserve(steps);
    error_ = nullptr;
    running_ = true;
  }
  try {
    thread_ = std::thread([this, body = std::move(body)] {
      std::exception_ptr error;
      try {
        body();
      } catch (...) {
        error = std::current_exception();
      }
      std::lock_guard<std::mutex> lock(mutex_);
      error_ = error;
      running_ = false;
      progress_.notify_all();
    });
  } catch (...) {  // no thread to be had: the loop stays usable
    std::lock_guard<std::mutex> lock(mutex_);
    running_ = false;
    throw;
  }
}

void Loop::log(const std::vector<int32_t>& tokens, double seconds) {
  std::lock_guard<std::mutex> lock(mutex_);
  log_.insert(log_.end(), tokens.begin(), tokens.end());
  step_seconds_.push_back(seconds);
  if (token_readers_ > 0) progress_.notify_all();  // whoever waits for the end only is not woken for a token
}

bool Loop::wait(double seconds, const std::function<bool()>& interrupted) {
  using Clock = std::chrono::steady_clock;
  struct Wait {
    Loop& loop;
    const std::function<bool()>& interrupted;
    const Clock::time_point until;
    bool given_up = false;  // guarded by the loop's mutex

    void follow() {
      std::unique_lock<std::mutex> lock(loop.mutex_);
      loop.progress_.wait_until(lock, until, [this] { return !loop.running_ || given_up; });
    }
    bool lead() {
      std::unique_lock<std::mutex> lock(loop.mutex_);
      const auto ended = [this] { return !loop.running_; };
      while (!given_up) {
        const auto next = std::min(until, Clock::now() + kBetweenQuestions);
        if (loop.progress_.wait_until(lock, next, ended) || next == until) break;
        if (!interrupted) continue;
        lock.unlock();
        const bool stop = interrupted();
        lock.lock();
        given_up = stop;
      }
      if (given_up) loop.progress_.notify_all();
      return ended();
    }
  } wait = {*this, interrupted, Clock::now() + std::chrono::duration_cast<Clock::duration>(at_most(seconds))};
  // The OpenMP threads of the caller, who has just run a prefill, would spin for milliseconds on the cores
  // that the first steps need. They wait here with it instead.
  const auto each = [](void* wait, int thread, int) {
    if (thread != 0) static_cast<Wait*>(wait)->follow();
    if (thread == 0) static_cast<void>(static_cast<Wait*>(wait)->lead());
  };
  if (is_running()) static_cast<void>(run_on_openmp(each, &wait, 0));
  const bool ended = wait.lead();
  std::lock_guard<std::mutex> lock(mutex_);
  if (ended && error_ && !wait.given_up) std::rethrow_exception(error_);
  return ended;
}

bool Loop::is_running() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return running_;
}

std::vector<int32_t> Loop::read(size_t first_step, double seconds, bool* ended) {
  std::unique_lock<std::mutex> lock(mutex_);
  const size_t from = first_step * static_cast<size_t>(batch());
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

void Loop::cancel() {
  std::lock_guard<std::mutex> turn(control_);
  cancelled_.store(true);
  join();
}

std::vector<double> Loop::step_seconds() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return step_seconds_;
}

}  // namespace d3rt
