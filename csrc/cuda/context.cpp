#include "cuda/context.h"

#include <unistd.h>

#include <algorithm>
#include <iterator>

namespace d3rt::cuda {
namespace {

// "This leaves the process in an inconsistent state and any further CUDA work will return the same error",
// as cuda.h says of each of these; the first and the last two are of a context that is gone.
constexpr Result kBreaking[] = {kDeinitialized,
                                214,  // ECC_UNCORRECTABLE
                                226,  // CONTAINED
                                700,  // ILLEGAL_ADDRESS
                                702,  // LAUNCH_TIMEOUT
                                710,  // ASSERT
                                714,
                                715,
                                716,
                                717,
                                718,  // HARDWARE_STACK_ERROR .. INVALID_PC
                                719,  // LAUNCH_FAILED
                                721,  // TENSOR_MEMORY_LEAK
                                810,  // MPS_CLIENT_TERMINATED
                                911,  // EXTERNAL_DEVICE
                                kContextIsDestroyed};

}  // namespace

Context::Context(std::shared_ptr<Driver> driver, int ordinal)
    : driver_(std::move(driver)), owner_pid_(getpid()) {
  const std::string which = "opening device " + std::to_string(ordinal);
  const int count = driver_->devices();
  if (ordinal < 0 || ordinal >= count)
    throw DriverUnavailable(count == 0 ? "no CUDA device found"
                                       : "no CUDA device " + std::to_string(ordinal) + ": there are " +
                                             std::to_string(count) + ", numbered from 0");
  driver_->check(driver_->cuDeviceGet(&device_, ordinal), "cuDeviceGet", which);
  char name[256] = {};
  driver_->check(driver_->cuDeviceGetName(name, sizeof name - 1, device_), "cuDeviceGetName", which);
  name_ = name;
  const auto attribute = [&](int number) {
    int value = 0;
    driver_->check(driver_->cuDeviceGetAttribute(&value, number, device_), "cuDeviceGetAttribute", which);
    return value;
  };
  arch_ = 10 * attribute(kComputeCapabilityMajor) + attribute(kComputeCapabilityMinor);
  multiprocessors_ = attribute(kMultiprocessorCount);
  shared_bytes_ = attribute(kMaxSharedMemoryPerBlockOptin);
  driver_->check(driver_->cuDevicePrimaryCtxRetain(&handle_, device_), "cuDevicePrimaryCtxRetain", which);
}

Context::~Context() {
  if (!forked()) driver_->cuDevicePrimaryCtxRelease(device_);
}

bool Context::forked() const { return getpid() != owner_pid_; }

void Context::fail(Result result, const char* call, const std::string& doing) const {
  const std::string text = driver_->describe(result, call, doing);
  if (std::find(std::begin(kBreaking), std::end(kBreaking), result) != std::end(kBreaking)) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (breaking_.empty()) breaking_ = text;
    broken_.store(result);
  }
  throw CudaError(result, text);
}

Context::Current::Current(const Context& context) : context_(context) {
  if (context.forked())
    throw Error(
        "a CUDA context of the parent process does not work in a forked child; start processes with "
        "'spawn' and open the device there");
  if (const Result broken = context.broken_.load()) {
    std::lock_guard<std::mutex> lock(context.mutex_);
    throw CudaError(broken, "the CUDA context is broken until this process ends, since " + context.breaking_);
  }
  context.check(context.driver_->cuCtxPushCurrent(context.handle_), "cuCtxPushCurrent",
                "making the context current");
}

Context::Current::~Current() {
  ContextHandle popped;
  context_.driver_->cuCtxPopCurrent(&popped);
}

std::pair<size_t, size_t> Context::memory() const {
  const Current current(*this);
  size_t free = 0, total = 0;
  check(driver_->cuMemGetInfo(&free, &total), "cuMemGetInfo", "asking for the free memory");
  return {free, total};
}

void Context::synchronize(StreamHandle stream) const {
  const Current current(*this);
  check(driver_->cuStreamSynchronize(stream), "cuStreamSynchronize", "waiting for the stream");
}

}  // namespace d3rt::cuda
