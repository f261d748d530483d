// Test memory: tensors in allocations that end exactly where the tensor ends, so that AddressSanitizer sees a
// read of one element too many, and that start at an odd multiple of the element's size, so that an aligned
// load faults.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "ops.h"

namespace d3rt {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline float widen(cpu::bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Truncates: the tests read back what was stored, so how they round does not matter.
inline cpu::bf16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return {static_cast<uint16_t>(value != value ? 0x7fc0 : bits >> 16)};
}

// One element of a float32 or bfloat16 view, by its offset in elements.
inline double get(const TensorView& view, int64_t offset) {
  return view.dtype == DType::bf16 ? widen(view.ptr<cpu::bf16>()[offset]) : view.ptr<float>()[offset];
}
inline void set(const TensorView& view, int64_t offset, float value) {
  if (view.dtype == DType::bf16)
    view.ptr<cpu::bf16>()[offset] = narrow(value);
  else
    view.ptr<float>()[offset] = value;
}

class Memory {
 public:
  explicit Memory(uint32_t seed = 1) : random_(seed), arena(std::make_shared<Arena>()) {}

  // Contiguous and registered in the arena.
  TensorView tensor(DType dtype, std::initializer_list<int64_t> sizes, int64_t row_gap = 0) {
    TensorView view;
    view.dtype = dtype;
    view.ndim = static_cast<int>(sizes.size());
    int at = 0;
    for (int64_t size : sizes) view.sizes[static_cast<size_t>(at++)] = size;
    int64_t stride = 1;
    for (int i = view.ndim - 1; i >= 0; --i) {
      view.strides[static_cast<size_t>(i)] = stride;
      stride *= view.sizes[static_cast<size_t>(i)];
      if (i == view.ndim - 1) stride += row_gap;
    }
    const size_t bytes = static_cast<size_t>(view.span_bytes()),
                 step = static_cast<size_t>(dtype_bytes(dtype));
    blocks_.emplace_back(new char[bytes + step]);  // new aligns to 16, so one step further is odd
    view.data = blocks_.back().get() + step;
    std::memset(view.data, 0xff, bytes);  // NaN in either float type, -1 as int32
    arena->add(view);
    return view;
  }
  // Normally distributed values; what lies in the gap after a row stays NaN.
  TensorView random(DType dtype, std::initializer_list<int64_t> sizes, float scale = 1, float mean = 0,
                    int64_t row_gap = 0) {
    const TensorView view = tensor(dtype, sizes, row_gap);
    std::normal_distribution<float> normal(mean, scale);
    const int64_t columns = view.sizes[static_cast<size_t>(view.ndim - 1)];
    const int64_t rows = view.numel() / columns;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < columns; ++i) set(view, row * (columns + row_gap) + i, normal(random_));
    return view;
  }
  TensorView ints(const std::vector<int32_t>& values) {
    const TensorView view = tensor(DType::i32, {static_cast<int64_t>(values.size())});
    std::copy(values.begin(), values.end(), view.ptr<int32_t>());
    return view;
  }
  TensorView floats(const std::vector<float>& values, std::initializer_list<int64_t> sizes) {
    const TensorView view = tensor(DType::f32, sizes);
    std::copy(values.begin(), values.end(), view.ptr<float>());
    return view;
  }

 private:
  std::mt19937 random_;
  std::vector<std::unique_ptr<char[]>> blocks_;

 public:
  std::shared_ptr<Arena> arena;
};

}  // namespace d3rt
