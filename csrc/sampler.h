// Sampler: one token from one row of logits, greedy or drawn. Steps, in Hugging Face's order: repetition
// penalty, temperature, top_k, top_p, min_p, then a draw by inverse CDF over the kept tokens in token order.
// The definition is kernels/reference.py `sample`; the random number depends on (seed, step, slot) alone, so
// a seed means the same tokens on every backend, whatever else runs.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/args.h"
#include "errors.h"

namespace d3rt {

struct SamplingParams {
  bool do_sample = false;
  float temperature = 1.0f;
  int64_t top_k = 0;   // 0: off
  double top_p = 1.0;  // 1: off
  double min_p = 0.0;  // 0: off
  float repetition_penalty = 1.0f;
  uint64_t seed = 0;
};

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), key = seed,
// counter = (step, slot, 0, 0); the first two words give a double in [0, 1).
double philox_uniform(uint64_t seed, uint32_t step, uint32_t slot);

// What is thrown when there is no token to choose, on every backend: the logits hold NaN or nothing above
// -inf; or they are infinite once divided by the temperature.
NotFinite not_finite(int64_t slot, int64_t step);
NotFinite no_distribution(int64_t slot, int64_t step);

class Sampler {
 public:
  // seen[slot]: tokens that the repetition penalty counts as already used (the prompt).
  Sampler(const SamplingParams& params, int64_t vocab_size, std::vector<std::vector<int32_t>> seen,
          const cpu::Kernels& kernels);

  // logits [V] are changed by the repetition penalty. Throws NotFinite on NaN or when nothing is above -inf.
  int32_t sample(float* logits, int slot, int64_t step);

 private:
  int32_t draw(const float* logits, int slot, int64_t step);

  struct Candidate {
    float logit;
    int32_t token;
  };
  SamplingParams params_;
  int64_t vocab_size_;
  const cpu::Kernels& kernels_;
  std::vector<std::vector<int32_t>> seen_;
  std::vector<std::vector<bool>> is_seen_;
  std::vector<Candidate> candidates_;  // reused between steps
};

}  // namespace d3rt
