#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "errors.h"

namespace d3rt {

double philox_uniform(uint64_t seed, uint32_t step, uint32_t slot) {
  uint32_t counter[4] = {step, slot, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, counter);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  const uint64_t bits = (uint64_t{counter[0]} << 32) | counter[1];
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

NotFinite not_finite(int64_t slot, int64_t step) {
  return NotFinite("the logits of slot " + std::to_string(slot) + " at step " + std::to_string(step) +
                   " hold NaN or no finite value; the model or its K,V cache is broken");
}

NotFinite no_distribution(int64_t slot, int64_t step) {
  return NotFinite("the logits of slot " + std::to_string(slot) + " at step " + std::to_string(step) +
                   " are infinite once divided by the temperature, so they have no distribution to draw "
                   "from; do_sample=False takes the largest");
}

Sampler::Sampler(const SamplingParams& params, int64_t vocab_size, std::vector<std::vector<int32_t>> seen,
                 const cpu::Kernels& kernels)
    : params_(params), vocab_size_(vocab_size), kernels_(kernels), seen_(std::move(seen)) {
  if (params.do_sample && !(params.temperature > 0))
    throw InvalidArgument("temperature=" + std::to_string(params.temperature) + " must be above 0");
  for (auto& row : seen_) {
    std::sort(row.begin(), row.end());
    row.erase(std::unique(row.begin(), row.end()), row.end());
    is_seen_.emplace_back(static_cast<size_t>(vocab_size), false);
    for (int32_t token : row) {
      if (token < 0 || token >= vocab_size)
        throw InvalidArgument("seen token " + std::to_string(token) + " is not in 0.." +
                              std::to_string(vocab_size - 1));
      is_seen_.back()[static_cast<size_t>(token)] = true;
    }
  }
  if (params.do_sample) candidates_.reserve(static_cast<size_t>(vocab_size));
}

int32_t Sampler::sample(float* logits, int slot, int64_t step) {
  const bool penalise = params_.repetition_penalty != 1.0f;
  if (penalise) {  // CTRL (Keskar et al. 2019, arXiv 1909.05858), as HF applies it
    if (static_cast<size_t>(slot) >= seen_.size())
      throw InvalidArgument("a repetition penalty needs the tokens seen by slot " + std::to_string(slot));
    for (int32_t token : seen_[static_cast<size_t>(slot)]) {
      float& logit = logits[token];
      logit = logit < 0 ? logit * params_.repetition_penalty : logit / params_.repetition_penalty;
    }
  }
  const int64_t best = kernels_.argmax(logits, vocab_size_);
  if (best < 0) throw not_finite(slot, step);
  const int32_t token = params_.do_sample ? draw(logits, slot, step) : static_cast<int32_t>(best);
  if (penalise && !is_seen_[static_cast<size_t>(slot)][static_cast<size_t>(token)]) {
    is_seen_[static_cast<size_t>(slot)][static_cast<size_t>(token)] = true;
    seen_[static_cast<size_t>(slot)].push_back(token);
  }
  return token;
}

int32_t Sampler::draw(const float* logits, int slot, int64_t step) {
  // Larger logit first; of equal ones the larger token first, as in reference.py (HF's sort leaves it open).
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token > b.token;
  };
  candidates_.clear();
  for (int64_t token = 0; token < vocab_size_; ++token)
    if (logits[token] > -INFINITY)
      candidates_.push_back({logits[token] / params_.temperature, static_cast<int32_t>(token)});

  if (params_.top_k > 0 && static_cast<size_t>(params_.top_k) < candidates_.size()) {
    const auto kth = candidates_.begin() + (params_.top_k - 1);
    std::nth_element(candidates_.begin(), kth, candidates_.end(), before);
    const float threshold = kth->logit;  // ties with the k-th stay, as in HF
    candidates_.erase(
        std::remove_if(kth + 1, candidates_.end(), [&](const Candidate& c) { return c.logit < threshold; }),
        candidates_.end());
  }
  const float maximum =
      std::max_element(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) {
        return a.logit < b.logit;
      })->logit;
  if (!std::isfinite(maximum)) throw no_distribution(slot, step);
  const auto weight = [&](const Candidate& c) { return std::exp(static_cast<double>(c.logit) - maximum); };

  if (params_.top_p < 1.0) {
    // Keep the shortest prefix of the sorted candidates whose probability reaches top_p. Sorting only as many
    // as needed: the prefix is usually short and the vocabulary long.
    double total = 0;
    for (const Candidate& c : candidates_) total += weight(c);
    size_t sorted = 0, kept = candidates_.size();
    double cumulative = 0;
    bool enough = false;
    while (!enough && sorted < candidates_.size()) {
      const size_t until = std::min(candidates_.size(), std::max<size_t>(64, sorted * 8));
      const auto from = candidates_.begin() + static_cast<std::ptrdiff_t>(sorted);
      const auto to = candidates_.begin() + static_cast<std::ptrdiff_t>(until);
      if (to != candidates_.end()) std::nth_element(from, to, candidates_.end(), before);
      std::sort(from, to, before);
      for (; sorted < until; ++sorted) {
        cumulative += weight(candidates_[sorted]);
        if (cumulative / total >= params_.top_p) {
          kept = sorted + 1;
          enough = true;
          break;
        }
      }
    }
    candidates_.resize(kept);
  }
  if (params_.min_p > 0) {
    candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(),
                                     [&](const Candidate& c) { return weight(c) < params_.min_p; }),
                      candidates_.end());
  }
  const auto by_token = [](const Candidate& a, const Candidate& b) { return a.token < b.token; };
  if (!std::is_sorted(candidates_.begin(), candidates_.end(), by_token))
    std::sort(candidates_.begin(), candidates_.end(), by_token);
  double total = 0;
  for (const Candidate& c : candidates_) total += weight(c);
  const double target =
      philox_uniform(params_.seed, static_cast<uint32_t>(step), static_cast<uint32_t>(slot)) * total;
  double cumulative = 0;
  for (const Candidate& c : candidates_) {
    cumulative += weight(c);
    if (cumulative > target) return c.token;
  }
  return candidates_.back().token;  // the sum came out a rounding error short of the target
}

}  // namespace d3rt
