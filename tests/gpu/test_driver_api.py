"""csrc/cuda/api.h declares the driver API by itself. Here a compiler holds it against NVIDIA's own cuda.h, which comes
with Triton: layouts, constants, and of every call the exported name and the size of each argument."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
from fake_libcuda import ROOT, compiler

CHECK = r"""
#include "cuda/api.h"
#include <cuda.h>
#include <string_view>
#include <type_traits>

using Ours = d3rt::cuda::KernelNodeParams;
using Theirs = CUDA_KERNEL_NODE_PARAMS_v2;
using Older = CUDA_KERNEL_NODE_PARAMS_v1;
#define SAME(ours, theirs)                                            \
  static_assert(offsetof(Ours, ours) == offsetof(Theirs, theirs));    \
  static_assert(sizeof(Ours::ours) == sizeof(Theirs::theirs));
#define SAME_IN_BOTH(ours, theirs)                                    \
  SAME(ours, theirs)                                                  \
  static_assert(offsetof(Ours, ours) == offsetof(Older, theirs));
static_assert(sizeof(Ours) == sizeof(Theirs));
static_assert(sizeof(Older) == offsetof(Ours, kernel));
SAME_IN_BOTH(function, func)
SAME_IN_BOTH(grid_x, gridDimX)
SAME_IN_BOTH(grid_y, gridDimY)
SAME_IN_BOTH(grid_z, gridDimZ)
SAME_IN_BOTH(block_x, blockDimX)
SAME_IN_BOTH(block_y, blockDimY)
SAME_IN_BOTH(block_z, blockDimZ)
SAME_IN_BOTH(shared_bytes, sharedMemBytes)
SAME_IN_BOTH(parameters, kernelParams)
SAME_IN_BOTH(extra, extra)
SAME(kernel, kern)
SAME(context, ctx)

static_assert(d3rt::cuda::kSuccess == CUDA_SUCCESS);
static_assert(d3rt::cuda::kDeinitialized == CUDA_ERROR_DEINITIALIZED);
static_assert(d3rt::cuda::kNoDevice == CUDA_ERROR_NO_DEVICE);
static_assert(d3rt::cuda::kContextIsDestroyed == CUDA_ERROR_CONTEXT_IS_DESTROYED);
static_assert(d3rt::cuda::kMultiprocessorCount == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(d3rt::cuda::kComputeCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(d3rt::cuda::kComputeCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(d3rt::cuda::kMaxSharedMemoryPerBlockOptin ==
              CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(d3rt::cuda::kMaxDynamicSharedSizeBytes == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(d3rt::cuda::kEventDisableTiming == CU_EVENT_DISABLE_TIMING);

template <class A, class B>
constexpr bool alike = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
template <class A, class B>
struct Compare : std::false_type {};
template <class R, class... A, class S, class... B>
struct Compare<R (*)(A...), S (*)(B...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(A) == sizeof...(B)) return sizeof(R) == sizeof(S) && (alike<A, B> && ...);
    return false;
  }();
};

#define TEXT(name) TEXT_(name)
#define TEXT_(name) #name
namespace d3rt::cuda {
// cuda.h renames calls by macros, so `name` is here what is exported.
#define HELD(name, symbol, version, arguments)                                        \
  static_assert(std::string_view(TEXT(name)) == symbol);                              \
  static_assert(Compare<Result(*) arguments, decltype(&::name)>::value, symbol);
D3RT_CUDA_CALLS(HELD)
}  // namespace d3rt::cuda
"""


def headers() -> Path:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton, which brings NVIDIA's cuda.h, is not installed")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    if not (folder / "cuda.h").exists():
        pytest.skip("this triton brings no cuda.h")
    return folder


def check(source: str) -> subprocess.CompletedProcess:
    command = [
        compiler(),
        "-std=c++17",
        "-fsyntax-only",
        "-xc++",
        f"-I{ROOT / 'csrc'}",
        f"-I{headers()}",
        "-",
    ]
    return subprocess.run(command, input=source, capture_output=True, text=True)


def test_the_declarations_are_those_of_cuda_h():
    result = check(CHECK)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("SAME(kernel, kern)", "SAME(kernel, ctx)"),
        ("kNoDevice == CUDA_ERROR_NO_DEVICE", "kNoDevice == CUDA_ERROR_INVALID_DEVICE"),
        ("Compare<Result(*) arguments,", "Compare<Result(*)(int),"),
    ],
)
def test_the_check_notices_a_difference(right, wrong):
    assert right in CHECK
    assert check(CHECK.replace(right, wrong)).returncode != 0
