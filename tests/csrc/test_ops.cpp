// Every op, on every ISA that runs here, against plain loops in double precision.
//
// How close is close enough is computed beside the value: each number carries a bound on the rounding error
// of a float32 evaluation. A sum of n products in any order is off by about sqrt(n) eps times the sum of
// their absolute values (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis"); 8 is
// for the constant and for the few roundings around a sum.
#include <cmath>

#include "check.h"
#include "cpu/isa.h"
#include "memory.h"
#include "tape.h"

namespace d3rt {
namespace {

constexpr double kEps = 0x1.0p-23;
constexpr double kBf16Rounding = 0x1.0p-8;  // half a unit in the last place of 8 significant bits
constexpr float kNormEps = 1e-5f;

double sum_error(int64_t n) { return (8 + std::sqrt(static_cast<double>(n))) * kEps; }

// A value and how far from it a float32 evaluation may be.
struct Bounded {
  double value = 0, error = 0;
};
using Row = std::vector<Bounded>;

Row row_of(const TensorView& view, int64_t offset, int64_t n) {
  Row row;
  for (int64_t i = 0; i < n; ++i) row.push_back({get(view, offset + i), 0});
  return row;
}

Row rms_norm(const Row& x, const TensorView& weight) {
  const double n = static_cast<double>(x.size());
  double squares = 0, drift = 0;
  for (const Bounded& v : x) squares += v.value * v.value, drift += std::fabs(v.value) * v.error;
  const double inverse = 1 / std::sqrt(squares / n + kNormEps);
  const double relative = (squares > 0 ? drift / squares : 0) + sum_error(static_cast<int64_t>(x.size()));
  Row out;
  for (size_t i = 0; i < x.size(); ++i) {
    const double w = get(weight, static_cast<int64_t>(i)), value = x[i].value * inverse * w;
    out.push_back({value, std::fabs(w) * inverse * x[i].error + std::fabs(value) * relative});
  }
  return out;
}

Bounded dot(const TensorView& w, int64_t row, const Row& x, const TensorView& bias) {
  Bounded sum;
  double magnitude = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double weight = get(w, row * w.strides[0] + static_cast<int64_t>(i));
    sum.value += weight * x[i].value;
    sum.error += std::fabs(weight) * x[i].error;
    magnitude += std::fabs(weight * x[i].value);
  }
  if (bias) {
    sum.value += get(bias, row);
    magnitude += std::fabs(get(bias, row));
  }
  sum.error += sum_error(static_cast<int64_t>(x.size())) * magnitude;
  return sum;
}

Row rotate(const Row& x, const TensorView& cos, const TensorView& sin, int64_t pos) {
  const size_t half = x.size() / 2;
  Row out(x.size());
  for (size_t j = 0; j < half; ++j) {
    const int64_t at = pos * static_cast<int64_t>(half) + static_cast<int64_t>(j);
    const double c = get(cos, at), s = get(sin, at);
    const Bounded &a = x[j], &b = x[j + half];
    const double magnitude =
        std::fabs(a.value * c) + std::fabs(b.value * s) + std::fabs(b.value * c) + std::fabs(a.value * s);
    const double error = (a.error + b.error) * (std::fabs(c) + std::fabs(s)) + 4 * kEps * magnitude;
    out[j] = {a.value * c - b.value * s, error};
    out[j + half] = {b.value * c + a.value * s, error};
  }
  return out;
}

void check_close(const TensorView& got, int64_t offset, const Bounded& expected) {
  const double rounding = got.dtype == DType::bf16 ? kBf16Rounding * std::fabs(expected.value) : 0;
  CHECK_NEAR(get(got, offset), expected.value, expected.error + rounding);
}

std::vector<uint8_t> bytes_of(const TensorView& view) {
  const auto* begin = view.ptr<uint8_t>();
  return {begin, begin + view.span_bytes()};
}

// Where a test runs: one ISA, one number of threads, one dtype of weights and cache.
struct Setting {
  const cpu::Kernels& kernels;
  int threads;
  DType dtype;

