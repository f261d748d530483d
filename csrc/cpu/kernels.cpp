// The kernel table of one ISA. CMake compiles this file once per ISA, with that ISA's flags and
// -DD3RT_ISA=<name> -DD3RT_ISA_<name>; a new kernel is a header beside this file and a line here and in
// args.h.
#include "attention.h"
#include "confidence.h"
#include "embed.h"
#include "keep_hidden.h"
#include "kv_fill.h"
#include "linear.h"
#include "norm_gate_up.h"
#include "norm_logits.h"
#include "norm_qkv_rope.h"
#include "proj_add.h"
#include "unpack.h"

#define D3RT_JOIN_(a, b) a##b
#define D3RT_JOIN(a, b) D3RT_JOIN_(a, b)
#define D3RT_TEXT_(a) #a
#define D3RT_TEXT(a) D3RT_TEXT_(a)

namespace d3rt::cpu {

const Kernels D3RT_JOIN(kernels_, D3RT_ISA) = {
    D3RT_TEXT(D3RT_ISA),   D3RT_ISA::embed,        D3RT_ISA::norm_qkv_rope, D3RT_ISA::attention,
    D3RT_ISA::proj_add,    D3RT_ISA::norm_gate_up, D3RT_ISA::kv_fill,       D3RT_ISA::keep_hidden,
    D3RT_ISA::norm_logits, D3RT_ISA::copy_hidden,  D3RT_ISA::hidden_cosine, D3RT_ISA::top2_margin,
    D3RT_ISA::linear,      D3RT_ISA::unpack,       D3RT_ISA::argmax};

}  // namespace d3rt::cpu
