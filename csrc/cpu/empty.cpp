// Kernels that do nothing, to measure all that is not kernels: barriers, dispatch, sampling, Python. Never
// chosen, only asked for by name (D3RT_CPU_ISA=empty, bench/test_overhead.py). The tokens they give are all
// 0.
#include "args.h"

namespace d3rt::cpu {
namespace {

template <class Args>
void nothing(const Args&, float*, int, const Worker&) {}

int64_t zero(const float*, int64_t) { return 0; }

}  // namespace

const Kernels kernels_empty = {"empty",
                               nothing<EmbedArgs>,
                               nothing<NormQkvRopeArgs>,
                               nothing<AttentionArgs>,
                               nothing<ProjAddArgs>,
                               nothing<NormGateUpArgs>,
                               nothing<KvFillArgs>,
                               nothing<KeepHiddenArgs>,
                               nothing<NormLogitsArgs>,
                               nothing<CopyHiddenArgs>,
                               nothing<HiddenCosineArgs>,
                               nothing<Top2MarginArgs>,
                               nothing<LinearArgs>,
                               nothing<UnpackArgs>,
                               zero};

}  // namespace d3rt::cpu
