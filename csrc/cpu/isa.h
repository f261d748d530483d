// Which kernel table runs: the best ISA this processor has, unless D3RT_CPU_ISA forces one.
#pragma once

#include <string>
#include <vector>

#include "args.h"

namespace d3rt::cpu {

// ISAs that were compiled in and that this processor can run, slowest first.
std::vector<std::string> available_isas();
// The kernels of one ISA; "" takes the environment variable D3RT_CPU_ISA, or else the best. Throws
// InvalidArgument.
const Kernels& kernels_for(const std::string& isa = "");

}  // namespace d3rt::cpu
