// TensorView: what csrc knows of a tensor (address, dtype, sizes, strides), and the checks made on it.
// It owns no memory: whoever records a view keeps the tensor behind it alive.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "errors.h"

namespace d3rt {

enum class DType : uint8_t { f32, bf16, f16, i32, byte };  // byte: int8 or uint8

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::i32:
      return "int32";
    case DType::byte:
      return "int8";
  }
  return "?";
}

inline int64_t dtype_bytes(DType dtype) {
  if (dtype == DType::byte) return 1;
  return dtype == DType::bf16 || dtype == DType::f16 ? 2 : 4;
}

struct TensorView {
  static constexpr int kMaxDims = 5;

  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  std::array<int64_t, kMaxDims> sizes{};
  std::array<int64_t, kMaxDims> strides{};  // in elements

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  int64_t size(int dim) const { return sizes[dim]; }

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= sizes[i];
    return n;
  }
  // Bytes from `data` to one past the last element that the strides can reach.
  int64_t span_bytes() const {
    if (numel() == 0) return 0;
    int64_t last = 0;
    for (int i = 0; i < ndim; ++i) last += (sizes[i] - 1) * strides[i];
    return (last + 1) * dtype_bytes(dtype);
  }
  std::string describe() const {
    std::string text = std::string(dtype_name(dtype)) + " [";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + "]";
  }
};

// -1 in `sizes` accepts any size. The innermost dimension must be contiguous in every op; `contiguous` asks
// it of all.
inline void check_view(const char* op, const char* name, const TensorView& view, DType dtype,
                       std::initializer_list<int64_t> sizes, bool contiguous = true) {
  auto refuse = [&](const std::string& rule) {
    throw InvalidArgument(std::string(op) + ": " + name + " is " + (view ? view.describe() : "missing") +
                          ", but " + rule);
  };
  std::string expected = std::string(dtype_name(dtype)) + " [";
  int index = 0;
  for (int64_t size : sizes)
    expected += (index++ ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
  expected += "]";
  bool fits = view && view.dtype == dtype && view.ndim == static_cast<int>(sizes.size());
  index = 0;
  if (fits) {
    for (int64_t size : sizes) fits = fits && (size < 0 || view.sizes[index] == size), ++index;
  }
  if (!fits) refuse("must be " + expected);
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.sizes[i] != 1 && view.strides[i] != stride && (contiguous || i == view.ndim - 1))
      refuse(contiguous ? "must be contiguous" : "its last dimension must be contiguous");
    if (view.strides[i] < 0) refuse("its strides must not be negative");
    stride *= view.sizes[i];
  }
}

}  // namespace d3rt