  // There what meets a weight matrix is rounded to bfloat16.
  bool rounds() const { return dtype == DType::bf16 && std::string(kernels.isa) == "avx512_bf16"; }
  Row multiplied(Row x) const {
    for (Bounded& v : x) v.error += rounds() ? kBf16Rounding * std::fabs(v.value) : 0;
    return x;
  }

  template <class Op>
  void run(Memory& memory, const Op& op) const {
    Tape tape(std::make_shared<ThreadPool>(threads), memory.arena, kernels);
    tape.record(op);
    tape.replay();
  }
};

template <class Body>
void for_each_setting(const Body& body) {
  for (const std::string& isa : cpu::available_isas())
    for (int threads : {1, 3})
      for (DType dtype : {DType::f32, DType::bf16}) {
        const std::string where = isa + ", " + std::to_string(threads) + " threads, " + dtype_name(dtype);
        check::at(where);
        body(Setting{cpu::kernels_for(isa), threads, dtype}, where);
      }
}

std::string text(std::initializer_list<int64_t> sizes) {
  std::string joined;
  for (int64_t size : sizes) joined += (joined.empty() ? "" : " ") + std::to_string(size);
  return joined;
}

TEST(ops, "embed copies the row of each token") {
  for_each_setting([](const Setting& setting, const std::string& where) {
    for (int64_t D : {1, 3, 16, 67})
      for (int64_t gap : {0, 5}) {
        check::at(where + ", D gap " + text({D, gap}));
        Memory memory;
        const int64_t V = 9;
        const TensorView table = memory.random(setting.dtype, {V, D}, 1, 0, gap);
        const TensorView token = memory.ints({8, 0, 4}), x = memory.tensor(DType::f32, {3, D});
        setting.run(memory, Embed{x, token, table});
        for (int64_t b = 0; b < 3; ++b)
          for (int64_t i = 0; i < D; ++i)
            CHECK_EQ(get(x, b * D + i), get(table, token.ptr<int32_t>()[b] * (D + gap) + i));
      }
  });
}

struct QkvSizes {
  int64_t B, D, H, G, d, S;
  bool bias, head_norm;
  int64_t gap;
};

// K,V of one layer, made and checked alike for norm_qkv_rope and kv_fill.
struct KvLayer {
  TensorView k_cache, v_cache, norm, wk, wv, bk, bv, k_norm;

  KvLayer(Memory& memory, DType dtype, const QkvSizes& s) {
    const float scale = 1 / std::sqrt(static_cast<float>(s.D));
    k_cache = memory.tensor(dtype, {s.B, s.G, s.S, s.d});
    v_cache = memory.tensor(dtype, {s.B, s.G, s.S, s.d});
    norm = memory.random(DType::f32, {s.D}, 0.1f, 1);
    wk = memory.random(dtype, {s.G * s.d, s.D}, scale, 0, s.gap);
    wv = memory.random(dtype, {s.G * s.d, s.D}, scale, 0, s.gap);
    if (s.bias) bk = memory.random(DType::f32, {s.G * s.d}), bv = memory.random(DType::f32, {s.G * s.d});
    if (s.head_norm) k_norm = memory.random(DType::f32, {s.d}, 0.1f, 1);
  }

