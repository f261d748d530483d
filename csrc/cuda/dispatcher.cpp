#include "cuda/dispatcher.h"

#include <algorithm>
#include <chrono>

#include "sampler.h"

namespace d3rt::cuda {
namespace {

TensorView host_view(std::vector<int32_t>& values, std::initializer_list<int64_t> sizes) {
  TensorView view;
  view.data = values.data();
  view.dtype = DType::i32;
  view.ndim = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), view.sizes.begin());
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.strides[static_cast<size_t>(i)] = stride;
    stride *= view.sizes[static_cast<size_t>(i)];
  }
  return view;
}

}  // namespace

// One run of the loop. Steps 0 .. enqueued_ - 1 are on the stream, tokens of steps 0 .. read_ - 1 are logged.
class Dispatcher::Generation {
 public:
  Generation(Dispatcher& dispatcher, const RunSpec& spec)
      : d_(dispatcher),
        spec_(spec),
        total_(spec.programs.size() + 1),
        batch_(static_cast<size_t>(dispatcher.batch())),
        expected_(host_view(d_.expected_pos_, {d_.batch()}),
                  host_view(d_.expected_filled_,
                            {static_cast<int64_t>(d_.expected_filled_.size()) / d_.batch(), d_.batch()})),
        none_finished_(batch_, false),
        tokens_(batch_) {
    expected_.copy(d_.kv_);
  }

  void run() {
    const Context::Current current(*d_.context_);
    try {
      while (!over()) {
        while (enqueued_ < total_ && enqueued_ - read_ < d_.ahead_ && !d_.cancelled()) {
          if (expected_.has_hole(use(enqueued_))) {
            // Maybe only because a finished slot is not known yet: decide when all that is enqueued is read.
            read_all();
            if (over()) break;
            d_.kv_.check_holes(use(enqueued_));
          }
          enqueue();
        }
        if (!over()) read_next();
      }
    } catch (...) {
      leave();
      throw;
    }
    // Nothing of this generation may still run when the next one, or the caller, touches the buffers.
    synchronize();
  }

 private:
  const Driver& driver() const { return d_.context_->driver(); }
  int number(size_t step) const { return step == 0 ? spec_.first : spec_.programs[step - 1]; }
  const LayerUse& use(size_t step) const { return d_.program(number(step)); }
  size_t line(size_t step) const { return step % d_.ahead_; }

  bool over() const {
    if (std::all_of(d_.finished_.begin(), d_.finished_.end(), [](bool f) { return f; })) return true;
    return read_ == enqueued_ && (enqueued_ == total_ || d_.cancelled());
  }

  void enqueue() {
    const size_t step = enqueued_;
    const auto telling = [&] { return "enqueuing step " + std::to_string(step); };
    d_.steps_[static_cast<size_t>(number(step))]->enqueue(d_.stream_);
    const size_t bytes = batch_ * sizeof(int32_t);
    const DevicePointer from = d_.ring_ + step % static_cast<size_t>(d_.ring_rows_) * bytes;
    d_.context_->check(driver().cuMemcpyDtoHAsync(arrival(step), from, bytes, d_.stream_),
                       "cuMemcpyDtoHAsync", telling);
    d_.context_->check(driver().cuEventRecord(d_.arrived_[line(step)].get(), d_.stream_), "cuEventRecord",
                       telling);
    expected_.wrote(use(step), none_finished_);
    expected_.advance(none_finished_);
    ++enqueued_;
  }

  // Waits for the oldest step that is not read, and logs its tokens.
  void read_next() {
    const size_t step = read_;
    d_.context_->check(driver().cuEventSynchronize(d_.arrived_[line(step)].get()), "cuEventSynchronize",
                       [&] { return "waiting for step " + std::to_string(step); });
    const int32_t* arrived = arrival(step);
    std::copy(arrived, arrived + batch_, tokens_.begin());
    const auto now = Clock::now();
    d_.kv_.wrote(use(step), d_.finished_);
    for (size_t slot = 0; slot < batch_; ++slot) {
      if (d_.finished_[slot] || tokens_[slot] >= 0) continue;
      const auto at = static_cast<int64_t>(step);
      throw tokens_[slot] == kNoDistribution ? no_distribution(static_cast<int64_t>(slot), at)
                                             : not_finite(static_cast<int64_t>(slot), at);
    }
    d_.kv_.advance(d_.finished_);
    for (size_t slot = 0; slot < batch_; ++slot)
      if (is_eos(tokens_[slot])) d_.finished_[slot] = true;
    d_.log(tokens_, std::chrono::duration<double>(now - last_).count());
    last_ = now;
    ++read_;
  }

