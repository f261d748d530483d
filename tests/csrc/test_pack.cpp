// pack: quantising to int8 and int4, in buffers that end where the matrix ends. That the bits are those of
// kernels/packing.py is tested from Python.
#include "pack.h"

#include <string>
#include <vector>

#include "check.h"
#include "cpu/floats.h"
#include "memory.h"

namespace d3rt {
namespace {

using cpu::kGroup;
using cpu::kTileRows;

MatrixView empty_matrix(Memory& memory, const char* format, int64_t rows, int64_t cols) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, groups = cols / kGroup;
  const bool is_int8 = std::string(format) == "int8";
  MatrixView w;
  w.format = format;
  w.rows = rows;
  w.cols = cols;
  w.data = memory.tensor(DType::byte, {tiles, groups, is_int8 ? 8 : 4, kTileRows, 4});
  w.scales = memory.tensor(DType::f16, {tiles, groups, kTileRows});
  if (!is_int8) w.minima = memory.tensor(DType::f16, {tiles, groups, kTileRows});
  return w;
}

std::vector<char> bytes_of(const MatrixView& w) {
  std::vector<char> bytes;
  for (const TensorView* view : {&w.data, &w.scales, &w.minima})
    if (*view) bytes.insert(bytes.end(), view->ptr<char>(), view->ptr<char>() + view->span_bytes());
  return bytes;
}

double half_at(const TensorView& view, int64_t index) { return cpu::to_float(view.ptr<cpu::f16>()[index]); }

// The value that row `row`, column `col` stands for, and its group's scale.
struct Element {
  double value, scale;
};
Element element(const MatrixView& w, int64_t row, int64_t col) {
  const int64_t at = row / kTileRows * (w.cols / kGroup) + col / kGroup, lane = row % kTileRows;
  const int64_t word = col % kGroup / 4, j = col % 4;
  const double scale = half_at(w.scales, at * kTileRows + lane);
  if (w.format == "int8")
    return {w.data.ptr<int8_t>()[((at * 8 + word) * kTileRows + lane) * 4 + j] * scale, scale};
  const int both = w.data.ptr<uint8_t>()[((at * 4 + word % 4) * kTileRows + lane) * 4 + j];
  return {(word < 4 ? both & 15 : both >> 4) * scale + half_at(w.minima, at * kTileRows + lane), scale};
}

TEST(pack, "a weight is off by half a step, int4 where no outlier is cut, and rows may lie apart") {
  for (const char* format : {"int8", "int4"})
    for (DType dtype : {DType::f32, DType::bf16})
      for (int64_t rows : {1, 16, 37})
        for (int64_t gap : {0, 3}) {
          const int64_t cols = 96;
          check::at(std::string(format) + ", " + dtype_name(dtype) + ", rows " + std::to_string(rows));
          Memory memory(static_cast<uint32_t>(rows));
          const TensorView weight = memory.tensor(dtype, {rows, cols}, gap);
          // evenly spread, so that the whole range is needed
          for (int64_t row = 0; row < rows; ++row)
            for (int64_t col = 0; col < cols; ++col)
              set(weight, row * (cols + gap) + col, static_cast<float>((col * 7 + row) % 32) - 20.0f);
          const MatrixView out = empty_matrix(memory, format, rows, cols);
          ThreadPool pool(2);
          pack(pool, weight, out);
          for (int64_t row = 0; row < rows; ++row)
            for (int64_t col = 0; col < cols; ++col) {
              const Element e = element(out, row, col);
              // float16 scales and minima: 15 steps of 2^-11 of one, and 2^-11 of the minimum
              CHECK_NEAR(e.value, get(weight, row * (cols + gap) + col), e.scale * 0.52 + 20 * 0x1p-11);
            }
        }
}

TEST(pack, "the bits do not depend on the number of threads, and what fills the last tile up is zero") {
  for (const char* format : {"int8", "int4"})
    for (int64_t rows : {1, 37, 64}) {
      Memory memory(7);
      const TensorView weight = memory.random(DType::f32, {rows, 64});
      const MatrixView first = empty_matrix(memory, format, rows, 64);
      ThreadPool one(1);
      pack(one, weight, first);
      for (int64_t row = rows; row < (rows + kTileRows - 1) / kTileRows * kTileRows; ++row)
        for (int64_t col = 0; col < 64; ++col) {
          const Element e = element(first, row, col);
          CHECK(e.value == 0 && e.scale == 0);
        }
      for (int threads : {2, 3, 8}) {
        const MatrixView again = empty_matrix(memory, format, rows, 64);
        ThreadPool pool(threads);
        pack(pool, weight, again);
        CHECK(bytes_of(again) == bytes_of(first));
      }
    }
}

TEST(pack, "weights that are no numbers, or too large, do no harm to the other rows") {
  for (const char* format : {"int8", "int4"}) {
    Memory memory(3);
    const TensorView weight = memory.random(DType::f32, {8, 32});
    const MatrixView clean = empty_matrix(memory, format, 8, 32),
                     broken = empty_matrix(memory, format, 8, 32);
    ThreadPool pool(1);
    pack(pool, weight, clean);
    set(weight, 32 * 2 + 5, kNan);
    set(weight, 32 * 3 + 6, kInfinity);
    set(weight, 32 * 4 + 7, -3e38f);
    pack(pool, weight, broken);
    for (int64_t row : {0, 1, 5, 6, 7})
      for (int64_t col = 0; col < 32; ++col)
        CHECK_EQ(element(broken, row, col).value, element(clean, row, col).value);
  }
}

TEST(pack, "what does not fit is refused by name") {
  Memory memory;
  ThreadPool pool(1);
  const TensorView weight = memory.random(DType::f32, {8, 64});
  const auto packing = [&](const TensorView& from, const MatrixView& to) { pack(pool, from, to); };
  MatrixView out = empty_matrix(memory, "int4", 8, 64);
  CHECK_THROWS(InvalidArgument, "pack: weight is int32", packing(memory.ints({1}), out));
  CHECK_THROWS(InvalidArgument, "pack: weight is missing", packing({}, out));
  CHECK_THROWS(InvalidArgument, "pack: weight is float32 [8, 32]",
               packing(memory.random(DType::f32, {8, 32}), out));
  MatrixView wrong = out;
  wrong.format = "int3";
  CHECK_THROWS(InvalidArgument, "pack: format 'int3'", packing(weight, wrong));
  wrong = out;
  wrong.minima = {};
  CHECK_THROWS(InvalidArgument, "pack: minima is missing", packing(weight, wrong));
  wrong = out;
  wrong.scales = out.data;
  CHECK_THROWS(InvalidArgument, "pack: scales", packing(weight, wrong));
  wrong = empty_matrix(memory, "int8", 8, 64);
  wrong.minima = out.minima;
  CHECK_THROWS(InvalidArgument, "pack: int8 has no minima", packing(weight, wrong));
  wrong = out;
  wrong.cols = 40;
  CHECK_THROWS(InvalidArgument, "pack: 40 columns", packing(weight, wrong));
}

}  // namespace
}  // namespace d3rt