  void check(const Setting& setting, const QkvSizes& s, const TensorView& x, const TensorView& cos,
             const TensorView& sin, const TensorView& pos) const {
    for (int64_t b = 0; b < s.B; ++b) {
      const Row n = setting.multiplied(rms_norm(row_of(x, b * s.D, s.D), norm));
      for (int64_t g = 0; g < s.G; ++g) {
        Row key, value;
        for (int64_t i = 0; i < s.d; ++i) {
          key.push_back(dot(wk, g * s.d + i, n, bk));
          value.push_back(dot(wv, g * s.d + i, n, bv));
        }
        if (k_norm) key = rms_norm(key, k_norm);
        const int64_t at = pos.ptr<int32_t>()[b];
        key = rotate(key, cos, sin, at);
        for (int64_t p = 0; p < s.S; ++p)
          for (int64_t i = 0; i < s.d; ++i) {
            const int64_t offset = ((b * s.G + g) * s.S + p) * s.d + i;
            if (p == at) {
              check_close(k_cache, offset, key[static_cast<size_t>(i)]);
              check_close(v_cache, offset, value[static_cast<size_t>(i)]);
            } else {  // every other line still holds the poison
              CHECK(std::isnan(get(k_cache, offset)) && std::isnan(get(v_cache, offset)));
            }
          }
      }
    }
  }
};

const std::vector<QkvSizes>& qkv_sizes() {
  static const std::vector<QkvSizes> all = {
      {1, 1, 1, 1, 2, 1, false, false, 0},    {1, 67, 3, 1, 6, 3, true, false, 0},
      {2, 33, 2, 2, 10, 4, false, true, 0},   {3, 16, 9, 3, 8, 5, true, true, 3},
      {5, 130, 2, 1, 80, 2, false, false, 0}, {7, 45, 9, 1, 4, 3, false, false, 1},
      {16, 31, 16, 1, 2, 3, true, true, 0},
  };
  return all;
}

std::string describe(const QkvSizes& s) {
  return "B D H G d S bias head_norm gap " + text({s.B, s.D, s.H, s.G, s.d, s.S, s.bias, s.head_norm, s.gap});
}

// Slot b stands at the last position, or the first, or between.
TensorView spread(Memory& memory, int64_t B, int64_t S) {
  std::vector<int32_t> positions;
  for (int64_t b = 0; b < B; ++b)
    positions.push_back(static_cast<int32_t>((S - 1) * (b % 3 == 0) + b % S * (b % 3 == 2)));
  return memory.ints(positions);
}

TEST(ops, "norm_qkv_rope writes q, and K,V at pos alone") {
  for_each_setting([](const Setting& setting, const std::string& where) {
    for (const QkvSizes& s : qkv_sizes()) {
      check::at(where + ", " + describe(s));
      Memory memory;
      const KvLayer layer(memory, setting.dtype, s);
      const TensorView x = memory.random(DType::f32, {s.B, s.D}),
                       q = memory.tensor(DType::f32, {s.B, s.H, s.d});
      const float scale = 1 / std::sqrt(static_cast<float>(s.D));
      const TensorView wq = memory.random(setting.dtype, {s.H * s.d, s.D}, scale, 0, s.gap);
      TensorView bq, q_norm;
      if (s.bias) bq = memory.random(DType::f32, {s.H * s.d});
      if (s.head_norm) q_norm = memory.random(DType::f32, {s.d}, 0.1f, 1);
      const TensorView cos = memory.random(DType::f32, {s.S, s.d / 2}),
                       sin = memory.random(DType::f32, {s.S, s.d / 2});
      const TensorView pos = spread(memory, s.B, s.S);
      setting.run(memory, NormQkvRope{q, layer.k_cache, layer.v_cache, x, layer.norm, wq, layer.wk, layer.wv,
                                      bq, layer.bk, layer.bv, q_norm, layer.k_norm, cos, sin, pos, kNormEps});
      layer.check(setting, s, x, cos, sin, pos);
      for (int64_t b = 0; b < s.B; ++b) {
        const Row n = setting.multiplied(rms_norm(row_of(x, b * s.D, s.D), layer.norm));
        for (int64_t h = 0; h < s.H; ++h) {
          Row query;
          for (int64_t i = 0; i < s.d; ++i) query.push_back(dot(wq, h * s.d + i, n, bq));
          if (q_norm) query = rms_norm(query, q_norm);
          query = rotate(query, cos, sin, pos.ptr<int32_t>()[b]);
          for (int64_t i = 0; i < s.d; ++i)
            check_close(q, (b * s.H + h) * s.d + i, query[static_cast<size_t>(i)]);
        }
      }
    }
  });
}

TEST(ops, "kv_fill writes K,V of every layer at pos alone") {
  for_each_setting([](const Setting& setting, const std::string& where) {
    for (const QkvSizes& s : qkv_sizes())
      for (int layers : {1, 3}) {
        check::at(where + ", layers " + std::to_string(layers) + ", " + describe(s));
        Memory memory;
        std::vector<KvLayer> filled;
        KvFill op;
        for (int i = 0; i < layers; ++i) {
          filled.emplace_back(memory, setting.dtype, s);
          const KvLayer& l = filled.back();
          op.layers.push_back({l.k_cache, l.v_cache, l.norm, l.wk, l.wv, l.bk, l.bv, l.k_norm});
        }
        op.x = memory.random(DType::f32, {s.B, s.D});
        op.cos = memory.random(DType::f32, {s.S, s.d / 2});
        op.sin = memory.random(DType::f32, {s.S, s.d / 2});
        op.pos = spread(memory, s.B, s.S);
        op.eps = kNormEps;
        setting.run(memory, op);
        for (const KvLayer& layer : filled) layer.check(setting, s, op.x, op.cos, op.sin, op.pos);
      }
  });
}

TEST(ops, "attention reads the positions of its window and no other") {
  struct Sizes {
    int64_t B, H, G, d, S, window;
  };
  const std::vector<Sizes> all = {
      {1, 1, 1, 2, 1, 0},     {1, 3, 1, 6, 64, 0},   {1, 2, 2, 16, 65, 0},  {3, 9, 3, 10, 150, 0},
      {2, 9, 1, 80, 70, 0},   {2, 16, 1, 7, 130, 0}, {3, 2, 1, 64, 200, 1}, {3, 3, 3, 5, 90, 17},
      {2, 4, 2, 33, 200, 80}, {16, 2, 1, 4, 20, 20}, {2, 7, 1, 32, 260, 0}, {1, 10, 2, 96, 129, 0},
  };
  for_each_setting([&](const Setting& setting, const std::string& where) {
    for (const Sizes& s : all) {
      check::at(where + ", B H G d S window " + text({s.B, s.H, s.G, s.d, s.S, s.window}));
      Memory memory;
      const TensorView q = memory.random(DType::f32, {s.B, s.H, s.d});
      const TensorView out = memory.tensor(DType::f32, {s.B, s.H, s.d});
      const TensorView k = memory.random(setting.dtype, {s.B, s.G, s.S, s.d});
      const TensorView v = memory.random(setting.dtype, {s.B, s.G, s.S, s.d});
      const TensorView pos = spread(memory, s.B, s.S);
      const auto first_of = [&](int64_t b) {
        const int64_t length = pos.ptr<int32_t>()[b] + 1;
        return s.window > 0 && length > s.window ? length - s.window : 0;
      };
      for (int64_t b = 0; b < s.B; ++b)  // NaN wherever nothing may be read
        for (int64_t p = 0; p < s.S; ++p)
          if (p < first_of(b) || p > pos.ptr<int32_t>()[b])
            for (int64_t g = 0; g < s.G; ++g)
              for (int64_t i = 0; i < s.d; ++i) {
                const int64_t offset = ((b * s.G + g) * s.S + p) * s.d + i;
                set(k, offset, kNan), set(v, offset, kNan);
              }
      const float scale = 1 / std::sqrt(static_cast<float>(s.d));
      const std::vector<uint8_t> k_before = bytes_of(k), v_before = bytes_of(v);
      setting.run(memory, Attention{out, q, k, v, pos, scale, s.window});
      CHECK(bytes_of(k) == k_before && bytes_of(v) == v_before);

      // There q and the weights are rounded to bfloat16.
      const bool rounds = setting.rounds() && s.d % 32 == 0;
      TensorView multiplied = q;
      if (rounds) {
        multiplied = memory.tensor(DType::bf16, {s.B, s.H, s.d});
        for (int64_t i = 0; i < q.numel(); ++i) set(multiplied, i, get(q, i));
      }
      for (int64_t b = 0; b < s.B; ++b)
        for (int64_t h = 0; h < s.H; ++h) {
          const int64_t g = h / (s.H / s.G), from = first_of(b), to = pos.ptr<int32_t>()[b];
          std::vector<double> scores;
          double score_error = 0, maximum = -INFINITY;
          for (int64_t p = from; p <= to; ++p) {
            double score = 0, magnitude = 0;
            for (int64_t i = 0; i < s.d; ++i) {
              const double term = get(multiplied, (b * s.H + h) * s.d + i) *
                                  get(k, ((b * s.G + g) * s.S + p) * s.d + i) * scale;
              score += term, magnitude += std::fabs(term);
            }
            scores.push_back(score);
            score_error = std::max(score_error, sum_error(s.d) * magnitude);
            maximum = std::max(maximum, score);
          }
          double total = 0;
          for (double score : scores) total += std::exp(score - maximum);
          for (int64_t i = 0; i < s.d; ++i) {
            Bounded expected;
            double magnitude = 0;
            for (int64_t p = from; p <= to; ++p) {
              const double weight = std::exp(scores[static_cast<size_t>(p - from)] - maximum) / total;
              const double term = weight * get(v, ((b * s.G + g) * s.S + p) * s.d + i);
              expected.value += term, magnitude += std::fabs(term);
            }
            // An error e of the scores changes each weight by up to e, and their sum by as much.
            expected.error = magnitude * (2 * score_error + 2 * sum_error(to - from + 1));
            if (rounds) expected.error += magnitude * kBf16Rounding;
            check_close(out, (b * s.H + h) * s.d + i, expected);
          }
        }
    }
  });
}

struct MatrixSizes {
  int64_t B, rows, columns;
  bool bias;
  int64_t gap;
};

const std::vector<MatrixSizes>& matrix_sizes() {
  static const std::vector<MatrixSizes> all = {
      {1, 1, 1, false, 0},     {1, 7, 67, true, 0},    {2, 6, 66, false, 0},    {3, 65, 130, true, 0},
      {4, 129, 33, false, 5},  {5, 19, 129, false, 0}, {8, 5, 31, true, 1},     {15, 9, 4, false, 0},
      {16, 12, 77, true, 3},   {1, 3, 5003, false, 0}, {6, 301, 40, false, 0},  {1, 21, 3136, true, 0},
      {1, 10, 4160, false, 5}, {8, 19, 1605, true, 0}, {3, 33, 3200, false, 1}, {11, 17, 1664, false, 0},
  };
  return all;
}

std::string describe(const MatrixSizes& s) {
  return "B rows columns bias gap " + text({s.B, s.rows, s.columns, s.bias, s.gap});
}

TEST(ops, "proj_add adds the product to x") {
  for_each_setting([](const Setting& setting, const std::string& where) {
    for (const MatrixSizes& s : matrix_sizes()) {
      check::at(where + ", " + describe(s));
      Memory memory;
      const TensorView x = memory.random(DType::f32, {s.B, s.rows}),
                       a = memory.random(DType::f32, {s.B, s.columns});
      const TensorView w = memory.random(setting.dtype, {s.rows, s.columns}, 1, 0, s.gap);
      TensorView bias;
      if (s.bias) bias = memory.random(DType::f32, {s.rows});
      const Row before = row_of(x, 0, s.B * s.rows);
      setting.run(memory, ProjAdd{x, a, w, bias});
      for (int64_t b = 0; b < s.B; ++b)
        for (int64_t row = 0; row < s.rows; ++row) {
          const int64_t offset = b * s.rows + row;
          Bounded expected = dot(w, row, setting.multiplied(row_of(a, b * s.columns, s.columns)), bias);
          expected.value += before[static_cast<size_t>(offset)].value;
          expected.error += 2 * kEps * std::fabs(before[static_cast<size_t>(offset)].value);
          check_close(x, offset, expected);
        }
    }
  });
}

TEST(ops, "norm_gate_up is silu(gate) * up of the normed x") {
  for_each_setting([](const Setting& setting, const std::string& where) {
    for (const MatrixSizes& s : matrix_sizes()) {
      check::at(where + ", " + describe(s));
      Memory memory;
      const float scale = 2 / std::sqrt(static_cast<float>(s.columns));
      const TensorView h = memory.tensor(DType::f32, {s.B, s.rows}),
                       x = memory.random(DType::f32, {s.B, s.columns});
      const TensorView norm = memory.random(DType::f32, {s.columns}, 0.1f, 1);
      const TensorView gate = memory.random(setting.dtype, {s.rows, s.columns}, scale, 0, s.gap);
      const TensorView up = memory.random(setting.dtype, {s.rows, s.columns}, scale, 0, s.gap);
      TensorView b_gate, b_up;
      if (s.bias) b_gate = memory.random(DType::f32, {s.rows}), b_up = memory.random(DType::f32, {s.rows});
      setting.run(memory, NormGateUp{h, x, norm, gate, up, b_gate, b_up, kNormEps});
      for (int64_t b = 0; b < s.B; ++b) {
        const Row n = setting.multiplied(rms_norm(row_of(x, b * s.columns, s.columns), norm));
        for (int64_t row = 0; row < s.rows; ++row) {
          const Bounded g = dot(gate, row, n, b_gate), u = dot(up, row, n, b_up);
          const double silu = g.value / (1 + std::exp(-g.value));
          const double silu_error = 1.1 * g.error + 8 * kEps * std::fabs(silu);  // silu' is at most 1.1
          check_close(h, b * s.rows + row,
                      {silu * u.value, silu_error * std::fabs(u.value) + std::fabs(silu) * u.error +
                                           silu_error * u.error + kEps * std::fabs(silu * u.value)});
        }
      }
    }
  });
}

TEST(ops, "norm_logits is the product of the normed x") {
  for_each_setting([](const Setting& setting, const std::string& where) {
    for (const MatrixSizes& s : matrix_sizes()) {
      check::at(where + ", " + describe(s));
      Memory memory;
      const TensorView logits = memory.tensor(DType::f32, {s.B, s.rows}),
                       x = memory.random(DType::f32, {s.B, s.columns});
      const TensorView norm = memory.random(DType::f32, {s.columns}, 0.1f, 1);
      const TensorView w = memory.random(setting.dtype, {s.rows, s.columns}, 1, 0, s.gap);
      setting.run(memory, NormLogits{logits, x, norm, w, kNormEps});
      for (int64_t b = 0; b < s.B; ++b) {
        const Row n = setting.multiplied(rms_norm(row_of(x, b * s.columns, s.columns), norm));
        for (int64_t row = 0; row < s.rows; ++row) check_close(logits, b * s.rows + row, dot(w, row, n, {}));
      }
    }
  });
}

TEST(ops, "silu is accurate over the whole range, and NaN stays NaN") {
  // One input, weight 1 and a bias make the gate any number; up is 1.
  std::vector<float> values = {0.0f,   -0.0f,   1e-30f,  -1e-30f,  87.0f, -87.0f, 88.5f,     -88.5f,
                               100.0f, -100.0f, 1000.0f, -1000.0f, 3e38f, -3e38f, kInfinity, kNan};
  for (float value = -90; value < 90; value += 0.37f) values.push_back(value);
  const int64_t n = static_cast<int64_t>(values.size());
  for_each_setting([&](const Setting& setting, const std::string&) {
    Memory memory;
    const TensorView h = memory.tensor(DType::f32, {1, n}), x = memory.floats({0}, {1, 1}),
                     norm = memory.floats({1}, {1});
    const TensorView w = memory.random(setting.dtype, {n, 1});
    const TensorView b_gate = memory.floats(values, {n});
    const TensorView b_up = memory.floats(std::vector<float>(values.size(), 1), {n});
    setting.run(memory, NormGateUp{h, x, norm, w, w, b_gate, b_up, kNormEps});
    for (int64_t i = 0; i < n; ++i) {
      const double value = values[static_cast<size_t>(i)], got = get(h, i);
      if (value != value) {
        CHECK(std::isnan(got));
      } else if (std::isinf(value)) {
        CHECK_EQ(got, value);
      } else {
        // exp is clamped at e^88, so far below zero some |x| e^-88 is left of a value that is smaller still.
        const double exact = value / (1 + std::exp(-value)), clamped = value < -87 ? 1e-38 * -value : 0;
        CHECK_NEAR(got, exact, 4 * kEps * std::fabs(exact) + clamped);
      }
    }
  });
}

TEST(ops, "NaN in K or V that is read comes out as NaN") {
  for_each_setting([](const Setting& setting, const std::string& where) {
    const int64_t H = 3, d = 6, S = 150;
    for (int32_t last : {0, 5, 63, 64, 149})
      for (int32_t bad : {0, 1, 40, 64, 100, 149})
        for (bool in_key : {true, false}) {
          if (bad > last) continue;
          check::at(where + ", last bad in_key " + text({last, bad, in_key}));
          Memory memory;
          const TensorView q = memory.random(DType::f32, {1, H, d}),
                           out = memory.random(DType::f32, {1, H, d});
          const TensorView k = memory.random(setting.dtype, {1, 1, S, d});
          const TensorView v = memory.random(setting.dtype, {1, 1, S, d});
          for (int64_t i = 0; i < d; ++i) set(in_key ? k : v, bad * d + i, kNan);
          setting.run(memory, Attention{out, q, k, v, memory.ints({last}), 1.0f, 0});
          for (int64_t i = 0; i < H * d; ++i) CHECK(std::isnan(get(out, i)));
        }
  });
}

TEST(ops, "attention survives scores far apart and far from zero") {
  for_each_setting([](const Setting& setting, const std::string&) {
    for (float size : {0.0f, 100.0f, 1e4f, 1e15f})
      for (int32_t last : {3, 130}) {  // one chunk, two chunks
        Memory memory;
        const int64_t S = 140;
        const TensorView q = memory.floats({size, 0}, {1, 1, 2}), out = memory.tensor(DType::f32, {1, 1, 2});
        const TensorView k = memory.tensor(setting.dtype, {1, 1, S, 2});
        const TensorView v = memory.tensor(setting.dtype, {1, 1, S, 2});
        for (int64_t p = 0; p <= last; ++p) {  // position 1 wins by `size`, the others are level
          set(k, p * 2, p == 1 ? 1 : -1), set(k, p * 2 + 1, 0);
          set(v, p * 2, p == 1 ? 8 : 2), set(v, p * 2 + 1, p == 1 ? -8 : 4);
        }
        setting.run(memory, Attention{out, q, k, v, memory.ints({last}), size ? 1.0f : 0.0f, 0});
        const double weight = size ? 1.0 : 1.0 / (last + 1);
        CHECK_NEAR(get(out, 0), weight * 8 + (1 - weight) * 2, 16 * kEps);
        CHECK_NEAR(get(out, 1), weight * -8 + (1 - weight) * 4, 16 * kEps);
      }
  });
}

TEST(ops, "results do not depend on the number of threads, bit for bit") {
  for (const std::string& isa : cpu::available_isas())
    for (DType dtype : {DType::f32, DType::bf16}) {
      std::vector<std::vector<uint8_t>> first;
      for (int threads = 1; threads <= 5; ++threads) {
        check::at(isa + ", " + std::to_string(threads) + " threads");
        Memory memory;  // same seed, so the same tensors each time
        const int64_t B = 3, D = 70, H = 4, G = 2, d = 10, S = 200, F = 131;
        const QkvSizes sizes = {B, D, H, G, d, S, true, true, 0};
        const KvLayer layer(memory, dtype, sizes), skipped(memory, dtype, sizes);
        for (const TensorView& cache : {layer.k_cache, layer.v_cache})
          for (int64_t i = 0; i < cache.numel(); ++i) set(cache, i, static_cast<float>(i % 7) - 3);
        const TensorView table = memory.random(dtype, {20, D}), x = memory.tensor(DType::f32, {B, D});
        const TensorView q = memory.tensor(DType::f32, {B, H, d}),
                         heads = memory.tensor(DType::f32, {B, H, d});
        const TensorView h = memory.tensor(DType::f32, {B, F}), logits = memory.tensor(DType::f32, {B, 20});
        const TensorView wq = memory.random(dtype, {H * d, D}), wo = memory.random(dtype, {D, H * d});
        const TensorView gate = memory.random(dtype, {F, D}), up = memory.random(dtype, {F, D});
        const TensorView down = memory.random(dtype, {D, F});
        const TensorView cos = memory.random(DType::f32, {S, d / 2}),
                         sin = memory.random(DType::f32, {S, d / 2});
        const TensorView pos = memory.ints({199, 0, 77}), token = memory.ints({3, 19, 0});
        TensorView joined = heads;  // [B, H d]
        joined.ndim = 2, joined.sizes = {B, H * d}, joined.strides = {H * d, 1};
        Tape tape(std::make_shared<ThreadPool>(threads), memory.arena, cpu::kernels_for(isa));
        tape.record(Embed{x, token, table});
        tape.record(NormQkvRope{q,
                                layer.k_cache,
                                layer.v_cache,
                                x,
                                layer.norm,
                                wq,
                                layer.wk,
                                layer.wv,
                                {},
                                layer.bk,
                                layer.bv,
                                {},
                                layer.k_norm,
                                cos,
                                sin,
                                pos,
                                kNormEps});
        tape.record(Attention{heads, q, layer.k_cache, layer.v_cache, pos, 0.3f, 0});
        tape.record(ProjAdd{x, joined, wo, {}});
        tape.record(NormGateUp{h, x, layer.norm, gate, up, {}, {}, kNormEps});
        tape.record(ProjAdd{x, h, down, {}});
        tape.record(KvFill{x,
                           {{skipped.k_cache, skipped.v_cache, skipped.norm, skipped.wk, skipped.wv,
                             skipped.bk, skipped.bv, skipped.k_norm}},
                           cos,
                           sin,
                           pos,
                           kNormEps});
        tape.record(NormLogits{logits, x, layer.norm, table, kNormEps});
        tape.replay();
        std::vector<std::vector<uint8_t>> got;
        for (const TensorView& view :
             {x, q, heads, h, logits, layer.k_cache, layer.v_cache, skipped.k_cache, skipped.v_cache})
          got.push_back(bytes_of(view));
        if (threads == 1) first = got;
        CHECK(got == first);
        for (int64_t i = 0; i < B * 20; ++i) CHECK(std::isfinite(get(logits, i)));
      }
    }
}

TEST(ops, "argmax: the lowest index of the maximum, or -1") {
  for (const std::string& isa : cpu::available_isas()) {
    const cpu::Kernels& kernels = cpu::kernels_for(isa);
    for (int64_t n : {1, 2, 3, 7, 8, 15, 16, 17, 33, 100}) {
      check::at(isa + ", n " + std::to_string(n));
      Memory memory;
      for (int64_t at = 0; at < n; ++at) {
        const TensorView row = memory.random(DType::f32, {n});
        float* values = row.ptr<float>();
        values[at] = 50;
        CHECK_EQ(kernels.argmax(values, n), at);
        for (int64_t later = at + 1; later < n; later += 5) values[later] = 50;
        CHECK_EQ(kernels.argmax(values, n), at);
        for (int64_t i = 0; i < n; ++i)
          if (i != at) values[i] = -kInfinity;
        CHECK_EQ(kernels.argmax(values, n), at);
        values[at] = kInfinity;
        CHECK_EQ(kernels.argmax(values, n), at);
        values[at] = -kInfinity;
        CHECK_EQ(kernels.argmax(values, n), -1);
        for (int64_t i = 0; i < n; ++i) values[i] = -0.0f;
        values[at] = 0.0f;  // equal to -0
        CHECK_EQ(kernels.argmax(values, n), 0);
        values[at] = kNan;
        CHECK_EQ(kernels.argmax(values, n), -1);
        values[at] = -std::numeric_limits<float>::denorm_min();
        for (int64_t i = 0; i < n; ++i)
          if (i != at) values[i] = -1;
        CHECK_EQ(kernels.argmax(values, n), at);
      }
    }
  }
}

}  // namespace
}  // namespace d3rt
