// Driver: libcuda, found at run time. Only the driver API is used, by dlopen, so that one build runs with any
// driver and loads on a machine that has none.
#pragma once

#include <string>
#include <type_traits>

#include "cuda/api.h"
#include "errors.h"

namespace d3rt::cuda {

// An argument given as "what was being done" where making that text would cost something on every call.
template <class Doing>
std::string told(const Doing& doing) {
  if constexpr (std::is_invocable_v<const Doing&>)
    return doing();
  else
    return doing;
}

class Driver {
 public:
  // path: of libcuda; "" takes $D3RT_LIBCUDA, or libcuda.so.1. Throws DriverUnavailable.
  explicit Driver(const std::string& path = "");

  int version() const { return version_; }  // 12040 for CUDA 12.4
  int devices() const;

  // Throws CudaError unless result is success: "cuInit: CUDA_ERROR_UNKNOWN (999), while ...".
  template <class Doing>
  void check(Result result, const char* call, const Doing& doing) const {
    if (result != kSuccess) throw CudaError(result, describe(result, call, told(doing)));
  }
  std::string describe(Result result, const char* call, const std::string& doing) const;
  std::string error_name(Result result) const;

#define D3RT_CUDA_MEMBER(name, symbol, version, arguments) Result(*name) arguments = nullptr;
  D3RT_CUDA_CALLS(D3RT_CUDA_MEMBER)
#undef D3RT_CUDA_MEMBER

 private:
  int version_ = 0;
};

}  // namespace d3rt::cuda
