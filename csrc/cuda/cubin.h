// What a compiled kernel says of itself: the parameters it takes and the block it must be started with, read
// from the section .nv.info.<kernel> of its cubin (an ELF file). The layout of a launch's arguments is taken
// from here, as Triton adds hidden parameters that differ between its versions. cuFuncGetParamInfo would
// tell the same, from CUDA 12.4 on.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace d3rt::cuda {

struct Parameter {
  int offset, size;  // bytes
};

struct KernelInfo {
  std::vector<Parameter> parameters;  // in order; they do not overlap
  int required_threads = 0;           // of a block; 0: any number
};

// Throws InvalidArgument when image is no cubin, is damaged, or has no kernel of this name.
KernelInfo read_kernel_info(const std::string& image, const std::string& kernel);

}  // namespace d3rt::cuda
