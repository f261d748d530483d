// use_large_pages: no byte changes whatever the system answers, and only private anonymous memory is asked
// for.
#include <cstdlib>
#include <numeric>
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

TEST(pages, "D3RT_HUGE_PAGES=0 switches them off") {
  std::vector<uint32_t> memory(3 << 20, 1u);
  setenv("D3RT_HUGE_PAGES", "0", 1);
  const int64_t covered = use_large_pages({bytes(memory.data(), static_cast<int64_t>(memory.size() * 4))});
  unsetenv("D3RT_HUGE_PAGES");
  CHECK_EQ(covered, 0);
}

}  // namespace
}  // namespace d3rt
