// Kernel: a compiled kernel on a device, and what it takes to launch it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda/context.h"
#include "cuda/cubin.h"

namespace d3rt::cuda {

class Kernel {
 public:
  // cubin: the whole image. name: of the kernel in it. shared: bytes of shared memory of a block, to be given
  // at launch. threads: of a block. Throws InvalidArgument for what does not fit together or the device.
  Kernel(std::shared_ptr<Context> context, const std::string& cubin, std::string name, int shared,
         int threads);

  const std::string& name() const { return name_; }
  const std::vector<Parameter>& parameters() const { return info_.parameters; }
  unsigned shared() const { return static_cast<unsigned>(shared_); }
  unsigned threads() const { return static_cast<unsigned>(threads_); }
  FunctionHandle function() const { return function_; }
  const Context* context() const { return context_.get(); }

 private:
  std::shared_ptr<Context> context_;
  std::string name_;
  int shared_, threads_;
  KernelInfo info_;
  Module module_;
  FunctionHandle function_ = nullptr;
};

}  // namespace d3rt::cuda
