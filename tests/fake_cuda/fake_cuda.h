// A libcuda.so.1 for tests: it has no device, but keeps the books of one. Device addresses are host
// addresses.
//
// Work on a stream is queued, and runs when somebody waits for it: a host that reads before it waits reads
// what was there before. fakecuda_set_eager(1) is the opposite, a device that is always done at once: a host
// that has buffers overwritten before it reads them loses what was in them. A test that means both runs both.
//
// Launches are held against the cubin that was loaded: the table of parameters, the block it was compiled
// for, the limits of grids and shared memory. What is against the rules is answered with the error that a
// driver gives, and noted: fakecuda_faults().
//
// The environment sets what the device is, before the first call: FAKECUDA_VERSION (12040), FAKECUDA_DEVICES
// (1; 0 has none), FAKECUDA_ARCH (80), FAKECUDA_MEMORY (bytes, 1 GiB), FAKECUDA_HIDE (as fakecuda_hide),
// FAKECUDA_FAIL (as fakecuda_fail; from the first call on only).
#pragma once

#include <cstddef>
#include <cstdint>

#define FAKECUDA_API extern "C" __attribute__((visibility("default")))

// Stands for the device: called for each kernel that runs, on the thread that waits for it, with no lock
// held. pointers: the n arguments, hidden ones too.
using FakeCudaRunner = void (*)(void* user, const char* kernel, const void* cubin, size_t cubin_size,
                                const unsigned grid[3], unsigned threads, unsigned shared,
                                const uint64_t* pointers, int n);
FAKECUDA_API void fakecuda_set_runner(FakeCudaRunner runner, void* user);

// Forgets log, counts, faults, failures to come and what is queued, mends a broken context and takes the
// environment's settings again. Live objects stay.
FAKECUDA_API void fakecuda_reset();
FAKECUDA_API void fakecuda_set(const char* what, long long value);  // "version", "devices", "arch", "memory"
FAKECUDA_API void fakecuda_hide(const char* call);                  // cuGetProcAddress does not know it
FAKECUDA_API void fakecuda_set_eager(int eager);
FAKECUDA_API void fakecuda_set_logging(int on);

// spec "name:n:code": the n-th call of `name` from now on fails with that CUresult. "*" is any call, "run"
// the n-th kernel that runs, so that the error shows when somebody waits. After an error of the kind that
// breaks a context (700, ...) all calls fail with it. "" takes it back.
FAKECUDA_API void fakecuda_fail(const char* spec);
FAKECUDA_API const char* fakecuda_failed();  // the call that was made to fail, "" when none was yet

// One line for each call: its name, then what matters of its arguments; and "run <kernel>" for each that ran.
FAKECUDA_API const char* fakecuda_log();
FAKECUDA_API const char* fakecuda_faults();               // one line each; "" is what every test wants
FAKECUDA_API long long fakecuda_count(const char* call);  // of a name, "run", or "*" for all calls
FAKECUDA_API int fakecuda_live(const char* kind);  // context, module, graph, exec, event, pinned; "*": all
FAKECUDA_API void fakecuda_forget();               // of live objects: for a test that knows why they stay
FAKECUDA_API int fakecuda_pending();               // pieces of work that are queued
FAKECUDA_API int fakecuda_run(int pieces);         // runs so many; returns how many there were
