// Tape: the kernel launches of one decode step, in order, each with its arguments. The addresses in it are
// static buffers of the caller's, who keeps them alive.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "cuda/kernel.h"

namespace d3rt::cuda {

struct Launch {
  Launch() = default;
  Launch(const Launch&) = delete;  // `addresses` point into it
  Launch& operator=(const Launch&) = delete;

  std::string op;
  std::shared_ptr<Kernel> kernel;
  std::array<unsigned, 3> grid;
  std::vector<DevicePointer> arguments;  // one for each parameter, hidden ones too
  std::vector<void*> addresses;          // of the arguments, as the driver wants them
};

class Tape {
 public:
  explicit Tape(std::shared_ptr<Context> context) : context_(std::move(context)) {}

  // pointers: device addresses, the kernel's parameters in order. Those that Triton adds behind them get
  // null. Throws InvalidArgument for what the kernel or the device cannot take.
  void add(std::string op, std::shared_ptr<Kernel> kernel, std::array<int64_t, 3> grid,
           const std::vector<DevicePointer>& pointers);

  // Launches every kernel on the stream, one by one, and does not wait for them.
  void launch(StreamHandle stream) const;
  // The same where the context is current already.
  void enqueue(StreamHandle stream) const;

  size_t size() const { return launches_.size(); }
  const std::vector<std::shared_ptr<const Launch>>& launches() const { return launches_; }
  std::vector<std::string> ops() const;
  const std::shared_ptr<Context>& context() const { return context_; }

 private:
  std::shared_ptr<Context> context_;
  std::vector<std::shared_ptr<const Launch>> launches_;  // copies of a tape share them
};

}  // namespace d3rt::cuda
