// What the files that know Python share.
#pragma once

#include <pybind11/pybind11.h>

#include "loop.h"
#include "tensor.h"

namespace py = pybind11;

namespace d3rt {

// Of a torch tensor in host memory, or {} of None. Nothing keeps the tensor alive.
TensorView view_of(const py::object& tensor);

// (tokens, ended), see Loop::read.
py::tuple read_tokens(Loop& loop, size_t first_step, double seconds);
// See Loop::wait. What Python's signal handlers raise ends it.
bool wait_for_end(Loop& loop, double seconds);

void bind_cuda(py::module_ m);  // bindings_cuda.cpp

}  // namespace d3rt
