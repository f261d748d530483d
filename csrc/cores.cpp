#include "cores.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace d3rt {

#if defined(__linux__)

int current_core() { return sched_getcpu(); }

bool leave_cores(const int* taken, int count) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return false;  // more cores than fit, for one
  cpu_set_t others = allowed;
  for (int i = 0; i < count; ++i)
    if (taken[i] >= 0 && taken[i] < CPU_SETSIZE) CPU_CLR(static_cast<size_t>(taken[i]), &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return false;
  return sched_setaffinity(0, sizeof allowed, &allowed) == 0;
}

#else

int current_core() { return -1; }
bool leave_cores(const int*, int) { return false; }

#endif

}  // namespace d3rt
