#include "isa.h"

#include <cstdlib>

#include "../errors.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace d3rt::cpu {
namespace {

#if defined(__aarch64__)
bool has_dotprod() {
#if defined(__ARM_FEATURE_DOTPROD)  // part of what everything is compiled for
  return true;
#elif defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP, which older headers do not name
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables = {&kernels_scalar};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kernels_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
    tables.push_back(&kernels_avx512);
    if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&kernels_avx512_bf16);
  }
#elif defined(__aarch64__)
  tables.push_back(&kernels_neon);
  if (has_dotprod()) tables.push_back(&kernels_neon_dotprod);
#endif
  return tables;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : available()) names.emplace_back(table->isa);
  return names;
}

const Kernels& kernels_for(const std::string& isa) {
  const char* forced = std::getenv("D3RT_CPU_ISA");
  const std::string wanted = !isa.empty() ? isa : forced ? forced : "";
  const auto tables = available();
  if (wanted.empty()) return *tables.back();
  if (wanted == kernels_empty.isa) return kernels_empty;
  std::string names;
  for (const Kernels* table : tables) {
    if (wanted == table->isa) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw InvalidArgument("ISA '" + wanted +
                        "' (D3RT_CPU_ISA) cannot run here; this processor and build have: " + names);
}

}  // namespace d3rt::cpu
