// d3rt._C.cuda. Device addresses, streams and graphs of torch come as ints, and nothing here keeps them
// alive. The GIL is released around everything that may wait for the device.
#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda/dispatcher.h"

namespace d3rt {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

template <class Handle>
Handle handle(uintptr_t address) {
  return reinterpret_cast<Handle>(address);
}

// Destroying a dispatcher waits for its generation.
struct DeleteWithoutGil {
  void operator()(cuda::Dispatcher* dispatcher) const {
    py::gil_scoped_release release;
    delete dispatcher;
  }
};

}  // namespace

void bind_cuda(py::module_ m) {
  m.doc() =
      "The CUDA driver, kernels, recorded steps and the loop that replays them. No CUDA is needed to import "
      "it.";

  py::class_<cuda::Driver, std::shared_ptr<cuda::Driver>>(m, "Driver")
      .def(py::init<const std::string&>(), py::arg("path") = "", NoGil(),
           "libcuda at `path`, or at $D3RT_LIBCUDA, or libcuda.so.1; BackendUnavailableError says what is "
           "missing.")
      .def_property_readonly("version", &cuda::Driver::version, "12040 for CUDA 12.4")
      .def("devices", &cuda::Driver::devices, NoGil());

  py::class_<cuda::Context, std::shared_ptr<cuda::Context>>(m, "Context")
      .def(py::init<std::shared_ptr<cuda::Driver>, int>(), py::arg("driver"), py::arg("ordinal"), NoGil())
      .def_property_readonly("name", &cuda::Context::name)
      .def_property_readonly("arch", &cuda::Context::arch, "80 for sm_80")
      .def_property_readonly("multiprocessors", &cuda::Context::multiprocessors)
      .def("memory", &cuda::Context::memory, NoGil(), "(free, total) bytes");

  py::class_<cuda::Kernel, std::shared_ptr<cuda::Kernel>>(m, "Kernel")
      .def(py::init([](std::shared_ptr<cuda::Context> context, const py::bytes& cubin, std::string name,
                       int shared, int threads) {
             const std::string image = cubin;
             py::gil_scoped_release release;
             return std::make_shared<cuda::Kernel>(std::move(context), image, std::move(name), shared,
                                                   threads);
           }),
           py::arg("context"), py::arg("cubin"), py::arg("name"), py::arg("shared"), py::arg("threads"),
           "shared: bytes of shared memory of a block; threads: of a block")
      .def_property_readonly(
          "parameters",
          [](const cuda::Kernel& kernel) {
            std::vector<std::pair<int, int>> all;
            for (const cuda::Parameter& each : kernel.parameters()) all.emplace_back(each.offset, each.size);
            return all;
          },
          "(offset, size) in bytes of each, hidden ones too");

  py::class_<cuda::Tape, std::shared_ptr<cuda::Tape>>(m, "Tape")
      .def(py::init<std::shared_ptr<cuda::Context>>(), py::arg("context"))
      .def("add", &cuda::Tape::add, py::arg("op"), py::arg("kernel"), py::arg("grid"), py::arg("pointers"),
           "A launch; hidden parameters behind `pointers` get null.")
      .def("__len__", &cuda::Tape::size)
      .def_property_readonly("ops", &cuda::Tape::ops)
      .def(
          "launch",
          [](const cuda::Tape& tape, uintptr_t stream) { tape.launch(handle<cuda::StreamHandle>(stream)); },
          py::arg("stream"), NoGil(), "Every launch on the stream, one by one; does not wait for them.");

  py::class_<cuda::Step, std::shared_ptr<cuda::Step>>(m, "Step")
      .def_static(
          "graph",
          [](const cuda::Tape& tape, uintptr_t stream) {
            return cuda::Step::graph(tape, handle<cuda::StreamHandle>(stream));
          },
          py::arg("tape"), py::arg("stream"), NoGil())
      .def_static(
          "captured",
          [](std::shared_ptr<cuda::Context> context, uintptr_t exec, std::vector<std::string> ops) {
            return cuda::Step::captured(std::move(context), handle<cuda::ExecHandle>(exec), std::move(ops));
          },
          py::arg("context"), py::arg("exec"), py::arg("ops"),
          "exec: a CUgraphExec, which the caller keeps alive")
      .def_static("eager", &cuda::Step::eager, py::arg("tape"))
      .def_property_readonly("mode", &cuda::Step::mode, "graph, captured or eager")
      .def_property_readonly("ops", &cuda::Step::ops)
      .def_property_readonly("nodes", &cuda::Step::nodes)
      .def_property_readonly("bytes", &cuda::Step::bytes, "device memory that the graph took")
      .def(
          "launch",
          [](const cuda::Step& step, uintptr_t stream) { step.launch(handle<cuda::StreamHandle>(stream)); },
          py::arg("stream"), NoGil(), "Enqueues it on the stream and does not wait for it.");

  py::class_<cuda::Dispatcher, std::unique_ptr<cuda::Dispatcher, DeleteWithoutGil>>(m, "Dispatcher")
      .def(py::init([](std::shared_ptr<cuda::Context> context, uintptr_t stream, const py::object& pos,
                       const py::object& filled, cuda::DevicePointer ring, int64_t ring_rows, int64_t batch,
                       int ahead) {
             const TensorView pos_view = view_of(pos), filled_view = view_of(filled);
             check_view("dispatcher", "pos", pos_view, DType::i32, {batch});
             py::gil_scoped_release release;
             return std::unique_ptr<cuda::Dispatcher, DeleteWithoutGil>(
                 new cuda::Dispatcher(std::move(context), handle<cuda::StreamHandle>(stream), pos_view,
                                      filled_view, ring, ring_rows, ahead));
           }),
           py::arg("context"), py::arg("stream"), py::arg("pos"), py::arg("filled"), py::arg("ring"),
           py::arg("ring_rows"), py::arg("batch"), py::arg("ahead"), py::keep_alive<1, 4>(),
           py::keep_alive<1, 5>())
      .def("add", &cuda::Dispatcher::add, py::arg("step"), py::arg("reads"), py::arg("fills"))
      .def(
          "start",
          [](cuda::Dispatcher& d, int first, std::vector<int> programs, std::vector<int32_t> eos_tokens) {
            d.start({first, std::move(programs), std::move(eos_tokens)});
          },
          py::kw_only(), py::arg("first"), py::arg("programs"), py::arg("eos_tokens"), NoGil())
      .def(
          "wait", [](cuda::Dispatcher& d, double seconds) { return wait_for_end(d, seconds); },
          py::arg("seconds"))
      .def(
          "read",
          [](cuda::Dispatcher& d, size_t first_step, double seconds) {
            return read_tokens(d, first_step, seconds);
          },
          py::arg("first_step"), py::arg("seconds"))
      .def("cancel", &cuda::Dispatcher::cancel, NoGil())
      .def("begin", &cuda::Dispatcher::begin, NoGil())
      .def("step", &cuda::Dispatcher::step, py::arg("program"), NoGil())
      .def("commit", &cuda::Dispatcher::commit, py::arg("finished"), NoGil())
      .def_property_readonly("step_seconds", &cuda::Dispatcher::step_seconds)
      .def_property_readonly("batch", &cuda::Dispatcher::batch);

  m.def(
      "synchronize",
      [](const cuda::Context& context, uintptr_t stream) {
        context.synchronize(handle<cuda::StreamHandle>(stream));
      },
      py::arg("context"), py::arg("stream"), NoGil(), "Waits for all that is enqueued on the stream.");
}

}  // namespace d3rt
