// The core that a thread runs on, and leaving it to others.
#pragma once

namespace d3rt {

// The number of the core that this thread runs on; -1 where that cannot be told.
int current_core();

// Moves this thread, once, to a core that is not one of taken[count]; where it may run stays as it was.
// False, and nothing happens, where it may run on none but these, or where that cannot be told.
bool leave_cores(const int* taken, int count);

}  // namespace d3rt
