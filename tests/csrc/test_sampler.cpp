// Sampler: the random numbers, the cuts at their edges, the penalty, and what is refused. That the draws
// follow the distribution, and equal Hugging Face's, is tested in Python.
#include <cmath>
#include <set>

#include "check.h"
#include "cpu/isa.h"
#include "errors.h"
#include "memory.h"
#include "sampler.h"

namespace d3rt {
namespace {

using Logits = std::vector<float>;

SamplingParams drawing(uint64_t seed = 0) {
  SamplingParams params;
  params.do_sample = true;
  params.seed = seed;
  return params;
}

// Which tokens can come out at all: those that 400 draws from nearly level logits give.
std::set<int32_t> reachable(const SamplingParams& params, const Logits& logits) {
  std::set<int32_t> tokens;
  Sampler sampler(params, static_cast<int64_t>(logits.size()), {}, cpu::kernels_for());
  for (int64_t step = 0; step < 400; ++step) {
    Logits row = logits;
    tokens.insert(sampler.sample(row.data(), 0, step));
  }
  return tokens;
}

using Tokens = std::set<int32_t>;

TEST(sampler, "philox gives the published first block") {
  // Random123's kat_vectors: philox4x32-10, counter 0, key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
  const uint64_t words = 0x6627e8d5e169c58d;
  CHECK_EQ(philox_uniform(0, 0, 0), static_cast<double>(words >> 11) * 0x1.0p-53);
}

TEST(sampler, "random numbers differ by seed, step and slot, and lie in [0, 1)") {
  std::set<double> seen;
  int count = 0;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32, ~uint64_t{0}})
    for (uint32_t step : {0u, 1u, 2u, 1000u, ~0u})
      for (uint32_t slot : {0u, 1u, 15u}) {
        const double value = philox_uniform(seed, step, slot);
        CHECK(value >= 0 && value < 1);
        seen.insert(value);
        ++count;
      }
  CHECK_EQ(static_cast<int>(seen.size()), count);
}

TEST(sampler, "greedy takes the lowest index of the maximum") {
  for (const std::string& isa : cpu::available_isas()) {
    Sampler sampler({}, 5, {}, cpu::kernels_for(isa));
    Logits row = {1, 3, -kInfinity, 3, 2};
    CHECK_EQ(sampler.sample(row.data(), 0, 0), 1);
  }
}

TEST(sampler, "NaN and all -inf are refused with slot and step") {
  for (const SamplingParams& params : {SamplingParams{}, drawing()}) {
    Sampler sampler(params, 3, {}, cpu::kernels_for());
    Logits nan = {1, kNan, 2}, none = {-kInfinity, -kInfinity, -kInfinity};
    CHECK_THROWS(NotFinite, "slot 2 at step 7", sampler.sample(nan.data(), 2, 7));
    CHECK_THROWS(NotFinite, "slot 0 at step 0", sampler.sample(none.data(), 0, 0));
    Logits good = {-kInfinity, 4, -kInfinity};
    CHECK_EQ(sampler.sample(good.data(), 0, 0), 1);
  }
}

TEST(sampler, "+inf has no distribution: refused when drawing, also when a tiny temperature makes it") {
  Logits row = {0, kInfinity, 1};
  CHECK_THROWS(NotFinite, "slot 0", Sampler(drawing(), 3, {}, cpu::kernels_for()).sample(row.data(), 0, 0));
  SamplingParams params = drawing();
  params.temperature = 1e-38f;
  row = {0, 30, 20};
  CHECK_THROWS(NotFinite, "slot 0", Sampler(params, 3, {}, cpu::kernels_for()).sample(row.data(), 0, 0));
}

TEST(sampler, "top_k keeps k tokens, and those level with the last") {
  const Logits logits = {1, 2, 3, 2, 0};
  SamplingParams params = drawing();
  for (int64_t k : {0, 5, 6, 1000}) {
    params.top_k = k;
    CHECK(reachable(params, logits) == (Tokens{0, 1, 2, 3, 4}));
  }
  params.top_k = 1;
  CHECK(reachable(params, logits) == Tokens{2});
  for (int64_t k : {2, 3}) {
    params.top_k = k;
    CHECK(reachable(params, logits) == (Tokens{1, 2, 3}));
  }
  params.top_k = 4;
  CHECK(reachable(params, logits) == (Tokens{0, 1, 2, 3}));
  params.top_k = 2;  // fewer tokens above -inf than k
  CHECK(reachable(params, {-kInfinity, 5, -kInfinity}) == Tokens{1});
}

