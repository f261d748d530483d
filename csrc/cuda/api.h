// The part of the CUDA driver API that d3rt uses, declared here, so that no CUDA is needed to build. It is
// held against NVIDIA's own cuda.h by tests/gpu/test_driver_api.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace d3rt::cuda {

using Result = int;  // CUresult
using Device = int;
using DevicePointer = uint64_t;
using ContextHandle = struct CUctx_st*;
using ModuleHandle = struct CUmod_st*;
using FunctionHandle = struct CUfunc_st*;
using StreamHandle = struct CUstream_st*;
using EventHandle = struct CUevent_st*;
using GraphHandle = struct CUgraph_st*;
using NodeHandle = struct CUgraphNode_st*;
using ExecHandle = struct CUgraphExec_st*;
using LibraryKernelHandle = struct CUkern_st*;

// CUDA_KERNEL_NODE_PARAMS_v2. Drivers before 12.0 read the part up to `extra` (v1).
struct KernelNodeParams {
  FunctionHandle function;
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  void** parameters;
  void** extra;
  LibraryKernelHandle kernel;
  ContextHandle context;
};

constexpr Result kSuccess = 0;
constexpr Result kDeinitialized = 4;
constexpr Result kNoDevice = 100;
constexpr Result kContextIsDestroyed = 709;

// CUdevice_attribute
constexpr int kMultiprocessorCount = 16;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kMaxSharedMemoryPerBlockOptin = 97;
// CUfunction_attribute
constexpr int kMaxDynamicSharedSizeBytes = 8;
// CUevent_flags
constexpr unsigned kEventDisableTiming = 2;

// Every call: its name, the name it is exported by, the version its signature here is of (as cuGetProcAddress
// counts: 1000 * major + 10 * minor), and its arguments. An older driver gives the signature of its own
// version, which for these calls differs in nothing that is used.
#define D3RT_CUDA_CALLS(X)                                                                               \
  X(cuInit, "cuInit", 2000, (unsigned flags))                                                            \
  X(cuDriverGetVersion, "cuDriverGetVersion", 2020, (int* version))                                      \
  X(cuGetErrorName, "cuGetErrorName", 6000, (Result error, const char** name))                           \
  X(cuDeviceGetCount, "cuDeviceGetCount", 2000, (int* count))                                            \
  X(cuDeviceGet, "cuDeviceGet", 2000, (Device * device, int ordinal))                                    \
  X(cuDeviceGetName, "cuDeviceGetName", 2000, (char* name, int length, Device device))                   \
  X(cuDeviceGetAttribute, "cuDeviceGetAttribute", 2000, (int* value, int attribute, Device device))      \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", 7000, (ContextHandle * context, Device))       \
  X(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", 11000, (Device device))                   \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", 4000, (ContextHandle context))                              \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", 4000, (ContextHandle * context))                              \
  X(cuMemGetInfo, "cuMemGetInfo_v2", 3020, (size_t* free, size_t* total))                                \
  X(cuMemHostAlloc, "cuMemHostAlloc", 2020, (void** memory, size_t bytes, unsigned flags))               \
  X(cuMemFreeHost, "cuMemFreeHost", 2000, (void* memory))                                                \
  X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", 3020,                                                     \
    (void* to, DevicePointer from, size_t bytes, StreamHandle stream))                                   \
  X(cuModuleLoadData, "cuModuleLoadData", 2000, (ModuleHandle * module, const void* image))              \
  X(cuModuleUnload, "cuModuleUnload", 2000, (ModuleHandle module))                                       \
  X(cuModuleGetFunction, "cuModuleGetFunction", 2000,                                                    \
    (FunctionHandle * function, ModuleHandle module, const char* name))                                  \
  X(cuFuncSetAttribute, "cuFuncSetAttribute", 9000, (FunctionHandle function, int attribute, int value)) \
  X(cuLaunchKernel, "cuLaunchKernel", 4000,                                                              \
    (FunctionHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,       \
     unsigned block_y, unsigned block_z, unsigned shared_bytes, StreamHandle stream, void** parameters,  \
     void** extra))                                                                                      \
  X(cuStreamSynchronize, "cuStreamSynchronize", 2000, (StreamHandle stream))                             \
  X(cuEventCreate, "cuEventCreate", 2000, (EventHandle * event, unsigned flags))                         \
  X(cuEventDestroy, "cuEventDestroy_v2", 4000, (EventHandle event))                                      \
  X(cuEventRecord, "cuEventRecord", 2000, (EventHandle event, StreamHandle stream))                      \
  X(cuEventSynchronize, "cuEventSynchronize", 2000, (EventHandle event))                                 \
  X(cuGraphCreate, "cuGraphCreate", 10000, (GraphHandle * graph, unsigned flags))                        \
  X(cuGraphDestroy, "cuGraphDestroy", 10000, (GraphHandle graph))                                        \
  X(cuGraphAddKernelNode, "cuGraphAddKernelNode_v2", 12000,                                              \
    (NodeHandle * node, GraphHandle graph, const NodeHandle* after, size_t num_after,                    \
     const KernelNodeParams* parameters))                                                                \
  X(cuGraphInstantiateWithFlags, "cuGraphInstantiateWithFlags", 11040,                                   \
    (ExecHandle * exec, GraphHandle graph, unsigned long long flags))                                    \
  X(cuGraphUpload, "cuGraphUpload", 11010, (ExecHandle exec, StreamHandle stream))                       \
  X(cuGraphLaunch, "cuGraphLaunch", 10000, (ExecHandle exec, StreamHandle stream))                       \
  X(cuGraphExecDestroy, "cuGraphExecDestroy", 10000, (ExecHandle exec))

}  // namespace d3rt::cuda
