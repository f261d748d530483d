// A driver that fails: at every call in turn the error surfaces as a CudaError that names the call, nothing
// leaks, and what can go on goes on.
#include "fake_gpu.h"

namespace d3rt::cuda {
namespace {

// Everything there is, once: what the loop over all call sites goes through.
void use_everything() {
  Gpu gpu({0, 10}, 2);
  gpu.context->memory();
  const Kernel large(gpu.context, make_cubin("large", 2, 128), "large", 60000, 128);
  gpu.tape({5}).launch(nullptr);
  gpu.context->synchronize(nullptr);
  gpu.prefill({0, 10});
  const int eager = gpu.dispatcher->add(Step::eager(gpu.tape({7})), {0}, {});
  RunSpec spec = gpu.spec(5);
  spec.programs.back() = eager;
  gpu.dispatcher->start(spec);
  gpu.dispatcher->wait(kLong);
  gpu.dispatcher->begin();
  gpu.dispatcher->step(eager);
  gpu.dispatcher->commit({false, false});
}

// Calls that undo: by then there is nobody to tell.
bool undoes(const std::string& call) {
  for (const char* each :
       {"cuCtxPopCurrent", "cuModuleUnload", "cuGraphDestroy", "cuGraphExecDestroy", "cuEventDestroy",
        "cuMemFreeHost", "cuDevicePrimaryCtxRelease", "cuCtxPushCurrent"})
    if (call == each) return true;
  return false;
}

void fail_everywhere(int code) {
  const std::string number = "(" + std::to_string(code) + ")";
  std::vector<std::string> surfaced;
  for (int n = 1;; ++n) {
    const Fake fake;
    fakecuda_fail(("*:" + std::to_string(n) + ":" + std::to_string(code)).c_str());
    std::string what;
    try {
      use_everything();
    } catch (const CudaError& error) {
      what = error.what();
      CHECK_EQ(error.code, code);
    } catch (const DriverUnavailable& error) {
      what = error.what();
    }
    const std::string failed = fakecuda_failed();
    if (failed.empty()) {  // there are no more calls
      CHECK_EQ(what, "");
      CHECK(n > 100);
      break;
    }
    check::at("call " + std::to_string(n) + ", " + failed + ": " + what);
    // After a call that undoes, a broken context shows at the next one.
    const bool told = what.find(failed + ": ") != std::string::npos;
    CHECK(what.empty() ? undoes(failed) : what.find(number) != std::string::npos);
    CHECK(told || undoes(failed));
    if (told) surfaced.push_back(failed);
    CHECK_EQ(fakecuda_live("context"), 0);
    // What could not be made current again to be destroyed in is lost with its objects.
    if (failed == "cuCtxPushCurrent" && !told) fakecuda_forget();
  }
  for (const char* each : {"cuInit",
                           "cuDeviceGetCount",
                           "cuDeviceGet",
                           "cuDeviceGetName",
                           "cuDeviceGetAttribute",
                           "cuDevicePrimaryCtxRetain",
                           "cuCtxPushCurrent",
                           "cuMemGetInfo",
                           "cuModuleLoadData",
                           "cuModuleGetFunction",
                           "cuFuncSetAttribute",
                           "cuLaunchKernel",
                           "cuStreamSynchronize",
                           "cuGraphCreate",
                           "cuGraphAddKernelNode",
                           "cuGraphInstantiateWithFlags",
                           "cuGraphUpload",
                           "cuGraphLaunch",
                           "cuMemHostAlloc",
                           "cuEventCreate",
                           "cuMemcpyDtoHAsync",
                           "cuEventRecord",
                           "cuEventSynchronize"}) {
    check::at(each);
    CHECK(std::find(surfaced.begin(), surfaced.end(), each) != surfaced.end());
  }
}

TEST(cuda_failures, "an error of any call is told by name, and nothing leaks") { fail_everywhere(999); }

TEST(cuda_failures, "nor does anything leak when the context breaks at any call") { fail_everywhere(700); }

TEST(cuda_failures, "a failed generation says what failed, keeps the tokens before, and the next one works") {
  for (const std::string call :
       {"cuGraphLaunch", "cuMemcpyDtoHAsync", "cuEventRecord", "cuEventSynchronize"}) {
    const Fake fake;
    Gpu gpu({0}, 2);
    fakecuda_fail((call + ":4:2").c_str());
    gpu.dispatcher->start(gpu.spec(20));
    check::at(call);
    CHECK_THROWS(CudaError, call + ": CUDA_ERROR_OUT_OF_MEMORY (2)", gpu.dispatcher->wait(kLong));
    CHECK_THROWS(CudaError, call, gpu.dispatcher->wait(kLong));  // as often as it is asked
    bool ended = false;
    const Tokens tokens = gpu.all();
    CHECK_THROWS(CudaError, call, gpu.dispatcher->read(tokens.size(), kLong, &ended));
    CHECK(tokens == (Tokens{1, 2, 3}) || (call == "cuEventSynchronize" && tokens.size() >= 3));
    CHECK_EQ(fakecuda_pending(), 0);
    gpu.prefill({5});
    CHECK(gpu.run(gpu.spec(2)) == (Tokens{6, 7, 8}));
  }
}

TEST(cuda_failures, "a kernel's illegal address surfaces in wait, and every later call says so") {
  const Fake fake;
  Gpu gpu({0});
  fakecuda_fail("run:4:700");
  gpu.dispatcher->start(gpu.spec(20));
  CHECK_THROWS(CudaError, "cuEventSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (700), while waiting for step",
               gpu.dispatcher->wait(kLong));
  const std::string broken = "the CUDA context is broken until this process ends, since cuEventSynchronize";
  gpu.dispatcher->start(gpu.spec(1));
  CHECK_THROWS(CudaError, broken, gpu.dispatcher->wait(kLong));
  CHECK_THROWS(CudaError, broken, gpu.dispatcher->step(gpu.count));
  CHECK_THROWS(CudaError, broken, Step::graph(gpu.tape({1}), nullptr));
  CHECK_THROWS(CudaError, broken, gpu.context->synchronize(nullptr));
}

TEST(cuda_failures, "a driven step that fails can be tried again") {
  const Fake fake;
  Gpu gpu({0});
  gpu.dispatcher->begin();
  gpu.dispatcher->commit({false});
  fakecuda_fail("cuGraphLaunch:1:2");
  CHECK_THROWS(CudaError, "cuGraphLaunch", gpu.dispatcher->step(gpu.count));
  CHECK(gpu.host_filled == (Tokens{1, 1}));  // nothing was written
  gpu.dispatcher->step(gpu.count);
  CHECK(gpu.host_filled == (Tokens{2, 2}));
}

}  // namespace
}  // namespace d3rt::cuda
