// Tape: the ops of one decode step, recorded once on static buffers and replayed without Python.
#pragma once

#include <memory>
#include <vector>

#include "ops.h"
#include "threads.h"

namespace d3rt {

class Tape {
 public:
  Tape(std::shared_ptr<ThreadPool> pool, std::shared_ptr<Arena> arena, const cpu::Kernels& kernels);

  template <class Op>
  void record(const Op& op) {
    append(bind(op, *arena_, kernels_, pool_->size()));
  }
  // Runs every op in order on all threads of the pool. Throws InvalidArgument if token or pos is out of
  // range.
  void replay();
  // The same for a caller who has just used torch: its OpenMP threads, which would spin on the cores for
  // milliseconds, sleep meanwhile.
  void replay_after_torch();
  // The same as replay() on torch's OpenMP threads, if this process has some (openmp.h); for tapes whose
  // scratch does not depend on the number of threads.
  void replay_beside_torch();

  size_t size() const { return nodes_.size(); }
  const Node& node(size_t index) const { return nodes_.at(index); }

 private:
  void append(Node node);

  std::shared_ptr<ThreadPool> pool_;
  std::shared_ptr<Arena> arena_;
  const cpu::Kernels& kernels_;
  std::vector<Node> nodes_;
  std::unique_ptr<cpu::Left[]> left_;  // one for each thread
  std::unique_ptr<cpu::Made[]> made_;  // as many as the op that shares most
  int64_t num_made_ = 0;
};

}  // namespace d3rt
