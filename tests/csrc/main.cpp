// Runs the C++ tests: all of them, or those whose name contains the first argument.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>

#include "check.h"
#include "cpu/isa.h"

namespace check {
namespace {
std::atomic<int> failures{0};
std::string place;
}  // namespace

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

void at(const std::string& where) { place = where; }

void fail(const char* file, int line, const std::string& what) {
  constexpr int kShown = 10;  // of one test; a wrong kernel fails in thousands of places
  if (++failures > kShown) return;
  std::fprintf(stderr, "    %s:%d: %s%s%s\n", file, line, what.c_str(), place.empty() ? "" : " at ",
               place.c_str());
}

}  // namespace check

int main(int argc, char** argv) {
  const char* wanted = argc > 1 ? argv[1] : "";
  int ran = 0, failed = 0;
  std::printf("ISAs:");
  for (const std::string& isa : d3rt::cpu::available_isas()) std::printf(" %s", isa.c_str());
  std::printf("\n");
  const auto begin = std::chrono::steady_clock::now();
  for (const check::Test& test : check::tests()) {
    if (!std::strstr(test.name, wanted)) continue;
    check::failures = 0;
    check::at("");
    const auto start = std::chrono::steady_clock::now();
    try {
      test.body();
    } catch (const std::exception& error) {
      check::fail(test.name, 0, std::string("threw ") + error.what());
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    ++ran;
    if (check::failures > 0) ++failed;
    std::printf("%s  %5.2f s  %s\n", check::failures > 0 ? "FAIL" : "ok  ", seconds.count(), test.name);
    std::fflush(stdout);
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::printf("%d tests, %d failed, %.1f s\n", ran, failed, seconds.count());
  if (!ran) std::printf("no test is named like '%s'\n", wanted);
  return failed > 0 || ran == 0;
}
