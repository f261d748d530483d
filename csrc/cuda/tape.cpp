#include "cuda/tape.h"

namespace d3rt::cuda {
namespace {

constexpr size_t kMaxHidden = 2;  // parameters that Triton adds: 0 in 3.1, 1 in 3.4, 2 since 3.6
constexpr int64_t kMaxGrid[3] = {2147483647, 65535, 65535};

}  // namespace

void Tape::add(std::string op, std::shared_ptr<Kernel> kernel, std::array<int64_t, 3> grid,
               const std::vector<DevicePointer>& pointers) {
  const std::string which = op + ": kernel '" + kernel->name() + "'";
  if (kernel->context() != context_.get())
    throw InvalidArgument(which + " is of another context than the tape");
  auto launch = std::make_shared<Launch>();
  for (size_t i = 0; i < 3; ++i) {
    if (grid[i] < 1 || grid[i] > kMaxGrid[i])
      throw InvalidArgument(which + ": a grid of " + std::to_string(grid[i]) + " blocks in dimension " +
                            std::to_string(i) + "; it must be 1 to " + std::to_string(kMaxGrid[i]));
    launch->grid[i] = static_cast<unsigned>(grid[i]);
  }
  const std::vector<Parameter>& parameters = kernel->parameters();
  if (pointers.size() > parameters.size() || parameters.size() - pointers.size() > kMaxHidden)
    throw InvalidArgument(which + " has " + std::to_string(parameters.size()) +
                          " parameters, of which up to " + std::to_string(kMaxHidden) +
                          " are hidden; given are " + std::to_string(pointers.size()));
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (parameters[i].size != sizeof(DevicePointer))
      throw InvalidArgument(which + ": parameter " + std::to_string(i) + " has " +
                            std::to_string(parameters[i].size) + " bytes, so it is no pointer");
    if (i < pointers.size() && pointers[i] == 0)
      throw InvalidArgument(which + ": pointer " + std::to_string(i) + " is null");
    launch->arguments.push_back(i < pointers.size() ? pointers[i] : 0);
  }
  for (DevicePointer& argument : launch->arguments) launch->addresses.push_back(&argument);
  launch->op = std::move(op);
  launch->kernel = std::move(kernel);
  launches_.push_back(std::move(launch));
}

void Tape::launch(StreamHandle stream) const {
  const Context::Current current(*context_);
  enqueue(stream);
}

void Tape::enqueue(StreamHandle stream) const {
  const Driver& driver = context_->driver();
  for (const auto& node : launches_) {
    const Launch& launch = *node;
    const Kernel& kernel = *launch.kernel;
    context_->check(driver.cuLaunchKernel(kernel.function(), launch.grid[0], launch.grid[1], launch.grid[2],
                                          kernel.threads(), 1, 1, kernel.shared(), stream,
                                          const_cast<void**>(launch.addresses.data()), nullptr),
                    "cuLaunchKernel",
                    [&] { return "launching " + launch.op + " (kernel '" + kernel.name() + "')"; });
  }
}

std::vector<std::string> Tape::ops() const {
  std::vector<std::string> names;
  for (const auto& launch : launches_) names.push_back(launch->op);
  return names;
}

}  // namespace d3rt::cuda
