#include "cuda/kernel.h"

namespace d3rt::cuda {
namespace {

constexpr int kSharedWithoutAsking = 48 * 1024;  // a block may have more only when the kernel is told so
constexpr int kMaxThreads = 1024;

}  // namespace

Kernel::Kernel(std::shared_ptr<Context> context, const std::string& cubin, std::string name, int shared,
               int threads)
    : context_(std::move(context)),
      name_(std::move(name)),
      shared_(shared),
      threads_(threads),
      info_(read_kernel_info(cubin, name_)) {
  const std::string which = "kernel '" + name_ + "'";
  if (threads < 1 || threads > kMaxThreads)
    throw InvalidArgument(which + ": a block of " + std::to_string(threads) + " threads; it must be 1 to " +
                          std::to_string(kMaxThreads));
  if (info_.required_threads != 0 && info_.required_threads != threads)
    throw InvalidArgument(which + ": a block of " + std::to_string(threads) +
                          " threads, but it was compiled for " + std::to_string(info_.required_threads));
  if (shared < 0 || shared > context_->shared_bytes())
    throw InvalidArgument(which + ": " + std::to_string(shared) + " bytes of shared memory for a block; sm_" +
                          std::to_string(context_->arch()) + " has " +
                          std::to_string(context_->shared_bytes()));

  const Context::Current current(*context_);
  const Driver& driver = context_->driver();
  const auto loading = [&] { return "loading " + which; };
  ModuleHandle module = nullptr;
  context_->check(driver.cuModuleLoadData(&module, cubin.data()), "cuModuleLoadData", loading);
  module_ = Module(context_, module);
  context_->check(driver.cuModuleGetFunction(&function_, module, name_.c_str()), "cuModuleGetFunction",
                  loading);
  if (shared > kSharedWithoutAsking)
    context_->check(
        driver.cuFuncSetAttribute(function_, kMaxDynamicSharedSizeBytes, shared), "cuFuncSetAttribute",
        [&] { return "allowing " + which + " " + std::to_string(shared) + " bytes of shared memory"; });
}

}  // namespace d3rt::cuda