TEST(sampler, "top_p keeps the shortest prefix that reaches p, and always one token") {
  const float ln = std::log(2.0f);
  const Logits logits = {0, 2 * ln, ln, 0};  // probabilities 1/8, 1/2, 1/4, 1/8
  SamplingParams params = drawing();
  params.top_p = 0.3;
  CHECK(reachable(params, logits) == Tokens{1});
  params.top_p = 0.6;
  CHECK(reachable(params, logits) == (Tokens{1, 2}));
  params.top_p = 0.8;  // of the two level ones the larger stays
  CHECK(reachable(params, logits) == (Tokens{1, 2, 3}));
  params.top_p = 0.95;
  CHECK(reachable(params, logits) == (Tokens{0, 1, 2, 3}));
  params.top_p = 1e-6;
  CHECK(reachable(params, logits) == Tokens{1});
  params.top_p = 0.5;  // reached exactly: no token more
  CHECK(reachable(params, {0, 0, 0, 0}) == (Tokens{2, 3}));
  // Over many tokens: the prefix is longer than the first piece that gets sorted
  const Logits level(1000, 0.25f);
  Tokens upper;
  for (int32_t token : reachable(params, level)) {
    CHECK(token >= 500);
    upper.insert(token);
  }
  CHECK(upper.size() > 200);
}

TEST(sampler, "min_p keeps what has p of the largest probability") {
  const float ln = std::log(2.0f);
  const Logits logits = {0, 2 * ln, ln, -kInfinity};  // 1/4, 1 and 1/2 of the largest
  SamplingParams params = drawing();
  params.min_p = 0.2;
  CHECK(reachable(params, logits) == (Tokens{0, 1, 2}));
  params.min_p = 0.3;
  CHECK(reachable(params, logits) == (Tokens{1, 2}));
  params.min_p = 1.0;
  CHECK(reachable(params, logits) == Tokens{1});
}

TEST(sampler, "the cuts come one after the other: top_k, top_p, min_p") {
  // 1/2, 1/4, 1/8, 1/8. top_k=2 leaves 2/3, 1/3; top_p=0.6 of those keeps the first, of all four it would
  // keep two.
  const float ln = std::log(2.0f);
  SamplingParams params = drawing();
  params.top_k = 2;
  params.top_p = 0.6;
  CHECK(reachable(params, {2 * ln, ln, 0, 0}) == Tokens{0});
  params.top_p = 0.7;
  params.min_p = 0.6;
  CHECK(reachable(params, {2 * ln, ln, 0, 0}) == Tokens{0});
}

TEST(sampler, "the penalty pulls seen tokens down, each once, and what is drawn counts as seen") {
  SamplingParams params;
  params.repetition_penalty = 2;
  Sampler sampler(params, 4, {{1, 1, 1}, {3}}, cpu::kernels_for());
  Logits row = {3, 5, -1, 1};
  CHECK_EQ(sampler.sample(row.data(), 0, 0), 0);  // 5 / 2 < 3
  CHECK_EQ(row[1], 2.5f);
  row = {3, 5, -1, 1};
  CHECK_EQ(sampler.sample(row.data(), 0, 1), 1);  // 0 is seen now: 1.5 < 2.5
  row = {3, 5, -1, 1};
  CHECK_EQ(sampler.sample(row.data(), 1, 1), 1);  // the other slot has its own
  Sampler negative(params, 2, {{0}}, cpu::kernels_for());
  row = {-1, -1.5f};
  CHECK_EQ(negative.sample(row.data(), 0, 0), 1);  // -1 * 2 < -1.5
}

TEST(sampler, "the same seed draws the same tokens, another one others") {
  const Logits level(64, 0.0f);
  std::vector<std::vector<int32_t>> drawn;
  for (uint64_t seed : {5, 5, 6}) {
    Sampler sampler(drawing(seed), 64, {}, cpu::kernels_for());
    drawn.emplace_back();
    for (int64_t step = 0; step < 50; ++step) {
      Logits row = level;
      drawn.back().push_back(sampler.sample(row.data(), 0, step));
    }
  }
  CHECK(drawn[0] == drawn[1]);
  CHECK(drawn[0] != drawn[2]);
}

TEST(sampler, "bad parameters are refused by value") {
  SamplingParams params = drawing();
  for (float temperature : {0.0f, -1.0f, kNan}) {
    params.temperature = temperature;
    CHECK_THROWS(InvalidArgument, "temperature=", Sampler(params, 3, {}, cpu::kernels_for()));
  }
  CHECK_THROWS(InvalidArgument, "seen token 3 is not in 0..2", Sampler({}, 3, {{0, 3}}, cpu::kernels_for()));
  CHECK_THROWS(InvalidArgument, "seen token -1", Sampler({}, 3, {{-1}}, cpu::kernels_for()));
  params = {};
  params.repetition_penalty = 1.5f;
  Sampler sampler(params, 3, {{0}}, cpu::kernels_for());
  Logits row = {1, 2, 3};
  CHECK_THROWS(InvalidArgument, "slot 1", sampler.sample(row.data(), 1, 0));
}

}  // namespace
}  // namespace d3rt
