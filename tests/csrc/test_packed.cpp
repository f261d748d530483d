// Packed weights (int8, int4, int4 with minima), on every ISA, against plain loops over the layout of
// cpu/args.h, in buffers that end where the matrix ends.
#include <cmath>
#include <string>

#include "check.h"
#include "cpu/isa.h"
#include "memory.h"
#include "tape.h"

namespace d3rt {
namespace {

using cpu::kGroup;
using cpu::kTileRows;

struct Format {
  const char* name;
  bool minima;
};
constexpr Format kFormats[] = {{"int8", false}, {"int4", false}, {"int4", true}};

// A float16 from the few values that need no rounding: sign, exponent -7..0, 3 bits of mantissa.
uint16_t half_bits(uint32_t random) {
  return static_cast<uint16_t>((random & 1) << 15 | (8 + (random >> 1 & 7)) << 10 | (random >> 4 & 7) << 7);
}
double half_value(uint16_t bits) {
  const double size = std::ldexp(1 + (bits & 0x3ff) / 1024.0, (bits >> 10 & 31) - 15);
  return bits >> 15 ? -size : size;
}

MatrixView random_matrix(Memory& memory, const Format& format, int64_t rows, int64_t cols) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, groups = cols / kGroup;
  const bool is_int8 = std::string(format.name) == "int8";
  MatrixView w;
  w.format = format.name;
  w.rows = rows;
  w.cols = cols;
  w.data = memory.tensor(DType::byte, {tiles, groups, is_int8 ? 8 : 4, kTileRows, 4});
  w.scales = memory.tensor(DType::f16, {tiles, groups, kTileRows});
  if (format.minima) w.minima = memory.tensor(DType::f16, {tiles, groups, kTileRows});
  std::mt19937 random(static_cast<uint32_t>(rows * cols));
  for (int64_t i = 0; i < w.data.numel(); ++i) {
    const uint32_t byte = random() & 255;
    w.data.ptr<uint8_t>()[i] = static_cast<uint8_t>(is_int8 && byte == 128 ? 129 : byte);  // -128 is no code
  }
  for (const TensorView* view : {&w.scales, &w.minima})
    for (int64_t i = 0; i < (*view ? view->numel() : 0); ++i) {
      const uint16_t bits = half_bits(random());
      std::memcpy(view->ptr<char>() + 2 * i, &bits, 2);
    }
  return w;
}

double half_at(const TensorView& view, int64_t index) {
  uint16_t bits;
  std::memcpy(&bits, view.ptr<char>() + 2 * index, 2);
  return half_value(bits);
}

// Code, scale and minimum of one element.
struct Element {
  double code, scale, minimum;
};
Element element(const MatrixView& w, int64_t row, int64_t col) {
  const int64_t at = row / kTileRows * (w.cols / kGroup) + col / kGroup, lane = row % kTileRows;
  const int64_t word = col % kGroup / 4, j = col % 4;
  Element e{0, half_at(w.scales, at * kTileRows + lane), 0};
  if (w.format == "int8") {
    e.code = w.data.ptr<int8_t>()[((at * 8 + word) * kTileRows + lane) * 4 + j];
    return e;
  }
  const int both = w.data.ptr<uint8_t>()[((at * 4 + word % 4) * kTileRows + lane) * 4 + j];
  e.code = word < 4 ? both & 15 : both >> 4;
  if (w.minima)
    e.minimum = half_at(w.minima, at * kTileRows + lane);
  else
    e.code -= 8;
  return e;
}

// a [T, cols] at `token` times row `row`, and the sum of the sizes of its terms.
void product(const MatrixView& w, int64_t row, const TensorView& a, int64_t token, double* value,
             double* size) {
  *value = *size = 0;
  for (int64_t g = 0; g < w.cols / kGroup; ++g) {
    const float* x = a.ptr<float>() + token * w.cols + g * kGroup;
    float largest = 0;
    for (int i = 0; i < kGroup; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float inverse = largest == 0 ? 0 : 127.0f / largest;
    for (int i = 0; i < kGroup; ++i) {
      const Element e = element(w, row, g * kGroup + i);
      const double activation = std::rint(x[i] * inverse) * (largest / 127.0f);
      *value += activation * (e.code * e.scale + e.minimum);
      *size += std::fabs(activation) * (std::fabs(e.code * e.scale) + std::fabs(e.minimum));
    }
  }
}

constexpr double kTolerance =
    16 * 0x1.0p-23;  // integer sums are exact; what rounds is the scaling of a few groups

template <class Body>
void for_each_kernel(const Body& body) {
  for (const std::string& isa : cpu::available_isas())
    for (int threads : {1, 3})
      for (const Format& format : kFormats) body(cpu::kernels_for(isa), threads, format);
}

TEST(packed, "a product sums codes exactly, group by group, whatever the batch and the last tile") {
  for_each_kernel([](const cpu::Kernels& kernels, int threads, const Format& format) {
    for (int64_t B : {1, 2, 3, 4, 7, 16})
      for (int64_t rows : {1, 16, 37})
        for (int64_t cols : {32, 96}) {
          Memory memory(static_cast<uint32_t>(B + rows));
          const MatrixView w = random_matrix(memory, format, rows, cols);
          const TensorView x = memory.random(DType::f32, {B, rows}), a = memory.random(DType::f32, {B, cols});
          const std::vector<float> before(x.ptr<float>(), x.ptr<float>() + x.numel());
          Tape tape(std::make_shared<ThreadPool>(threads), memory.arena, kernels);
          tape.record(ProjAdd{x, a, w, {}});
          tape.replay();
          for (int64_t b = 0; b < B; ++b)
            for (int64_t row = 0; row < rows; ++row) {
              double value, size;
              product(w, row, a, b, &value, &size);
              const double old = before[static_cast<size_t>(b * rows + row)];
              CHECK_NEAR(x.ptr<float>()[b * rows + row], old + value, kTolerance * (size + std::fabs(old)));
            }
        }
  });
}

// Scales of 1 and activations whose largest is 127: every sum is a whole number that float32 holds.
TEST(packed, "the largest codes are summed without overflow") {
  for_each_kernel([](const cpu::Kernels& kernels, int threads, const Format& format) {
    constexpr int64_t kB = 5, kRows = 32, kCols = 64;
    constexpr uint16_t kOne = 0x3c00;
    Memory memory;
    const MatrixView w = random_matrix(memory, format, kRows, kCols);
    const bool is_int8 = std::string(format.name) == "int8";
    for (int64_t i = 0; i < w.data.numel(); ++i) {
      const int64_t row = i / 4 % kTileRows, column = i % 4;  // four rows in turn: high, low, both, mirrored
      const bool high = row % 4 == 0 || (row % 4 > 1 && column % 2 == row % 4 % 2);
      w.data.ptr<uint8_t>()[i] = is_int8 ? (high ? 127 : 129) : (high ? 255 : 0);
    }
    for (const TensorView* view : {&w.scales, &w.minima})
      for (int64_t i = 0; i < (*view ? view->numel() : 0); ++i)
        std::memcpy(view->ptr<char>() + 2 * i, &kOne, 2);
    const TensorView out = memory.tensor(DType::f32, {kB, kRows}), a = memory.tensor(DType::f32, {kB, kCols});
    for (int64_t b = 0; b < kB; ++b)
      for (int64_t i = 0; i < kCols; ++i) {
        const bool negative = b == 1 || (b > 1 && i % 2 == b % 2);
        a.ptr<float>()[b * kCols + i] = negative ? -127.0f : 127.0f;
      }
    Tape tape(std::make_shared<ThreadPool>(threads), memory.arena, kernels);
    tape.record(Linear{out, a, w});
    tape.replay();
    for (int64_t b = 0; b < kB; ++b)
      for (int64_t row = 0; row < kRows; ++row) {
        double value, size;
        product(w, row, a, b, &value, &size);
        CHECK_EQ(static_cast<double>(out.ptr<float>()[b * kRows + row]), value);
      }
  });
}

TEST(packed, "a prefill's product takes any number of tokens") {
  for_each_kernel([](const cpu::Kernels& kernels, int threads, const Format& format) {
    for (int64_t T : {1, 5, 33}) {
      Memory memory(static_cast<uint32_t>(T));
      const MatrixView w = random_matrix(memory, format, 21, 64);
      const TensorView out = memory.tensor(DType::f32, {T, 21}), a = memory.random(DType::f32, {T, 64});
      Tape tape(std::make_shared<ThreadPool>(threads), memory.arena, kernels);
      tape.record(Linear{out, a, w});
      tape.replay();
      for (int64_t t = 0; t < T; ++t)
        for (int64_t row = 0; row < 21; ++row) {
          double value, size;
          product(w, row, a, t, &value, &size);
          CHECK_NEAR(out.ptr<float>()[t * 21 + row], value, kTolerance * size);
        }
    }
  });
}

TEST(packed, "an embedding row is unpacked alone") {
  for_each_kernel([](const cpu::Kernels& kernels, int threads, const Format& format) {
    Memory memory;
    const MatrixView table = random_matrix(memory, format, 19, 64);
    const TensorView x = memory.tensor(DType::f32, {2, 64}), token = memory.ints({18, 3});
    Tape tape(std::make_shared<ThreadPool>(threads), memory.arena, kernels);
    tape.record(Embed{x, token, table});
    tape.replay();
    for (int64_t slot = 0; slot < 2; ++slot)
      for (int64_t i = 0; i < 64; ++i) {
        const Element e = element(table, token.ptr<int32_t>()[slot], i);
        const double size = std::fabs(e.code * e.scale) + std::fabs(e.minimum);
        CHECK_NEAR(x.ptr<float>()[slot * 64 + i], e.code * e.scale + e.minimum, kTolerance * size);
      }
  });
}

TEST(packed, "a matrix that does not fit is refused by name") {
  Memory memory;
  const TensorView x = memory.random(DType::f32, {1, 8}), a = memory.random(DType::f32, {1, 64});
  Tape tape(std::make_shared<ThreadPool>(1), memory.arena, cpu::kernels_for());
  MatrixView w = random_matrix(memory, kFormats[0], 8, 64);
  const auto record = [&](const MatrixView& matrix) { tape.record(ProjAdd{x, a, matrix, {}}); };
  MatrixView wrong = w;
  wrong.rows = 9;
  CHECK_THROWS(InvalidArgument, "proj_add: w is packed [9, 64], but must be [8, 64]", record(wrong));
  wrong = w;
  wrong.format = "int3";
  CHECK_THROWS(InvalidArgument, "packed as 'int3'", record(wrong));
  wrong = w;
  wrong.scales = w.data;
  CHECK_THROWS(InvalidArgument, "proj_add: w", record(wrong));
  wrong = random_matrix(memory, kFormats[1], 8, 64);
  wrong.data.data = new uint8_t[1];
  CHECK_THROWS(ForeignBuffer, "proj_add: w", record(wrong));
  delete[] static_cast<uint8_t*>(wrong.data.data);
  CHECK_THROWS(InvalidArgument, "linear: w must be packed",
               tape.record(Linear{memory.tensor(DType::f32, {1, 8}), a, memory.random(DType::f32, {8, 64})}));
}

}  // namespace
}  // namespace d3rt
