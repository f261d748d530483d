// Kernel, Tape and Step: what is asked of the driver for a launch and for a graph.
#include "fake_gpu.h"

namespace d3rt::cuda {
namespace {

using Lines = std::vector<std::string>;

std::shared_ptr<Context> open() { return std::make_shared<Context>(std::make_shared<Driver>(FAKE_CUDA), 0); }

std::shared_ptr<Kernel> kernel(const std::shared_ptr<Context>& context, const std::string& name,
                               uint32_t pointers, int threads = 128, int shared = 0) {
  return std::make_shared<Kernel>(context, make_cubin(name, pointers, static_cast<uint32_t>(threads)), name,
                                  shared, threads);
}

constexpr DevicePointer kA = 0x1122334455667788, kB = 0x0102030405060708;
const std::string kHexA = "8877665544332211", kHexB = "0807060504030201", kNull = "0000000000000000";

TEST(cuda_kernel, "takes its parameters from the cubin") {
  const Fake fake;
  const auto made = kernel(open(), "k", 3);
  CHECK_EQ(made->parameters().size(), size_t{3});
  CHECK_EQ(made->parameters()[2].offset, 16);
  CHECK(Fake::log("cuFuncSetAttribute").empty());
}

TEST(cuda_kernel, "asks for shared memory beyond 48 KiB, and only then") {
  const Fake fake;
  const auto context = open();
  kernel(context, "k", 1, 128, 49152);
  CHECK(Fake::log("cuFuncSetAttribute").empty());
  kernel(context, "k", 1, 128, 49153);
  CHECK(Fake::log("cuFuncSetAttribute") == Lines{"cuFuncSetAttribute 8 49153"});
}

TEST(cuda_kernel, "refuses what does not fit the cubin or the device") {
  const Fake fake;
  const auto context = open();
  const std::string cubin = make_cubin("k", 2, 128);
  CHECK_THROWS(InvalidArgument, "kernel 'k': a block of 64 threads, but it was compiled for 128",
               Kernel(context, cubin, "k", 0, 64));
  CHECK_THROWS(InvalidArgument, "a block of 0 threads", Kernel(context, cubin, "k", 0, 0));
  CHECK_THROWS(InvalidArgument, "a block of 2048 threads",
               Kernel(context, make_cubin("k", 1, 0), "k", 0, 2048));
  CHECK_THROWS(InvalidArgument, "200000 bytes of shared memory for a block; sm_80 has 166912",
               Kernel(context, cubin, "k", 200000, 128));
  CHECK_THROWS(InvalidArgument, "-1 bytes of shared memory", Kernel(context, cubin, "k", -1, 128));
  CHECK_THROWS(InvalidArgument, "no section .nv.info.other", Kernel(context, cubin, "other", 0, 128));
}

TEST(cuda_tape, "a launch gives grid, block, shared memory, and arguments byte for byte, hidden ones null") {
  const Fake fake;
  const auto context = open();
  Tape tape(context);
  tape.add("norm", kernel(context, "norm", 2, 64, 1000), {3, 2, 5}, {kA, kB});
  tape.add("proj", kernel(context, "proj", 4, 128, 60000), {7, 1, 1}, {kB, kA});
  tape.launch(nullptr);
  CHECK(Fake::log("cuLaunchKernel") ==
        (Lines{"cuLaunchKernel norm grid=3,2,5 block=64 shared=1000 arguments=" + kHexA + kHexB,
               "cuLaunchKernel proj grid=7,1,1 block=128 shared=60000 arguments=" + kHexB + kHexA + kNull +
                   kNull}));
  CHECK(Fake::log("run").empty());  // it does not wait
  context->synchronize(nullptr);
  CHECK(Fake::log("run") == (Lines{"run norm", "run proj"}));
  CHECK(tape.ops() == (Lines{"norm", "proj"}));
}

TEST(cuda_tape, "refuses a launch that cannot be") {
  const Fake fake;
  const auto context = open();
  const auto two = kernel(context, "two", 2), five = kernel(context, "five", 5);
  Tape tape(context);
  CHECK_THROWS(InvalidArgument, "op: kernel 'two' has 2 parameters, of which up to 2 are hidden; given are 3",
               tape.add("op", two, {1, 1, 1}, {kA, kA, kA}));
  CHECK_THROWS(InvalidArgument, "has 5 parameters, of which up to 2 are hidden; given are 2",
               tape.add("op", five, {1, 1, 1}, {kA, kA}));
  CHECK_THROWS(InvalidArgument, "pointer 1 is null", tape.add("op", two, {1, 1, 1}, {kA, 0}));
  CHECK_THROWS(InvalidArgument, "a grid of 0 blocks in dimension 0",
               tape.add("op", two, {0, 1, 1}, {kA, kA}));
  CHECK_THROWS(InvalidArgument, "a grid of 65536 blocks in dimension 1; it must be 1 to 65535",
               tape.add("op", two, {1, 65536, 1}, {kA, kA}));
  CHECK_THROWS(InvalidArgument, "in dimension 2", tape.add("op", two, {1, 1, 65536}, {kA, kA}));
  CHECK_THROWS(InvalidArgument, "another context", tape.add("op", kernel(open(), "k", 1), {1, 1, 1}, {kA}));
  const auto small = std::make_shared<Kernel>(
      context, make_cubin("small", {parameter_entry(0, 0, 4), {3, 0x19, 4, {}}}), "small", 0, 32);
  CHECK_THROWS(InvalidArgument, "parameter 0 has 4 bytes, so it is no pointer",
               tape.add("op", small, {1, 1, 1}, {kA}));
  CHECK_EQ(tape.size(), size_t{0});
}

TEST(cuda_step, "a graph is a chain of the tape's launches, in order") {
  const Fake fake;
  const auto context = open();
  Tape tape(context);
  for (const char* op : {"a", "b", "c"}) tape.add(op, kernel(context, op, 3, 64, 50000), {2, 3, 5}, {kA});
  const auto step = Step::graph(tape, nullptr);
  const std::string rest = " grid=2,3,5 block=64 shared=50000 arguments=" + kHexA + kNull + kNull + " after=";
  CHECK(Fake::log("cuGraphAddKernelNode") ==
        (Lines{"cuGraphAddKernelNode a" + rest, "cuGraphAddKernelNode b" + rest + "0",
               "cuGraphAddKernelNode c" + rest + "1"}));
  CHECK(Fake::log("cuGraphInstantiateWithFlags") == Lines{"cuGraphInstantiateWithFlags 3"});
  CHECK_EQ(Fake::log("cuGraphUpload").size(), size_t{1});
  CHECK_EQ(fakecuda_live("graph"), 0);  // only what can be launched is kept
  CHECK_EQ(step->mode(), "graph");
  CHECK_EQ(step->nodes(), size_t{3});
  CHECK_EQ(step->bytes(), size_t{65536 + 3 * 1024});  // what the fake takes for one
}

TEST(cuda_step, "a graph runs in one call, as often as it is launched, also when tape and kernels are gone") {
  const Fake fake;
  auto context = open();
  auto tape = std::make_unique<Tape>(context);
  for (const char* op : {"a", "b"}) tape->add(op, kernel(context, op, 3), {1, 1, 1}, {kA});
  const auto step = Step::graph(*tape, nullptr);
  tape.reset();
  step->launch(nullptr);
  step->launch(nullptr);
  CHECK(Fake::log("run").empty());
  context->synchronize(nullptr);
  CHECK(Fake::log("run") == (Lines{"run a", "run b", "run a", "run b"}));
  CHECK(Fake::log("cuGraphLaunch") == (Lines{"cuGraphLaunch 2", "cuGraphLaunch 2"}));
  CHECK(Fake::log("cuLaunchKernel").empty());
}

TEST(cuda_step, "a graph works with a driver that knows the older node parameters only") {
  const Fake fake;
  fakecuda_set("version", 11080);
  const auto context = open();
  Tape tape(context);
  tape.add("a", kernel(context, "a", 3), {1, 1, 1}, {kA});
  CHECK_EQ(Step::graph(tape, nullptr)->nodes(), size_t{1});
}

TEST(cuda_step, "eager launches one by one what the tape had when it was made") {
  const Fake fake;
  const auto context = open();
  Tape tape(context);
  tape.add("a", kernel(context, "a", 3), {1, 1, 1}, {kA});
  const auto step = Step::eager(tape);
  tape.add("b", kernel(context, "b", 3), {1, 1, 1}, {kA});
  step->launch(nullptr);
  context->synchronize(nullptr);
  CHECK(Fake::log("run") == Lines{"run a"});
  CHECK_EQ(step->mode(), "eager");
  CHECK_EQ(step->bytes(), size_t{0});
  CHECK(Fake::log("cuGraphCreate").empty());
}

TEST(cuda_step, "a captured graph is launched, and stays its maker's") {
  const Fake fake;
  const auto context = open();
  const Driver& driver = context->driver();
  GraphHandle graph = nullptr;
  ExecHandle exec = nullptr;
  {
    const Context::Current current(*context);
    driver.cuGraphCreate(&graph, 0);
    driver.cuGraphInstantiateWithFlags(&exec, graph, 0);
  }
  Step::captured(context, exec, {"a", "b"})->launch(nullptr);
  context->synchronize(nullptr);
  CHECK_EQ(Fake::log("cuGraphLaunch").size(), size_t{1});
  CHECK_EQ(fakecuda_live("exec"), 1);
  CHECK_THROWS(InvalidArgument, "needs the handle", Step::captured(context, nullptr, {}));
  const Context::Current current(*context);
  driver.cuGraphExecDestroy(exec);
  driver.cuGraphDestroy(graph);
}

TEST(cuda_step, "a device without memory for a graph says so, and keeps nothing of it") {
  const Fake fake;
  fakecuda_set("memory", 1000);
  const auto context = open();
  Tape tape(context);
  tape.add("a", kernel(context, "a", 3), {1, 1, 1}, {kA});
  CHECK_THROWS(CudaError,
               "cuGraphInstantiateWithFlags: CUDA_ERROR_OUT_OF_MEMORY (2), while instantiating the graph of "
               "1 launches",
               Step::graph(tape, nullptr));
  CHECK_EQ(fakecuda_live("graph"), 0);
  CHECK_THROWS(InvalidArgument, "the tape is empty", Step::graph(Tape(context), nullptr));
}

}  // namespace
}  // namespace d3rt::cuda
