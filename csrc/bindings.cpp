// The module d3rt._C. This file and bindings_cuda.cpp are the only ones that know Python: torch tensors
// become TensorViews (by their attributes, so no torch header and no torch ABI), C++ errors become the
// exceptions of d3rt/errors.py, and the GIL is released wherever work is done.
#include "bindings.h"

#include <pybind11/stl.h>

#include <unordered_map>

#include "cpu/isa.h"
#include "dispatcher.h"
#include "pack.h"
#include "pages.h"
#include "sampler.h"
#include "tape.h"

namespace d3rt {
namespace {

DType dtype_of(const py::object& tensor) {
  const std::string name = py::str(tensor.attr("dtype"));
  if (name == "torch.float32") return DType::f32;
  if (name == "torch.bfloat16") return DType::bf16;
  if (name == "torch.float16") return DType::f16;
  if (name == "torch.int32") return DType::i32;
  if (name == "torch.int8" || name == "torch.uint8") return DType::byte;
  throw InvalidArgument("a tensor of " + name +
                        ": the cpu kernels take float32, bfloat16, float16, int32 and int8");
}

}  // namespace

TensorView view_of(const py::object& tensor) {
  if (tensor.is_none()) return {};
  const std::string device = py::str(tensor.attr("device").attr("type"));
  if (device != "cpu")
    throw InvalidArgument("a tensor on '" + device + "': the cpu kernels take tensors on 'cpu'");
  TensorView view;
  view.dtype = dtype_of(tensor);
  const auto sizes = py::tuple(tensor.attr("shape"));
  const auto strides = py::tuple(tensor.attr("stride")());
  if (sizes.size() > TensorView::kMaxDims)
    throw InvalidArgument("a tensor of " + std::to_string(sizes.size()) + " dimensions: at most 5");
  view.ndim = static_cast<int>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    view.sizes[i] = sizes[i].cast<int64_t>();
    view.strides[i] = strides[i].cast<int64_t>();
  }
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  return view;
}

py::tuple read_tokens(Loop& loop, size_t first_step, double seconds) {
  bool ended = false;
  std::vector<int32_t> tokens;
  {
    py::gil_scoped_release release;
    tokens = loop.read(first_step, seconds, &ended);
  }
  return py::make_tuple(tokens, ended);
}

bool wait_for_end(Loop& loop, double seconds) {
  bool raised = false, ended = false;
  {
    py::gil_scoped_release release;
    ended = loop.wait(seconds, [&] {
      py::gil_scoped_acquire acquire;
      return raised = PyErr_CheckSignals() != 0;
    });
  }
  if (raised) throw py::error_already_set();
  return ended;
}

namespace {

// An arena that also keeps its tensors alive, and remembers their views: asking torch for one costs
// microseconds.
class TensorArena : public Arena {
 public:
  void add(const py::object& tensor) {
    const TensorView view = view_of(tensor);
    if (!view) throw InvalidArgument("arena: an empty tensor has no address to register");
    Arena::add(view);
    views_.emplace(tensor.ptr(), view);
    kept_.push_back(tensor);
  }
  void add_packed(const py::object& weight) {
    for (const char* part : {"data", "scales", "minima"})
      if (!weight.attr(part).is_none()) add(weight.attr(part));
  }
  int64_t use_large_pages() const {
    std::vector<TensorView> views;
    for (const py::object& tensor : kept_) views.push_back(view(tensor));
    return d3rt::use_large_pages(views);
  }
  TensorView view(const py::object& tensor) const {
    const auto known = views_.find(tensor.ptr());
    return known != views_.end() ? known->second : view_of(tensor);
  }
  // A weight: a tensor, or a d3rt.kernels.packing.PackedMatrix.
  MatrixView matrix(const py::object& weight) const {
    MatrixView matrix;
    if (!py::hasattr(weight, "scales")) {
      matrix.data = view(weight);
      return matrix;
    }
    matrix.format = weight.attr("format").cast<std::string>();
    matrix.rows = weight.attr("rows").cast<int64_t>();
    matrix.cols = weight.attr("cols").cast<int64_t>();
    matrix.data = view(weight.attr("data"));
    matrix.scales = view(weight.attr("scales"));
    matrix.minima = view(weight.attr("minima"));
    return matrix;
  }

 private:
  std::vector<py::object> kept_;
  std::unordered_map<PyObject*, TensorView> views_;
};

// A tape whose ops are given as torch tensors.
class TensorTape : public Tape {
 public:
  TensorTape(std::shared_ptr<ThreadPool> pool, std::shared_ptr<TensorArena> arena, const std::string& isa)
      : Tape(std::move(pool), arena, cpu::kernels_for(isa)), arena_(std::move(arena)) {}
  TensorView view(const py::object& tensor) const { return arena_->view(tensor); }
  MatrixView matrix(const py::object& weight) const { return arena_->matrix(weight); }

