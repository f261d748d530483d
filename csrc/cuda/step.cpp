#include "cuda/step.h"

namespace d3rt::cuda {

std::shared_ptr<Step> Step::graph(const Tape& tape, StreamHandle stream) {
  if (tape.size() == 0) throw InvalidArgument("a graph of no launches: the tape is empty");
  const std::shared_ptr<Context>& context = tape.context();
  const Driver& driver = context->driver();
  const auto building = [&] { return "building the graph of " + std::to_string(tape.size()) + " launches"; };
  const auto instantiating = [&] {
    return "instantiating the graph of " + std::to_string(tape.size()) + " launches";
  };
  std::shared_ptr<Step> step(new Step(context, "graph", tape.ops()));
  step->tape_ = std::make_unique<Tape>(tape);
  const Context::Current current(*context);

  GraphHandle made = nullptr;
  context->check(driver.cuGraphCreate(&made, 0), "cuGraphCreate", building);
  const Graph graph(context, made);
  NodeHandle last = nullptr;
  for (const auto& each : tape.launches()) {
    const Launch& launch = *each;
    const Kernel& kernel = *launch.kernel;
    KernelNodeParams node{};
    node.function = kernel.function();
    node.grid_x = launch.grid[0], node.grid_y = launch.grid[1], node.grid_z = launch.grid[2];
    node.block_x = kernel.threads(), node.block_y = 1, node.block_z = 1;
    node.shared_bytes = kernel.shared();
    node.parameters = const_cast<void**>(launch.addresses.data());
    NodeHandle added = nullptr;
    context->check(driver.cuGraphAddKernelNode(&added, made, last ? &last : nullptr, last ? 1 : 0, &node),
                   "cuGraphAddKernelNode", [&] {
                     return "adding " + launch.op + " (kernel '" + kernel.name() + "') to the graph of " +
                            std::to_string(tape.size()) + " launches";
                   });
    last = added;
  }

  size_t before = 0, after = 0, total = 0;
  context->check(driver.cuMemGetInfo(&before, &total), "cuMemGetInfo", instantiating);
  ExecHandle exec = nullptr;
  context->check(driver.cuGraphInstantiateWithFlags(&exec, made, 0), "cuGraphInstantiateWithFlags",
                 instantiating);
  step->owned_ = Exec(context, exec);
  step->exec_ = exec;
  context->check(driver.cuGraphUpload(exec, stream), "cuGraphUpload", instantiating);
  context->check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize", instantiating);
  context->check(driver.cuMemGetInfo(&after, &total), "cuMemGetInfo", instantiating);
  step->bytes_ = before > after ? before - after : 0;
  return step;
}

std::shared_ptr<Step> Step::captured(std::shared_ptr<Context> context, ExecHandle exec,
                                     std::vector<std::string> ops) {
  if (!exec) throw InvalidArgument("a captured graph needs the handle of its CUgraphExec; it is null");
  std::shared_ptr<Step> step(new Step(std::move(context), "captured", std::move(ops)));
  step->exec_ = exec;
  return step;
}

std::shared_ptr<Step> Step::eager(const Tape& tape) {
  std::shared_ptr<Step> step(new Step(tape.context(), "eager", tape.ops()));
  step->tape_ = std::make_unique<Tape>(tape);
  return step;
}

void Step::launch(StreamHandle stream) const {
  const Context::Current current(*context_);
  enqueue(stream);
}

void Step::enqueue(StreamHandle stream) const {
  if (!exec_) return tape_->enqueue(stream);
  context_->check(context_->driver().cuGraphLaunch(exec_, stream), "cuGraphLaunch",
                  [&] { return "launching a " + mode_ + " of " + std::to_string(nodes()) + " launches"; });
}

}  // namespace d3rt::cuda
