// Large pages for what every step streams. A decode step reads each weight once and never soon again, so with
// 4 KiB pages it spends much of its time on address translation, and hardware prefetch stops at each page's
// end.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor.h"

namespace d3rt {

// Asks the system to hold these views in 2 MiB pages, without changing an address or a byte that the process
// sees, and returns how many of their bytes it now has there. A file that is mapped privately and consists
// mostly of these views is replaced, at the same addresses, by anonymous memory; nobody may write to it
// meanwhile. Neighbours of a view in the same mapping may come along. Where the system has no such pages
// (Linux before 6.1, other systems, huge pages switched off) little or nothing happens. D3RT_HUGE_PAGES=0
// switches it off.
int64_t use_large_pages(const std::vector<TensorView>& views);

}  // namespace d3rt
