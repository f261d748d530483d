#include "pages.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
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

const uintptr_t kPageMask = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)) - 1;

struct Span {
  uintptr_t begin, end;
};

uintptr_t up(uintptr_t address) { return (address + kLargePage - 1) & ~(kLargePage - 1); }
uintptr_t down(uintptr_t address) { return address & ~(kLargePage - 1); }

enum class Kind { anonymous, file };

// The writable private mappings of this process, of one kind, in order of address; touching anonymous ones
// joined.
std::vector<Span> mappings_of(Kind kind) {
  std::vector<Span> found;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    std::string range, mode, offset, device, inode, name;
    fields >> range >> mode >> offset >> device >> inode >> name;
    if (mode.compare(0, 2, "rw") != 0 || mode.back() != 'p' || name.compare(0, 6, "[stack") == 0) continue;
    if ((inode == "0") != (kind == Kind::anonymous)) continue;
    const size_t dash = range.find('-');
    const Span span = {std::stoull(range.substr(0, dash), nullptr, 16),
                       std::stoull(range.substr(dash + 1), nullptr, 16)};
    if (kind == Kind::anonymous && !found.empty() && found.back().end == span.begin)
      found.back().end = span.end;
    else
      found.push_back(span);
  }
  return found;
}

// Whether there is room for a copy of so many bytes, with as much to spare.
bool memory_for(uintptr_t bytes) {
  std::ifstream info("/proc/meminfo");
  for (std::string name, unit; info >> name;) {
    uintptr_t value = 0;
    info >> value;
    std::getline(info, unit);
    if (name == "MemAvailable:") return value * 1024 > 2 * bytes;
  }
  return false;
}

// Puts anonymous memory with the same bytes, in large pages, in the place of [begin, end), page-aligned, some
// MB at a time. At any moment every address there reads the same. False where the system would not.
bool replace_by_anonymous(uintptr_t begin, uintptr_t end) {
  constexpr uintptr_t kChunk = 32 * kLargePage;
  while (begin < end) {
    const uintptr_t stop = std::min(end, down(begin) + kChunk), size = stop - begin,
                    reserved = size + kLargePage;
    void* room = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) return false;
    // As far into a large page as its future place is, or moving it there would break the pages up.
    const auto base = reinterpret_cast<uintptr_t>(room);
    const uintptr_t at = base + (begin - base) % kLargePage;
    void* copy = reinterpret_cast<void*>(at);  // NOLINT: inside the mapping just made
    madvise(copy, size, MADV_HUGEPAGE);
    std::memcpy(copy, reinterpret_cast<void*>(begin), size);  // NOLINT
    const bool moved =
        mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, reinterpret_cast<void*>(begin)) != MAP_FAILED;
    if (at > base) munmap(room, at - base);
    if (at + size < base + reserved)
      munmap(reinterpret_cast<void*>(at + size), base + reserved - at - size);  // NOLINT
    if (!moved) {
      munmap(copy, size);
      return false;
    }
    begin = stop;
  }
  return true;
}

// Weights of a safetensors file that Hugging Face has mapped: file pages are never large. What a mapping
// mostly consists of is therefore replaced by anonymous memory at the same addresses; the model sees no
// difference, and the file's pages are the system's to drop.
void leave_files(const std::vector<Span>& spans) {
  for (const Span& mapping : mappings_of(Kind::file)) {
    uintptr_t first = mapping.end, last = mapping.begin, wanted = 0;
    for (const Span& span : spans) {
      if (span.begin < mapping.begin || span.end > mapping.end) continue;
      first = std::min(first, span.begin);
      last = std::max(last, span.end);
      wanted += span.end - span.begin;
    }
    first &= ~kPageMask;
    last = (last + kPageMask) & ~kPageMask;
    if (wanted < 2 * kLargePage || wanted < (last - first) / 2 || !memory_for(last - first)) continue;
    if (!replace_by_anonymous(first, last)) return;
  }
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

  leave_files(spans);
  const std::vector<Span> mappings = mappings_of(Kind::anonymous);
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
