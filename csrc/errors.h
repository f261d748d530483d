// Typed errors. Everything in csrc that refuses something throws one of these; nothing aborts.
// bindings.cpp maps each to its Python exception (d3rt/errors.py).
#pragma once

#include <stdexcept>
#include <string>

namespace d3rt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A shape, dtype or value that an op cannot take.
struct InvalidArgument : Error {
  using Error::Error;
};
// A tape was asked to record an address that is not one of its static buffers.
struct ForeignBuffer : Error {
  using Error::Error;
};
// A step would read K,V that was never written.
struct Hole : Error {
  using Error::Error;
};
// Logits with NaN or without any finite value: there is nothing to sample from.
struct NotFinite : Error {
  using Error::Error;
};
// A call of the CUDA driver failed, or a broken context was asked for more. `code` is the CUresult.
struct CudaError : Error {
  CudaError(int code, const std::string& what) : Error(what), code(code) {}
  int code;
};
// There is no CUDA driver, it is too old, or it has no device.
struct DriverUnavailable : Error {
  using Error::Error;
};

}  // namespace d3rt
