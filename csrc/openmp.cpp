// Looked up in the process rather than linked: torch brings its own copy, and only that one's threads are the
// ones that spin. GOMP_parallel is what GCC compiles `omp parallel` to; LLVM's library has it as well.
#include "openmp.h"

#include <dlfcn.h>
#include <unistd.h>

namespace d3rt {
namespace {

struct OpenMp {
  void (*parallel)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
};

template <class Function>
void look_up(Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

const pid_t kLoadedIn = getpid();

}  // namespace

bool run_on_openmp(void (*job)(void* context, int thread, int num_threads), void* context, int threads) {
  struct Call {
    OpenMp openmp;
    void (*job)(void*, int, int);
    void* context;
  } call{{}, job, context};
  if (getpid() != kLoadedIn) return false;
  look_up(call.openmp.parallel, "GOMP_parallel");
  look_up(call.openmp.thread_num, "omp_get_thread_num");
  look_up(call.openmp.num_threads, "omp_get_num_threads");
  if (!call.openmp.parallel || !call.openmp.thread_num || !call.openmp.num_threads) return false;
  call.openmp.parallel(
      [](void* data) {
        const Call& each = *static_cast<const Call*>(data);
        each.job(each.context, each.openmp.thread_num(), each.openmp.num_threads());
      },
      &call, static_cast<unsigned>(threads), 0);
  return true;
}

}  // namespace d3rt
