// use_large_pages: no byte changes whatever the system answers, and only private anonymous memory is asked
// for.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "pages.h"

namespace d3rt {
namespace {

TensorView bytes(const void* data, int64_t count) {
  TensorView view;
  view.data = const_cast<void*>(data);
  view.dtype = DType::byte;
  view.ndim = 1;
  view.sizes[0] = count;
  view.strides[0] = 1;
  return view;
}

TEST(pages, "memory keeps its bytes, and no more than was asked for is counted") {
  std::vector<uint32_t> first(3 << 20), second(1 << 19), small(5);
  for (auto* each : {&first, &second, &small}) std::iota(each->begin(), each->end(), 7u);
  const auto of = [](const std::vector<uint32_t>& v) {
    return bytes(v.data(), static_cast<int64_t>(v.size() * sizeof v[0]));
  };
  const int64_t asked = static_cast<int64_t>((first.size() + second.size() + small.size()) * sizeof first[0]);
  for (int again = 0; again < 2; ++again) {
    const int64_t covered = use_large_pages({of(first), of(second), {}, of(small)});
    CHECK(covered >= 0 && covered <= asked);
  }
  for (auto* each : {&first, &second, &small})
    for (size_t i = 0; i < each->size(); ++i) CHECK((*each)[i] == 7u + i);
}

TEST(pages, "memory that is no private anonymous mapping is left alone") {
  static const std::vector<TensorView> none;
  CHECK_EQ(use_large_pages(none), 0);
  const char* constant = "a constant lies in the mapped program";
  CHECK_EQ(use_large_pages({bytes(constant, 32)}), 0);
}

TEST(pages, "a privately mapped file keeps its bytes and addresses, and the file itself stays as it was") {
  constexpr size_t kCount = 3 << 20, kHeader = 77;  // as safetensors has one: views begin at odd places
  std::vector<uint32_t> numbers(kCount);
  std::iota(numbers.begin(), numbers.end(), 3u);
  char name[] = "/tmp/d3rt_pages_XXXXXX";
  const int file = mkstemp(name);
  CHECK(file >= 0);
  const std::string header(kHeader, 'h');
  const size_t size = kHeader + kCount * 4;
  CHECK_EQ(write(file, header.data(), kHeader), static_cast<ssize_t>(kHeader));
  CHECK_EQ(write(file, numbers.data(), kCount * 4), static_cast<ssize_t>(kCount * 4));
  void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  CHECK(mapped != MAP_FAILED);
  char* data = static_cast<char*>(mapped) + kHeader;
  const int64_t half = kCount * 2;
  const int64_t covered = use_large_pages({bytes(data, half), bytes(data + half, half)});
  CHECK(covered >= 0 && covered <= 2 * half);
  CHECK(std::memcmp(mapped, header.data(), kHeader) == 0);
  CHECK(std::memcmp(data, numbers.data(), kCount * 4) == 0);
  data[5] = 'x';  // still writable, still private
  std::vector<char> there(size);
  CHECK_EQ(pread(file, there.data(), size, 0), static_cast<ssize_t>(size));
  CHECK(std::memcmp(there.data() + kHeader, numbers.data(), kCount * 4) == 0);
  munmap(mapped, size);
  close(file);
  unlink(name);
}

TEST(pages, "D3RT_HUGE_PAGES=0 switches them off") {
  std::vector<uint32_t> memory(3 << 20, 1u);
  setenv("D3RT_HUGE_PAGES", "0", 1);
  const int64_t covered = use_large_pages({bytes(memory.data(), static_cast<int64_t>(memory.size() * 4))});
  unsetenv("D3RT_HUGE_PAGES");
  CHECK_EQ(covered, 0);
}

}  // namespace
}  // namespace d3rt
