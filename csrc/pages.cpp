#include "pages.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace d3rt {

#if defined(__linux__)
namespace {

constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
#if defined(MADV_COLLAPSE)
constexpr int kCollapse = MADV_COLLAPSE;
#else
constexpr int kCollapse = 25;  // Linux 6.1; older headers do not name it, older kernels answer EINVAL
#endif

struct Span {
  uintptr_t begin, end;
};

uintptr_t up(uintptr_t address) { return (address + kLargePage - 1) & ~(kLargePage - 1); }
uintptr_t down(uintptr_t address) { return address & ~(kLargePage - 1); }

// The writable private anonymous mappings of this process, in order of address, with touching ones joined.
std::vector<Span> anonymous_mappings() {
  std::vector<Span> found;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    std::string range, mode, offset, device, inode, name;
    fields >> range >> mode >> offset >> device >> inode >> name;
    if (inode != "0" || mode.compare(0, 2, "rw") != 0 || mode.back() != 'p' ||
        name.compare(0, 6, "[stack") == 0)
      continue;
    const size_t dash = range.find('-');
    const Span span = {std::stoull(range.substr(0, dash), nullptr, 16),
                       std::stoull(range.substr(dash + 1), nullptr, 16)};
    if (!found.empty() && found.back().end == span.begin)
      found.back().end = span.end;
    else
      found.push_back(span);
  }
  return found;
}

}  // namespace

int64_t use_large_pages(const std::vector<TensorView>& views) {
  const char* wanted = std::getenv("D3RT_HUGE_PAGES");
  if (wanted && std::strcmp(wanted, "0") == 0) return 0;
  std::vector<Span> spans;
  for (const TensorView& view : views) {
    const auto begin = reinterpret_cast<uintptr_t>(view.data);
    if (view) spans.push_back({begin, begin + static_cast<uintptr_t>(view.span_bytes())});
  }
  const auto by_address = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  std::sort(spans.begin(), spans.end(), by_address);

  const std::vector<Span> mappings = anonymous_mappings();
  int64_t covered = 0;
  uintptr_t done = 0;  // large pages below this address have been dealt with
  bool done_well = false;
  for (const Span& span : spans) {
    const auto after = std::upper_bound(mappings.begin(), mappings.end(), span, by_address);
    if (after == mappings.begin()) continue;
    const Span& mapping = *(after - 1);
    if (span.end > mapping.end) continue;
    for (uintptr_t page = down(span.begin); page < span.end; page += kLargePage) {
      if (page < up(mapping.begin) || page + kLargePage > mapping.end) continue;
      void* address = reinterpret_cast<void*>(page);  // NOLINT: an address out of the process's own map
      if (page >= done) {
        // Collapse moves what is there into a large page at once. The first call lets the kernel's own daemon
        // try again later where there is no free large page right now.
        madvise(address, kLargePage, MADV_HUGEPAGE);
        done_well = madvise(address, kLargePage, kCollapse) == 0;
        done = page + kLargePage;
      }
      if (done_well)
        covered += static_cast<int64_t>(std::min(span.end, page + kLargePage) - std::max(span.begin, page));
    }
  }
  return covered;
}

#else

int64_t use_large_pages(const std::vector<TensorView>&) { return 0; }

#endif

}  // namespace d3rt
