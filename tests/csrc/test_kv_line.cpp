// int8 lines of the K,V cache (cpu/kv_line.h), on every ISA that runs here: what is written is the definition
// of the very floats that a float32 cache gets, what is read is what the lines stand for, and nothing else is
// touched. Lines of d + 4 bytes begin at any address, odd ones too; AddressSanitizer sees the ends.
#include <cmath>

#include "check.h"
#include "cpu/isa.h"
#include "memory.h"
#include "tape.h"

namespace d3rt {
namespace {

constexpr double kEps = 0x1.0p-23;

struct Line {
  std::vector<int> codes;
  float scale;
};

Line line_at(const TensorView& cache, int64_t index, int64_t d) {
  const int8_t* at = cache.ptr<int8_t>() + index * (d + cpu::kLineScaleBytes);
  Line line{{at, at + d}, 0};
  std::memcpy(&line.scale, at + d, sizeof line.scale);
  return line;
}

void put_line(const TensorView& cache, int64_t index, int64_t d, const std::vector<int>& codes, float scale) {
  int8_t* at = cache.ptr<int8_t>() + index * (d + cpu::kLineScaleBytes);
  for (int64_t i = 0; i < d; ++i) at[i] = static_cast<int8_t>(codes[static_cast<size_t>(i)]);
  std::memcpy(at + d, &scale, sizeof scale);
}

bool is_poison(const TensorView& cache, int64_t index, int64_t d) {
  const int8_t* at = cache.ptr<int8_t>() + index * (d + cpu::kLineScaleBytes);
  return std::all_of(at, at + d + cpu::kLineScaleBytes, [](int8_t byte) { return byte == -1; });
}

template <class Body>
void for_each_isa(const Body& body) {
  for (const std::string& isa : cpu::available_isas())
    for (int threads : {1, 3}) body(cpu::kernels_for(isa), threads, isa + ", " + std::to_string(threads));
}

template <class Op>
void run(Memory& memory, const cpu::Kernels& kernels, int threads, const Op& op) {
  Tape tape(std::make_shared<ThreadPool>(threads), memory.arena, kernels);
  tape.record(op);
  tape.replay();
}

std::string text(std::initializer_list<int64_t> sizes) {
  std::string joined;
  for (int64_t size : sizes) joined += (joined.empty() ? "" : " ") + std::to_string(size);
  return joined;
}

// The line that `values` [d] of a float32 cache make; its other lines are poison in both.
void check_written(const TensorView& floats, const TensorView& lines, int64_t d) {
  const int64_t count = floats.numel() / d;
  for (int64_t index = 0; index < count; ++index) {
    const float* values = floats.ptr<float>() + index * d;
    if (std::isnan(values[0])) {
      CHECK(is_poison(lines, index, d));
      continue;
    }
    float largest = 0;
    for (int64_t i = 0; i < d; ++i) largest = std::max(largest, std::fabs(values[i]));
    const Line line = line_at(lines, index, d);
    CHECK_EQ(line.scale, largest / 127.0f);
    for (int64_t i = 0; i < d; ++i)
      CHECK_EQ(line.codes[static_cast<size_t>(i)],
               static_cast<int>(std::nearbyint(values[i] * (largest == 0 ? 0.0f : 127.0f / largest))));
  }
}

TEST(kv_line, "norm_qkv_rope and kv_fill write the codes and scales of the floats they would write") {
  struct Sizes {
    int64_t B, D, H, G, d, S;
  };
  const std::vector<Sizes> all = {{1, 3, 1, 1, 2, 1},   {3, 17, 3, 1, 6, 4}, {2, 33, 2, 2, 10, 3},
                                  {5, 20, 9, 3, 26, 2}, {16, 9, 4, 4, 2, 5}, {2, 40, 2, 1, 80, 7}};
  for_each_isa([&](const cpu::Kernels& kernels, int threads, const std::string& where) {
    for (const Sizes& s : all) {
      check::at(where + ", B D H G d S " + text({s.B, s.D, s.H, s.G, s.d, s.S}));
      Memory memory;
      const TensorView x = memory.random(DType::f32, {s.B, s.D}), norm = memory.random(DType::f32, {s.D});
      const TensorView wq = memory.random(DType::f32, {s.H * s.d, s.D}),
                       wk = memory.random(DType::f32, {s.G * s.d, s.D}),
                       wv = memory.random(DType::f32, {s.G * s.d, s.D});
      const TensorView cos = memory.random(DType::f32, {s.S, s.d / 2}),
                       sin = memory.random(DType::f32, {s.S, s.d / 2});
      std::vector<int32_t> positions;
      for (int64_t b = 0; b < s.B; ++b) positions.push_back(static_cast<int32_t>((s.S - 1 + b) % s.S));
      const TensorView pos = memory.ints(positions), q = memory.tensor(DType::f32, {s.B, s.H, s.d});
      for (bool fill : {false, true}) {
        const TensorView k = memory.tensor(DType::f32, {s.B, s.G, s.S, s.d}),
                         v = memory.tensor(DType::f32, {s.B, s.G, s.S, s.d});
        const int64_t line = s.d + cpu::kLineScaleBytes;
        const TensorView k8 = memory.tensor(DType::byte, {s.B, s.G, s.S, line}),
                         v8 = memory.tensor(DType::byte, {s.B, s.G, s.S, line});
        for (bool int8 : {false, true}) {
          const TensorView &to_k = int8 ? k8 : k, &to_v = int8 ? v8 : v;
          if (fill)
            run(memory, kernels, threads,
                KvFill{x, {{to_k, to_v, norm, wk, wv, {}, {}, {}}}, cos, sin, pos, 1e-5f});
          else
            run(memory, kernels, threads,
                NormQkvRope{q, to_k, to_v, x, norm, wq, wk, wv, {}, {}, {}, {}, {}, cos, sin, pos, 1e-5f});
        }
        check_written(k, k8, s.d);
        check_written(v, v8, s.d);
      }
    }
  });
}

TEST(kv_line, "values of any size: NaN and infinity show, what is next to nothing is zero") {
  for_each_isa([](const cpu::Kernels& kernels, int threads, const std::string& where) {
    for (float size : {0.0f, 1e-45f, 1e-38f, 1e-30f, 1.0f, 1e30f, 3e38f, kInfinity, -kInfinity, kNan}) {
      check::at(where + ", size " + std::to_string(size));
      Memory memory;
      const int64_t d = 6, line = d + cpu::kLineScaleBytes;
      const TensorView k = memory.tensor(DType::byte, {1, 1, 1, line}),
                       v = memory.tensor(DType::byte, {1, 1, 1, line});
      const TensorView x = memory.floats({0}, {1, 1}), norm = memory.floats({1}, {1});
      const TensorView w = memory.floats({1, 1, 1, 1, 1, 1}, {d, 1});
      const TensorView bk = memory.floats({0, 0, 0, 0, 0, 0}, {d}),
                       bv = memory.floats({size, 0, -size, 0, 0.5f * size, -0.25f * size}, {d});
      const TensorView cos = memory.floats({1, 1, 1}, {1, 3}), sin = memory.floats({0, 0, 0}, {1, 3});
      const TensorView pos = memory.ints({0});
      run(memory, kernels, threads, KvFill{x, {{k, v, norm, w, w, bk, bv, {}}}, cos, sin, pos, 1e-5f});
      const Line zero = line_at(k, 0, d), got = line_at(v, 0, d);
      CHECK(zero.scale == 0 && zero.codes == std::vector<int>(6, 0));
      if (!std::isfinite(size)) {
        CHECK(std::isnan(got.scale) && got.codes == std::vector<int>(6, 0));
      } else {
        CHECK_EQ(got.scale, size / 127.0f);
        const bool kept = size >= 1e-36f;  // 63.5 goes to 64, the even one; 31.75 to 32
        CHECK(got.codes == (kept ? std::vector<int>{127, 0, -127, 0, 64, -32} : std::vector<int>(6, 0)));
      }
    }
  });
}

TEST(kv_line, "attention reads what the lines of its window stand for, and no other") {
  struct Sizes {
    int64_t B, H, G, d, S, window;
  };
  const std::vector<Sizes> all = {
      {1, 1, 1, 1, 1, 0},    {2, 3, 1, 1, 70, 0},  {2, 4, 2, 2, 65, 0},   {1, 9, 3, 7, 130, 0},
      {3, 2, 1, 13, 64, 5},  {2, 9, 1, 31, 67, 0}, {1, 2, 2, 64, 129, 0}, {2, 16, 1, 67, 90, 33},
      {1, 3, 3, 127, 66, 0}, {2, 2, 1, 131, 9, 9},
  };
  for_each_isa([&](const cpu::Kernels& kernels, int threads, const std::string& where) {
    for (const Sizes& s : all) {
      check::at(where + ", B H G d S window " + text({s.B, s.H, s.G, s.d, s.S, s.window}));
      Memory memory;
      std::mt19937 random(7);
      std::uniform_int_distribution<int> code(-127, 127);
      std::uniform_real_distribution<float> scale(0.001f, 0.02f);
      const TensorView q = memory.random(DType::f32, {s.B, s.H, s.d});
      const TensorView out = memory.tensor(DType::f32, {s.B, s.H, s.d});
      const int64_t line = s.d + cpu::kLineScaleBytes;
      const TensorView k = memory.tensor(DType::byte, {s.B, s.G, s.S, line}),
                       v = memory.tensor(DType::byte, {s.B, s.G, s.S, line});  // poison throughout
      std::vector<int32_t> last;
      for (int64_t b = 0; b < s.B; ++b) last.push_back(static_cast<int32_t>(b % 2 ? s.S / 2 : s.S - 1));
      const auto first_of = [&](int64_t b) {
        const int64_t length = last[static_cast<size_t>(b)] + 1;
        return s.window > 0 && length > s.window ? length - s.window : 0;
      };
      for (int64_t b = 0; b < s.B; ++b)
        for (int64_t g = 0; g < s.G; ++g)
          for (int64_t p = first_of(b); p <= last[static_cast<size_t>(b)]; ++p)
            for (const TensorView& cache : {k, v}) {
              std::vector<int> codes;
              for (int64_t i = 0; i < s.d; ++i) codes.push_back(code(random));
              put_line(cache, (b * s.G + g) * s.S + p, s.d, codes, scale(random));
            }
      const float factor = 1 / std::sqrt(static_cast<float>(s.d));
      const std::vector<int8_t> before(k.ptr<int8_t>(), k.ptr<int8_t>() + k.numel());
      run(memory, kernels, threads, Attention{out, q, k, v, memory.ints(last), factor, s.window});
      CHECK(std::equal(before.begin(), before.end(), k.ptr<int8_t>()));
      for (int64_t b = 0; b < s.B; ++b)
        for (int64_t h = 0; h < s.H; ++h) {
          const int64_t g = h / (s.H / s.G), from = first_of(b), to = last[static_cast<size_t>(b)];
          std::vector<double> scores, sums(static_cast<size_t>(s.d)), sizes(static_cast<size_t>(s.d));
          double total = 0, score_size = 0;
          for (int64_t p = from; p <= to; ++p) {
            const Line key = line_at(k, (b * s.G + g) * s.S + p, s.d);
            double score = 0, size = 0;
            for (int64_t i = 0; i < s.d; ++i) {
              const double term = get(q, (b * s.H + h) * s.d + i) * key.codes[static_cast<size_t>(i)] *
                                  static_cast<double>(key.scale) * factor;
              score += term, size += std::fabs(term);
            }
            scores.push_back(score);
            score_size = std::max(score_size, size);
          }
          for (double score : scores) total += std::exp(score);  // small: no maximum to take off
          for (int64_t p = from; p <= to; ++p) {
            const Line value = line_at(v, (b * s.G + g) * s.S + p, s.d);
            const double weight = std::exp(scores[static_cast<size_t>(p - from)]) / total;
            for (size_t i = 0; i < sums.size(); ++i) {
              const double term = weight * value.codes[i] * static_cast<double>(value.scale);
              sums[i] += term, sizes[i] += std::fabs(term);
            }
          }
          // As in test_ops.cpp: sums of n roundings, and an error of a score changes its weight by as much.
          const double roundings = 2 * (8 + std::sqrt(static_cast<double>(to - from + 1))) +
                                   2 * (8 + std::sqrt(static_cast<double>(s.d))) * score_size;
          for (int64_t i = 0; i < s.d; ++i)
            CHECK_NEAR(get(out, (b * s.H + h) * s.d + i), sums[static_cast<size_t>(i)],
                       roundings * kEps * sizes[static_cast<size_t>(i)]);
        }
    }
  });
}

TEST(kv_line, "a poisoned line that is read comes out as NaN") {
  for_each_isa([](const cpu::Kernels& kernels, int threads, const std::string& where) {
    const int64_t H = 3, d = 5, S = 130, line = d + cpu::kLineScaleBytes;
    for (int32_t last : {0, 5, 64, 129})
      for (int32_t bad : {0, 4, 63, 64, 128})
        for (bool in_key : {true, false}) {
          if (bad > last) continue;
          check::at(where + ", last bad in_key " + text({last, bad, in_key}));
          Memory memory;
          const TensorView q = memory.random(DType::f32, {1, H, d}),
                           out = memory.tensor(DType::f32, {1, H, d});
          const TensorView k = memory.tensor(DType::byte, {1, 1, S, line}),
                           v = memory.tensor(DType::byte, {1, 1, S, line});
          for (int64_t p = 0; p <= last; ++p) {
            if (!in_key || p != bad) put_line(k, p, d, {1, -2, 3, -4, 5}, 0.1f);
            if (in_key || p != bad) put_line(v, p, d, {1, -2, 3, -4, 5}, 0.1f);
          }
          run(memory, kernels, threads, Attention{out, q, k, v, memory.ints({last}), 1.0f, 0});
          for (int64_t i = 0; i < H * d; ++i) CHECK(std::isnan(get(out, i)));
        }
  });
}

TEST(kv_line, "a cache whose lines have no room for the scale is refused") {
  Memory memory;
  const TensorView q = memory.tensor(DType::f32, {1, 2, 6}), out = memory.tensor(DType::f32, {1, 2, 6});
  const TensorView k = memory.tensor(DType::byte, {1, 1, 3, 6}), v = memory.tensor(DType::byte, {1, 1, 3, 6});
  const cpu::Kernels& kernels = cpu::kernels_for(cpu::available_isas().front());
  CHECK_THROWS(InvalidArgument, "must be int8 [1, 1, 3, 10]",
               run(memory, kernels, 1, Attention{out, q, k, v, memory.ints({0}), 1.0f, 0}));
}

}  // namespace
}  // namespace d3rt
