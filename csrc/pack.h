// pack: a matrix of floats quantised to int8 or int4, at once. kernels/packing.py `pack` is the definition,
// and every bit is the same. No tape records it: it runs once for each weight, when a model is compiled.
#pragma once

#include "ops.h"
#include "threads.h"

namespace d3rt {

// weight [rows, cols] float32, bfloat16 or float16, rows any stride apart; out packed [rows, cols], with
// minima where it is int4 and without where it is int8. Reads a tile of rows at a time and allocates nothing;
// the threads share the tiles out. InvalidArgument where out does not fit.
void pack(ThreadPool& pool, const TensorView& weight, const MatrixView& out);

}  // namespace d3rt
