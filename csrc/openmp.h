// Work between torch's products, on torch's own threads. Its OpenMP threads spin for milliseconds after each
// product; on a pool of our own the same work would have to share the cores with them.
#pragma once

namespace d3rt {

// Calls job(context, thread, num_threads) on each thread of an OpenMP team of at most `threads` (0: as many
// as the caller's teams have), and returns when all have returned. False, and nothing done, if this process
// has loaded no OpenMP library, or is a fork, in which GNU's may wait forever for threads that are not there.
bool run_on_openmp(void (*job)(void* context, int thread, int num_threads), void* context, int threads);

}  // namespace d3rt
