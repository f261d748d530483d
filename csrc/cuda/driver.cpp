#include "cuda/driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>

namespace d3rt::cuda {
namespace {

constexpr int kOldestVersion = 11040;  // cuGraphInstantiateWithFlags

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Looks calls up as the driver wants it: by name and the version of the signature that the caller has.
class Lookup {
 public:
  explicit Lookup(void* library)
      : library_(library),
        second_(reinterpret_cast<Second>(dlsym(library, "cuGetProcAddress_v2"))),
        first_(reinterpret_cast<First>(dlsym(library, "cuGetProcAddress"))) {}

  void* find(const char* name, const char* exported, int wanted, int driver_version) const {
    void* found = nullptr;
    int status = 0;
    const int version = std::min(wanted, driver_version);
    if (second_) return second_(name, &found, version, 0, &status) == kSuccess ? found : nullptr;
    if (first_) return first_(name, &found, version, 0) == kSuccess ? found : nullptr;
    return dlsym(library_, exported);
  }

 private:
  using Second = Result (*)(const char* name, void** found, int version, uint64_t flags, int* status);
  using First = Result (*)(const char* name, void** found, int version, uint64_t flags);
  void* library_;
  Second second_;  // from CUDA 12.0
  First first_;    // from CUDA 11.3
};

}  // namespace

Driver::Driver(const std::string& given) {
  const char* chosen = std::getenv("D3RT_LIBCUDA");
  const std::string path = !given.empty() ? given : chosen && *chosen ? chosen : "libcuda.so.1";
  // Never closed: a driver has threads of its own.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw DriverUnavailable(std::string("no CUDA driver: ") + dlerror());

  const auto get_version =
      reinterpret_cast<decltype(cuDriverGetVersion)>(dlsym(library, "cuDriverGetVersion"));
  if (!get_version) throw DriverUnavailable(path + " is no CUDA driver: it has no cuDriverGetVersion");
  const Result got = get_version(&version_);
  if (got != kSuccess)
    throw DriverUnavailable("the CUDA driver does not tell its version: cuDriverGetVersion: CUresult (" +
                            std::to_string(got) + ")");
  if (version_ < kOldestVersion)
    throw DriverUnavailable("the CUDA driver is of version " + version_text(version_) + ", and d3rt needs " +
                            version_text(kOldestVersion) + " or later; update the driver");

  const Lookup lookup(library);
#define D3RT_CUDA_FIND(name, symbol, wanted, arguments)                                          \
  name = reinterpret_cast<decltype(name)>(lookup.find(#name, symbol, wanted, version_));         \
  if (!name)                                                                                     \
    throw DriverUnavailable("the CUDA driver (version " + version_text(version_) + ", " + path + \
                            ") has no " #name "; update the driver");
  D3RT_CUDA_CALLS(D3RT_CUDA_FIND)
#undef D3RT_CUDA_FIND

  const Result ready = cuInit(0);
  if (ready == kNoDevice) throw DriverUnavailable("no CUDA device found (cuInit: CUDA_ERROR_NO_DEVICE)");
  if (ready != kSuccess)
    throw DriverUnavailable("the CUDA driver does not start: " + describe(ready, "cuInit", ""));
}

int Driver::devices() const {
  int count = 0;
  check(cuDeviceGetCount(&count), "cuDeviceGetCount", "counting the devices");
  return count;
}

std::string Driver::error_name(Result result) const {
  const char* name = nullptr;
  return cuGetErrorName(result, &name) == kSuccess && name ? name : "unknown CUresult";
}

std::string Driver::describe(Result result, const char* call, const std::string& doing) const {
  return std::string(call) + ": " + error_name(result) + " (" + std::to_string(result) + ")" +
         (doing.empty() ? "" : ", while " + doing);
}

}  // namespace d3rt::cuda
