#include "tape.h"

#include <condition_variable>
#include <exception>
#include <mutex>

#include "openmp.h"

namespace d3rt {

Tape::Tape(std::shared_ptr<ThreadPool> pool, std::shared_ptr<Arena> arena, const cpu::Kernels& kernels)
    : pool_(std::move(pool)),
      arena_(std::move(arena)),
      kernels_(kernels),
      left_(new cpu::Left[static_cast<size_t>(pool_->size())]) {}

void Tape::append(Node node) {
  arena_->reserve_scratch(node.scratch_floats);
  if (node.shared_things > num_made_) {
    made_.reset(new cpu::Made[static_cast<size_t>(node.shared_things)]);
    num_made_ = node.shared_things;
  }
  nodes_.push_back(std::move(node));
}

void Tape::replay() {
  for (const Node& node : nodes_)
    if (node.guard) node.guard();
  pool_->run(
      [](void* context, int thread, int num_threads) {
        Tape& tape = *static_cast<Tape*>(context);
        float* scratch = tape.arena_->scratch();
        const cpu::Worker me = {thread, num_threads, num_threads > 1 ? tape.left_.get() : nullptr,
                                tape.made_.get()};
        const size_t count = tape.nodes_.size();
        for (size_t i = 0; i < count; ++i) {
          const Node& node = tape.nodes_[i];
          for (int phase = 0; phase < node.phases; ++phase) {
            if (i > 0 || phase > 0) tape.pool_->barrier(thread);
            node.run(scratch, phase, me);
          }
          if (i + 1 < count && tape.nodes_[i + 1].warms) tape.nodes_[i + 1].run(scratch, cpu::kWarm, me);
        }
      },
      this);
}

void Tape::replay_after_torch() {
  struct Run {
    Tape& tape;
    std::mutex mutex;
    std::condition_variable over;
    bool is_over = false;
    std::exception_ptr error;
  } run{*this, {}, {}, false, nullptr};
  const bool done = run_on_openmp(
      [](void* context, int thread, int) {
        Run& run = *static_cast<Run*>(context);
        if (thread != 0) {
          std::unique_lock<std::mutex> lock(run.mutex);
          run.over.wait(lock, [&] { return run.is_over; });
          return;
        }
        try {
          run.tape.replay();
        } catch (...) {  // none may leave the parallel region
          run.error = std::current_exception();
        }
        std::lock_guard<std::mutex> lock(run.mutex);
        run.is_over = true;
        run.over.notify_all();
      },
      &run, 0);
  if (!done) return replay();
  if (run.error) std::rethrow_exception(run.error);
}

void Tape::replay_beside_torch() {
  for (const Node& node : nodes_)
    if (node.guard) node.guard();
  struct Part {
    const Node& node;
    float* scratch;
    cpu::Made* made;
    int phase;
  };
  for (const Node& node : nodes_)
    for (int phase = 0; phase < node.phases; ++phase) {
      Part part{node, arena_->scratch(), made_.get(), phase};
      const bool done = run_on_openmp(
          [](void* context, int thread, int num_threads) {
            const Part& part = *static_cast<const Part*>(context);
            part.node.run(part.scratch, part.phase, {thread, num_threads, nullptr, part.made});
          },
          &part, pool_->size());
      if (!done) return replay();  // which none of it has been yet: the first attempt already says no
    }
}

}  // namespace d3rt
