// Driver and Context: what is found, what is refused, and that nothing is kept.
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include "fake_gpu.h"

namespace d3rt::cuda {
namespace {

TEST(cuda_driver, "finds every call, whichever way the driver lets them be looked up") {
  const Fake fake;
  for (const char* path : {FAKE_CUDA, FAKE_CUDA_FIRST_LOOKUP, FAKE_CUDA_NO_LOOKUP}) {
    const auto driver = std::make_shared<Driver>(path);
    CHECK_EQ(driver->version(), 12040);
    CHECK_EQ(driver->devices(), 1);
    const Context context(driver, 0);
    CHECK_EQ(context.memory().second, size_t{1} << 30);
  }
}

TEST(cuda_driver, "takes the path from the environment when none is given") {
  const Fake fake;
  setenv("D3RT_LIBCUDA", FAKE_CUDA, 1);
  CHECK_EQ(Driver().version(), 12040);
  setenv("D3RT_LIBCUDA", "/nowhere/libcuda.so.1", 1);
  CHECK_THROWS(DriverUnavailable, "no CUDA driver: /nowhere/libcuda.so.1: cannot open", Driver());
  CHECK_EQ(Driver(FAKE_CUDA).version(), 12040);
  unsetenv("D3RT_LIBCUDA");
  CHECK_THROWS(DriverUnavailable, "no CUDA driver: libcuda.so.1: cannot open", Driver());
}

TEST(cuda_driver, "asks no call of a version later than the driver's") {
  const Fake fake;  // which notes such a question as a fault
  for (int version : {11040, 11080, 12000, 13000}) {
    fakecuda_set("version", version);
    CHECK_EQ(Driver(FAKE_CUDA).version(), version);
  }
}

TEST(cuda_driver, "refuses a driver before 11.4, and says which it needs") {
  const Fake fake;
  fakecuda_set("version", 11020);
  CHECK_THROWS(DriverUnavailable, "version 11.2, and d3rt needs 11.4 or later; update the driver",
               Driver(FAKE_CUDA));
  fakecuda_set("version", 11030);
  CHECK_THROWS(DriverUnavailable, "version 11.3, and", Driver(FAKE_CUDA));
}

TEST(cuda_driver, "refuses a library that is no driver, or lacks a call") {
  CHECK_THROWS(DriverUnavailable, "libc.so.6 is no CUDA driver: it has no cuDriverGetVersion",
               Driver("libc.so.6"));
  const Fake fake;
  fakecuda_hide("cuGraphUpload");
  CHECK_THROWS(DriverUnavailable, "has no cuGraphUpload; update the driver", Driver(FAKE_CUDA));
}

TEST(cuda_driver, "says that there is no device") {
  const Fake fake;
  fakecuda_set("devices", 0);
  CHECK_THROWS(DriverUnavailable, "no CUDA device found (cuInit: CUDA_ERROR_NO_DEVICE)", Driver(FAKE_CUDA));
}

TEST(cuda_driver, "says which devices there are when asked for another") {
  const Fake fake;
  const auto driver = std::make_shared<Driver>(FAKE_CUDA);
  CHECK_THROWS(DriverUnavailable, "no CUDA device 1: there are 1, numbered from 0", Context(driver, 1));
  CHECK_THROWS(DriverUnavailable, "no CUDA device -1", Context(driver, -1));
}

TEST(cuda_driver, "an error of cuInit is told by name") {
  const Fake fake;
  fakecuda_fail("cuInit:1:999");
  CHECK_THROWS(DriverUnavailable, "does not start: cuInit: CUDA_ERROR_UNKNOWN (999)", Driver(FAKE_CUDA));
}

TEST(cuda_context, "knows its device") {
  const Fake fake;
  fakecuda_set("arch", 86);
  fakecuda_set("memory", 1000000);
  const Context context(std::make_shared<Driver>(FAKE_CUDA), 0);
  CHECK_EQ(context.name(), "Fake GPU");
  CHECK_EQ(context.arch(), 86);
  CHECK_EQ(context.multiprocessors(), 108);
  CHECK_EQ(context.shared_bytes(), 101376);
  CHECK(context.memory() == std::make_pair(size_t{1000000}, size_t{1000000}));
}

TEST(cuda_context, "is released with its last user") {
  const Fake fake;
  auto context = std::make_shared<Context>(std::make_shared<Driver>(FAKE_CUDA), 0);
  auto tape = std::make_unique<Tape>(context);
  context.reset();
  CHECK_EQ(fakecuda_live("context"), 1);
  tape.reset();
  CHECK_EQ(fakecuda_live("context"), 0);
}

TEST(cuda_context, "an error names the call, the result and what was being done") {
  const Fake fake;
  const Context context(std::make_shared<Driver>(FAKE_CUDA), 0);
  fakecuda_fail("cuMemGetInfo:1:2");
  CHECK_THROWS(CudaError, "cuMemGetInfo: CUDA_ERROR_OUT_OF_MEMORY (2), while asking for the free memory",
               context.memory());
  CHECK(context.memory().first > 0);  // and then goes on
  fakecuda_fail("cuMemGetInfo:1:12345");
  CHECK_THROWS(CudaError, "cuMemGetInfo: unknown CUresult (12345)", context.memory());
}

TEST(cuda_context, "is broken after an illegal address, and says so from then on") {
  const Fake fake;
  const Context context(std::make_shared<Driver>(FAKE_CUDA), 0);
  fakecuda_fail("cuStreamSynchronize:1:700");
  CHECK_THROWS(CudaError, "cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (700)",
               context.synchronize(nullptr));
  const long long calls = fakecuda_count("*");
  CHECK_THROWS(CudaError,
               "the CUDA context is broken until this process ends, since cuStreamSynchronize: "
               "CUDA_ERROR_ILLEGAL_ADDRESS (700)",
               context.memory());
  CHECK_EQ(fakecuda_count("*"), calls);  // the driver is not asked again
}

// What a forked child does with its parent's objects; its exit code says what went wrong.
int in_child(Gpu& gpu) {
  const long long calls = fakecuda_count("*");
  try {
    gpu.context->memory();
    return 1;
  } catch (const CudaError&) {
    return 2;
  } catch (const Error& error) {
    if (!std::strstr(error.what(), "forked child")) return 3;
  }
  gpu.dispatcher.reset();
  gpu.work.reset();
  gpu.next.reset();
  gpu.context.reset();
  return fakecuda_count("*") == calls ? 0 : 4;
}

TEST(cuda_context, "is not touched by a forked child, which may drop its copies") {
  const Fake fake;
  Gpu gpu({0});
  gpu.dispatcher->start(gpu.spec(3));
  CHECK(gpu.dispatcher->wait(kLong));
  const pid_t child = fork();
  // Not _exit: ThreadSanitizer would miss the parent's thread there, which the child cannot join.
  if (child == 0) syscall(SYS_exit_group, in_child(gpu));
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  CHECK_EQ(WEXITSTATUS(status), 0);
  CHECK(gpu.context->memory().first > 0);  // the parent's still works
}

}  // namespace
}  // namespace d3rt::cuda