  void read_all() {
    while (read_ < enqueued_ && !over()) read_next();
  }

  // After an error: reads what still arrives, and leaves nothing of ours on the stream. The first error
  // counts.
  void leave() noexcept {
    try {
      read_all();
    } catch (...) {
    }
    try {
      synchronize();
    } catch (...) {
    }
  }

  void synchronize() {
    d_.context_->check(driver().cuStreamSynchronize(d_.stream_), "cuStreamSynchronize",
                       "waiting for the end of the generation");
  }

  bool is_eos(int32_t token) const {
    return std::find(spec_.eos_tokens.begin(), spec_.eos_tokens.end(), token) != spec_.eos_tokens.end();
  }
  int32_t* arrival(size_t step) const {
    return static_cast<int32_t*>(d_.pinned_.get()) + line(step) * batch_;
  }

  using Clock = std::chrono::steady_clock;
  Dispatcher& d_;
  const RunSpec& spec_;
  const size_t total_, batch_;
  KvState expected_;
  const std::vector<bool> none_finished_;
  std::vector<int32_t> tokens_;
  size_t enqueued_ = 0, read_ = 0;
  Clock::time_point last_ = Clock::now();
};

Dispatcher::Dispatcher(std::shared_ptr<Context> context, StreamHandle stream, TensorView pos,
                       TensorView filled, DevicePointer ring, int64_t ring_rows, int ahead)
    : Loop(pos, filled),
      context_(std::move(context)),
      stream_(stream),
      ring_(ring),
      ring_rows_(ring_rows),
      ahead_(static_cast<size_t>(std::max(ahead, 0))) {
  if (ahead < 1)
    throw InvalidArgument("dispatcher: ahead is " + std::to_string(ahead) + "; it must be at least 1");
  if (ring == 0) throw InvalidArgument("dispatcher: the ring's address is null");
  if (ring_rows <= ahead)
    throw InvalidArgument("dispatcher: a ring of " + std::to_string(ring_rows) + " lines for " +
                          std::to_string(ahead) + " steps ahead; it needs at least one line more");
  expected_pos_.resize(static_cast<size_t>(pos.numel()));
  expected_filled_.resize(static_cast<size_t>(filled.numel()));

  const Context::Current current(*context_);
  const Driver& driver = context_->driver();
  const char* doing = "making the dispatcher's ring";
  void* memory = nullptr;
  const size_t bytes = ahead_ * static_cast<size_t>(batch()) * sizeof(int32_t);
  context_->check(driver.cuMemHostAlloc(&memory, bytes, 0), "cuMemHostAlloc", doing);
  pinned_ = PinnedMemory(context_, memory);
  arrived_.reserve(ahead_);
  for (size_t i = 0; i < ahead_; ++i) {
    EventHandle event = nullptr;
    context_->check(driver.cuEventCreate(&event, kEventDisableTiming), "cuEventCreate", doing);
    arrived_.emplace_back(context_, event);
  }
}

int Dispatcher::add(std::shared_ptr<Step> step, std::vector<int> reads, std::vector<int> fills) {
  const Turn turn = idle_turn("add a program");
  if (!step || step->context() != context_)
    throw InvalidArgument("dispatcher: a step of another context than the dispatcher");
  const int number = add_program({std::move(reads), std::move(fills)});
  steps_.push_back(std::move(step));
  return number;
}

void Dispatcher::start(RunSpec spec) {
  const Turn turn = idle_turn("start");
  program(spec.first);
  for (int number : spec.programs) program(number);
  const size_t steps = spec.programs.size() + 1;
  Loop::run(steps, [this, spec = std::move(spec)] { Generation(*this, spec).run(); });
}

void Dispatcher::step(int number) {
  const Turn turn = idle_turn("step");
  const LayerUse& use = program(number);
  kv_.check_holes(use);
  const Context::Current current(*context_);
  try {
    steps_[static_cast<size_t>(number)]->enqueue(stream_);
  } catch (...) {  // some of its launches may be on the stream
    context_->driver().cuStreamSynchronize(stream_);
    throw;
  }
  context_->check(context_->driver().cuStreamSynchronize(stream_), "cuStreamSynchronize",
                  "waiting for a step");
  kv_.wrote(use, finished_);
}

void Dispatcher::commit(const std::vector<bool>& finished) {
  const Turn turn = idle_turn("commit");
  if (finished.size() != static_cast<size_t>(batch()))
    throw InvalidArgument("dispatcher: commit takes one flag for each of the " + std::to_string(batch()) +
                          " slots");
  kv_.advance(finished_);
  finished_ = finished;
}

}  // namespace d3rt::cuda