 private:
  std::shared_ptr<TensorArena> arena_;
};

using T = const py::object&;

void raise(const char* exception, const char* message) {
  PyErr_SetString(py::module_::import("d3rt.errors").attr(exception).ptr(), message);
}

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const InvalidArgument& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const ForeignBuffer& e) {
    raise("ForeignBufferError", e.what());
  } catch (const Hole& e) {
    raise("HoleError", e.what());
  } catch (const NotFinite& e) {
    raise("NotFiniteError", e.what());
  } catch (const CudaError& e) {
    raise("CudaError", e.what());
  } catch (const DriverUnavailable& e) {
    const std::string told = "backend 'cuda': " + std::string(e.what()) + "; available here: cpu, reference.";
    raise("BackendUnavailableError", told.c_str());
  } catch (const Error& e) {
    raise("D3rtError", e.what());
  }
}

void record_kv_fill(TensorTape& tape, const py::sequence& layers, T x, T cos, T sin, T pos, float eps,
                    T lines) {
  KvFill op;
  op.x = tape.view(x);
  op.cos = tape.view(cos);
  op.sin = tape.view(sin);
  op.pos = tape.view(pos);
  op.eps = eps;
  op.lines = tape.view(lines);
  for (const py::handle& item : layers) {
    const auto layer = py::reinterpret_borrow<py::tuple>(item);
    if (layer.size() != 8)
      throw InvalidArgument("kv_fill: a layer is (k_cache, v_cache, norm, wk, wv, bk, bv, k_norm)");
    const auto item_at = [&](size_t i) { return py::reinterpret_borrow<py::object>(layer[i]); };
    const auto at = [&](size_t i) { return tape.view(item_at(i)); };
    op.layers.push_back(
        {at(0), at(1), at(2), tape.matrix(item_at(3)), tape.matrix(item_at(4)), at(5), at(6), at(7)});
  }
  tape.record(op);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "d3rt's native core: recorded decode steps (Tape) and the loop that replays them (Dispatcher)";
  py::register_exception_translator(translate);

  m.def("available_isas", &cpu::available_isas, "ISAs this build and this processor have, slowest first.");
  m.def(
      "selected_isa", [] { return std::string(cpu::kernels_for().isa); },
      "The ISA a new Tape takes by default.");
  m.attr("max_batch") = kMaxBatch;
  m.def("philox_uniform", &philox_uniform, py::arg("seed"), py::arg("step"), py::arg("slot"));

  py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(m, "ThreadPool")
      .def(py::init<int>(), py::arg("num_threads"))
      .def_property_readonly("size", &ThreadPool::size);

  py::class_<TensorArena, std::shared_ptr<TensorArena>>(m, "Arena")
      .def(py::init<>())
      .def("add", &TensorArena::add, py::arg("tensor"), "Registers a static buffer and keeps it alive.")
      .def_property_readonly("scratch_bytes", &TensorArena::scratch_bytes)
      .def("use_large_pages", &TensorArena::use_large_pages,
           "Asks for large pages under all that is registered so far; returns the bytes that have them.")
      .def("owns", [](const TensorArena& a, T tensor) { return a.owns(a.view(tensor)); }, py::arg("tensor"));

  py::class_<TensorTape, std::shared_ptr<TensorTape>>(m, "Tape")
      .def(py::init<std::shared_ptr<ThreadPool>, std::shared_ptr<TensorArena>, const std::string&>(),
           py::arg("pool"), py::arg("arena"), py::arg("isa") = "")
      .def("replay", &TensorTape::replay, py::call_guard<py::gil_scoped_release>())
      .def("replay_after_torch", &TensorTape::replay_after_torch, py::call_guard<py::gil_scoped_release>())
      .def("__len__", &TensorTape::size)
      .def_property_readonly("ops",
                             [](const TensorTape& tape) {
                               std::vector<std::string> names;
                               for (size_t i = 0; i < tape.size(); ++i) names.push_back(tape.node(i).op);
                               return names;
                             })
      .def(
          "embed",
          [](TensorTape& t, T x, T token, T table) {
            t.record(Embed{t.view(x), t.view(token), t.matrix(table)});
          },
          py::arg("x"), py::arg("token"), py::arg("table"))
      .def(
          "norm_qkv_rope",
          [](TensorTape& t, T q, T k_cache, T v_cache, T x, T norm, T wq, T wk, T wv, T bq, T bk, T bv,
             T q_norm, T k_norm, T cos, T sin, T pos, float eps, T lines) {
            t.record(NormQkvRope{t.view(q), t.view(k_cache), t.view(v_cache), t.view(x), t.view(norm),
                                 t.matrix(wq), t.matrix(wk), t.matrix(wv), t.view(bq), t.view(bk), t.view(bv),
                                 t.view(q_norm), t.view(k_norm), t.view(cos), t.view(sin), t.view(pos), eps,
                                 t.view(lines)});
          },
          py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("x"), py::arg("norm"), py::arg("wq"),
          py::arg("wk"), py::arg("wv"), py::arg("bq"), py::arg("bk"), py::arg("bv"), py::arg("q_norm"),
          py::arg("k_norm"), py::arg("cos"), py::arg("sin"), py::arg("pos"), py::arg("eps"),
          py::arg("lines") = py::none())
      .def(
          "attention",
          [](TensorTape& t, T out, T q, T k_cache, T v_cache, T pos, float scale, int64_t window, T lines) {
            t.record(Attention{t.view(out), t.view(q), t.view(k_cache), t.view(v_cache), t.view(pos), scale,
                               window, t.view(lines)});
          },
          py::arg("out"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("pos"),
          py::arg("scale"), py::arg("window"), py::arg("lines") = py::none())
      .def(
          "proj_add",
          [](TensorTape& t, T x, T a, T w, T bias) {
            t.record(ProjAdd{t.view(x), t.view(a), t.matrix(w), t.view(bias)});
          },
          py::arg("x"), py::arg("a"), py::arg("w"), py::arg("bias"))
      .def(
          "norm_gate_up",
          [](TensorTape& t, T h, T x, T norm, T w_gate, T w_up, T b_gate, T b_up, float eps) {
            t.record(NormGateUp{t.view(h), t.view(x), t.view(norm), t.matrix(w_gate), t.matrix(w_up),
                                t.view(b_gate), t.view(b_up), eps});
          },
          py::arg("h"), py::arg("x"), py::arg("norm"), py::arg("w_gate"), py::arg("w_up"), py::arg("b_gate"),
          py::arg("b_up"), py::arg("eps"))
      .def("kv_fill", record_kv_fill, py::arg("layers"), py::arg("x"), py::arg("cos"), py::arg("sin"),
           py::arg("pos"), py::arg("eps"), py::arg("lines") = py::none())
      .def(
          "keep_hidden",
          [](TensorTape& t, T hidden, T x, T pos, T lines) {
            t.record(KeepHidden{t.view(hidden), t.view(x), t.view(pos), t.view(lines)});
          },
          py::arg("hidden"), py::arg("x"), py::arg("pos"), py::arg("lines") = py::none())
      .def(
          "norm_logits",
          [](TensorTape& t, T logits, T x, T norm, T w, float eps) {
            t.record(NormLogits{t.view(logits), t.view(x), t.view(norm), t.matrix(w), eps});
          },
          py::arg("logits"), py::arg("x"), py::arg("norm"), py::arg("w"), py::arg("eps"))
      .def(
          "copy_hidden", [](TensorTape& t, T out, T x) { t.record(CopyHidden{t.view(out), t.view(x)}); },
          py::arg("out"), py::arg("x"))
      .def(
          "hidden_cosine",
          [](TensorTape& t, T out, T a, T b) { t.record(HiddenCosine{t.view(out), t.view(a), t.view(b)}); },
          py::arg("out"), py::arg("a"), py::arg("b"))
      .def(
          "top2_margin",
          [](TensorTape& t, T out, T logits) { t.record(Top2Margin{t.view(out), t.view(logits)}); },
          py::arg("out"), py::arg("logits"));

  m.def(
      "unpack",
      [](std::shared_ptr<ThreadPool> pool, T out, T w, const std::string& isa) {
        auto arena = std::make_shared<TensorArena>();
        arena->add(out);
        arena->add_packed(w);
        Tape tape(std::move(pool), arena, cpu::kernels_for(isa));
        tape.record(Unpack{arena->view(out), arena->matrix(w)});
        py::gil_scoped_release release;
        tape.replay_beside_torch();
      },
      py::arg("pool"), py::arg("out"), py::arg("w"), py::arg("isa") = "",
      "out [N, K] float32 or bfloat16 = a PackedMatrix [N, K] as floats, at once.");

  m.def(
      "pack",
      [](ThreadPool& pool, T out, T weight) {
        const MatrixView packed = TensorArena().matrix(out);
        const TensorView view = view_of(weight);
        py::gil_scoped_release release;
        pack(pool, view, packed);
      },
      py::arg("pool"), py::arg("out"), py::arg("weight"),
      "A PackedMatrix [N, K] = weight [N, K] float32, bfloat16 or float16, quantised, at once.");

  m.def(
      "linear",
      [](std::shared_ptr<ThreadPool> pool, T out, T a, T w, const std::string& isa) {
        auto arena = std::make_shared<TensorArena>();
        for (T tensor : {out, a}) arena->add(tensor);
        arena->add_packed(w);
        Tape tape(std::move(pool), arena, cpu::kernels_for(isa));
        tape.record(Linear{arena->view(out), arena->view(a), arena->matrix(w)});
        py::gil_scoped_release release;
        tape.replay_beside_torch();
      },
      py::arg("pool"), py::arg("out"), py::arg("a"), py::arg("w"), py::arg("isa") = "",
      "out [T, N] = a [T, K] times a PackedMatrix [N, K]^T, at once.");

  py::class_<SamplingParams>(m, "SamplingParams")
      .def(py::init([](bool do_sample, float temperature, int64_t top_k, double top_p, double min_p,
                       float repetition_penalty, uint64_t seed) {
             return SamplingParams{do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed};
           }),
           py::kw_only(), py::arg("do_sample"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
           py::arg("min_p"), py::arg("repetition_penalty"), py::arg("seed"));

  m.def(
      "sample",
      [](T logits, const SamplingParams& params, const std::vector<std::vector<int32_t>>& seen,
         int64_t step) {
        const TensorView view = view_of(logits);
        check_view("sample", "logits", view, DType::f32, {-1, -1});
        Sampler sampler(params, view.size(1), seen, cpu::kernels_for());
        std::vector<int32_t> tokens;
        for (int64_t slot = 0; slot < view.size(0); ++slot)
          tokens.push_back(
              sampler.sample(view.ptr<float>() + slot * view.size(1), static_cast<int>(slot), step));
        return tokens;
      },
      py::arg("logits"), py::arg("params"), py::arg("seen"), py::arg("step"),
      "One token for each row of logits [B, V] float32 (changed in place by the repetition penalty).");

  py::class_<Dispatcher>(m, "Dispatcher")
      .def(py::init([](const TensorArena& arena, T token, T pos, T logits, T filled) {
             for (T tensor : {token, pos, logits, filled})
               if (!arena.owns(arena.view(tensor)))
                 throw ForeignBuffer(
                     "dispatcher: token, pos, logits and filled must be registered in the arena");
             return std::make_unique<Dispatcher>(arena.view(token), arena.view(pos), arena.view(logits),
                                                 arena.view(filled), cpu::kernels_for());
           }),
           py::arg("arena"), py::arg("token"), py::arg("pos"), py::arg("logits"), py::arg("filled"),
           py::keep_alive<1, 2>())
      .def(
          "add",
          [](Dispatcher& d, std::shared_ptr<TensorTape> tape, std::vector<int> reads,
             std::vector<int> fills) { return d.add(std::move(tape), std::move(reads), std::move(fills)); },
          py::arg("tape"), py::arg("reads"), py::arg("fills"))
      .def(
          "start",
          [](Dispatcher& d, std::vector<int> programs, std::vector<int32_t> eos_tokens, int32_t pad_token,
             const SamplingParams& sampling, std::vector<std::vector<int32_t>> seen) {
            py::gil_scoped_release release;
            d.start({std::move(programs), std::move(eos_tokens), pad_token, sampling, std::move(seen)});
          },
          py::kw_only(), py::arg("programs"), py::arg("eos_tokens"), py::arg("pad_token"),
          py::arg("sampling"), py::arg("seen"))
      .def(
          "wait", [](Dispatcher& d, double seconds) { return wait_for_end(d, seconds); }, py::arg("seconds"))
      .def(
          "read",
          [](Dispatcher& d, size_t first_step, double seconds) {
            return read_tokens(d, first_step, seconds);
          },
          py::arg("first_step"), py::arg("seconds"))
      .def("cancel", &Dispatcher::cancel, py::call_guard<py::gil_scoped_release>())
      .def(
          "add_ladder",
          [](Dispatcher& d, const TensorArena& arena, const std::vector<std::pair<int, int>>& rungs, int top,
             T confidence) {
            if (!arena.owns(arena.view(confidence)))
              throw ForeignBuffer("dispatcher: confidence must be registered in the arena");
            std::vector<Rung> made;
            for (const auto& [segment, exit] : rungs) made.push_back({segment, exit});
            return d.add_ladder(std::move(made), top, arena.view(confidence));
          },
          py::arg("arena"), py::arg("rungs"), py::arg("top"), py::arg("confidence"),
          "rungs: (segment, exit), as numbers of programs; top: likewise. Returns the ladder's number.")
      .def("add_climb", &Dispatcher::add_climb, py::arg("ladder"), py::arg("threshold"))
      .def_property_readonly("exits", &Dispatcher::exits)
      .def("begin", &Dispatcher::begin)
      .def("step", &Dispatcher::step, py::arg("program"), py::call_guard<py::gil_scoped_release>())
      .def("commit", &Dispatcher::commit, py::arg("tokens"), py::arg("finished"))
      .def_property_readonly("step_seconds", &Dispatcher::step_seconds)
      .def_property_readonly("batch", &Dispatcher::batch);

  bind_cuda(m.def_submodule("cuda"));
}

}  // namespace d3rt
