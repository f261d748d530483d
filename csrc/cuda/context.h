// Context: the primary context of a device, the one that torch uses too, so that addresses and streams are
// shared. It knows whether it is still good for anything: after some errors (an illegal address in a kernel)
// the driver answers every call with the same error until the process ends.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

#include "cuda/driver.h"

namespace d3rt::cuda {

class Context {
 public:
  // Retains the primary context of device `ordinal`; it is released with this object. Throws
  // DriverUnavailable when there is no such device.
  Context(std::shared_ptr<Driver> driver, int ordinal);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Driver& driver() const { return *driver_; }
  const std::string& name() const { return name_; }
  int arch() const { return arch_; }  // 80 for sm_80
  int multiprocessors() const { return multiprocessors_; }
  int shared_bytes() const { return shared_bytes_; }  // the most that a block may have
  std::pair<size_t, size_t> memory() const;           // bytes free and in all
  void synchronize(StreamHandle stream) const;

  // As Driver::check, and remembers an error after which the context is broken.
  template <class Doing>
  void check(Result result, const char* call, const Doing& doing) const {
    if (result != kSuccess) fail(result, call, told(doing));
  }

  // Makes the context current on this thread while it lives. Throws CudaError when the context is broken,
  // Error in a forked child, where no context of the parent works.
  class Current {
   public:
    explicit Current(const Context& context);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const Context& context_;
  };

  // Runs `destroy(driver)` with the context current, where it still can: not in a forked child. What it
  // returns is dropped, as nothing can be done about it.
  template <class Destroy>
  void release(const Destroy& destroy) const {
    if (forked() || driver_->cuCtxPushCurrent(handle_) != kSuccess) return;
    destroy(*driver_);
    ContextHandle popped;
    driver_->cuCtxPopCurrent(&popped);
  }

 private:
  [[noreturn]] void fail(Result result, const char* call, const std::string& doing) const;
  bool forked() const;

  std::shared_ptr<Driver> driver_;
  Device device_ = 0;
  ContextHandle handle_ = nullptr;
  const int owner_pid_;
  std::string name_;
  int arch_ = 0, multiprocessors_ = 0, shared_bytes_ = 0;

  mutable std::atomic<Result> broken_{kSuccess};
  mutable std::mutex mutex_;
  mutable std::string breaking_;  // the first such error; guarded by mutex_
};

// A driver object that is destroyed with this one. DESTROY is the member of Driver that does it.
template <class Handle, Result (*Driver::*DESTROY)(Handle)>
class Owned {
 public:
  Owned() = default;
  Owned(std::shared_ptr<Context> context, Handle handle) : context_(std::move(context)), handle_(handle) {}
  Owned(Owned&& other) noexcept
      : context_(std::move(other.context_)), handle_(std::exchange(other.handle_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(context_, other.context_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_) context_->release([this](const Driver& driver) { (driver.*DESTROY)(handle_); });
  }
  Handle get() const { return handle_; }

 private:
  std::shared_ptr<Context> context_;
  Handle handle_ = nullptr;
};

using Module = Owned<ModuleHandle, &Driver::cuModuleUnload>;
using Graph = Owned<GraphHandle, &Driver::cuGraphDestroy>;
using Exec = Owned<ExecHandle, &Driver::cuGraphExecDestroy>;
using Event = Owned<EventHandle, &Driver::cuEventDestroy>;
using PinnedMemory = Owned<void*, &Driver::cuMemFreeHost>;

}  // namespace d3rt::cuda
