#include "openmp.h"

#include "check.h"

namespace d3rt {
namespace {

TEST(openmp, "a process without OpenMP is told so, and nothing runs") {
  bool ran = false;
  const bool done = run_on_openmp([](void* ran, int, int) { *static_cast<bool*>(ran) = true; }, &ran, 2);
  CHECK(!done);
  CHECK(!ran);
}

}  // namespace
}  // namespace d3rt
