// Quantising, four rows at a time: each row is a lane, and its sums run over the columns in order.
//
// One object for all processors, and compiled without contraction (CMakeLists.txt): an FMA rounds once where
// packing.py rounds twice, and a code on the edge of two would fall the other way. SIMD comes from the
// compiler's own vectors, which the baseline processor has everywhere.
#include "pack.h"

#include <cstring>

#include "cpu/floats.h"

namespace d3rt {
namespace {

using cpu::kGroup;
using cpu::kTileRows;

constexpr int kLanes = 4;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

D3RT_INLINE Floats all(float value) { return Floats{value, value, value, value}; }
// To the nearest whole number, half to even; |x| < 2^22.
D3RT_INLINE Floats rounded(Floats x) {
  const Floats whole = all(0x1.8p23f);  // floats of this size have no fraction
  return (x + whole) - whole;
}
D3RT_INLINE Floats clamped(Floats x, float low, float high) {  // NaN becomes low
  x = x > all(low) ? x : all(low);
  return x < all(high) ? x : all(high);
}
D3RT_INLINE Floats half(Floats x) {  // rounded to float16
  for (int lane = 0; lane < kLanes; ++lane) {
    cpu::f16 kept;
    cpu::from_float(x[lane], &kept);
    x[lane] = cpu::to_float(kept);
  }
  return x;
}
D3RT_INLINE Floats inverse(Floats scale) { return scale == all(0) ? all(0) : all(1) / scale; }

// Codes as words: byte j of a lane is the code of column j.
D3RT_INLINE Ints word(const Floats* codes) {
  Ints bytes = __builtin_convertvector(codes[0], Ints) & 255;
  for (int j = 1; j < 4; ++j) bytes |= (__builtin_convertvector(codes[j], Ints) & 255) << (8 * j);
  return bytes;
}
D3RT_INLINE void store_halves(Floats values, cpu::f16* out) {
  for (int lane = 0; lane < kLanes; ++lane) cpu::from_float(values[lane], out + lane);
}

// One group of four rows, column by column.
struct Block {
  Floats column[kGroup];
};

// Where a block goes: the words of its first row, and its scales and minima.
struct Out {
  uint8_t* data;
  cpu::f16* scales;
  cpu::f16* minima;
};
D3RT_INLINE void store_word(const Out& out, int index, Ints bytes) {
  std::memcpy(out.data + index * kTileRows * 4, &bytes, sizeof bytes);
}

// packing.py INT8_STEPS
constexpr int kMostSteps = 127, kLeastSteps = 89, kStepsApart = 2;

void pack_int8(const Block& block, const Out& out) {
  Floats largest = all(0);
  for (int i = 0; i < kGroup; ++i) {
    const Floats w = block.column[i], size = w < all(0) ? -w : w;
    largest = size > largest ? size : largest;
  }
  const auto code = [](Floats w, Floats inverted) { return rounded(clamped(w * inverted, -127, 127)); };
  Floats best = all(0), least = all(0);
  for (int steps = kMostSteps; steps >= kLeastSteps; steps -= kStepsApart) {
    const Floats scale = half(largest / all(static_cast<float>(steps))), inverted = inverse(scale);
    Floats error = all(0);
    for (const Floats w : block.column) {
      const Floats off = code(w, inverted) * scale - w;
      error += off * off;
    }
    const Ints better = steps == kMostSteps ? Ints{-1, -1, -1, -1} : error < least;
    best = better ? scale : best;
    least = better ? error : least;
  }
  const Floats scale = best, inverted = inverse(best);
  Floats codes[kGroup];
  for (int i = 0; i < kGroup; ++i) codes[i] = code(block.column[i], inverted);
  for (int c = 0; c < kGroup / 4; ++c) store_word(out, c, word(codes + 4 * c));
  store_halves(scale, out.scales);
}

// The int4 codes of a block for one scale and minimum a row.
struct Int4 {
  Floats scale, minimum, inverted;

  Int4(Floats scale, Floats minimum) : scale(half(scale)), minimum(half(minimum)) {
    inverted = inverse(this->scale);
  }
  Floats code(Floats w) const { return rounded(clamped((w - minimum) * inverted, 0, 15)); }
  Floats error(const Block& block) const {
    Floats sum = all(0);
    for (const Floats w : block.column) {
      const Floats off = code(w) * scale + minimum - w;
      sum += off * off;
    }
    return sum;
  }
};

// The least-squares scale and minimum of a block for the codes that `given` chooses. low: each row's least
// value; above: the sum of what its values exceed it by.
Int4 refitted(const Block& block, const Int4& given, Floats low, Floats above) {
  Floats n = all(0), nn = all(0), na = all(0);
  for (const Floats w : block.column) {
    const Floats code = given.code(w);
    n += code;
    nn += code * code;
    na += code * (w - low);
  }
  const Floats spread = all(kGroup) * nn - n * n;
  const Floats slope = spread == all(0) ? all(0) : (all(kGroup) * na - n * above) / spread;
  return {slope, low + (above - slope * n) / all(kGroup)};
}

constexpr float kCuts[] = {0.0f, 0.05f, 0.1f};  // packing.py INT4_CUTS

void pack_int4(const Block& block, const Out& out) {
  Floats low = block.column[0], high = low, above = all(0);
  for (const Floats w : block.column) {
    low = w < low ? w : low;
    high = w > high ? w : high;
  }
  low += all(0);  // -0 becomes 0: which of them is found is a matter of order
  high += all(0);
  for (const Floats w : block.column) above += w - low;
  const Floats width = high - low;
  Int4 best(width / all(15), low);
  Floats least = best.error(block);
  for (const float lower : kCuts)
    for (const float upper : kCuts) {
      const Floats bottom = low + width * all(lower);
      const Int4 cut((high - width * all(upper) - bottom) / all(15), bottom);
      const Int4 fit = refitted(block, cut, low, above);
      const Floats error = fit.error(block);
      const Ints better = error < least;
      best.scale = better ? fit.scale : best.scale;
      best.minimum = better ? fit.minimum : best.minimum;
      least = better ? error : least;
    }
  best.inverted = inverse(best.scale);
  Floats codes[kGroup];
  for (int i = 0; i < kGroup; ++i) codes[i] = best.code(block.column[i]);
  for (int c = 0; c < kGroup / 8; ++c)
    store_word(out, c, word(codes + 4 * c) | word(codes + kGroup / 2 + 4 * c) << 4);
  store_halves(best.scale, out.scales);
  store_halves(best.minimum, out.minima);
}

// What a job of the pool shares.
struct Job {
  TensorView weight;
  cpu::f16* scales;
  cpu::f16* minima;
  uint8_t* data;
  bool is_int8;
};

template <class T>
void pack_tile(const Job& job, int64_t tile) {
  const int64_t rows = job.weight.size(0), groups = job.weight.size(1) / kGroup;
  const int64_t group_bytes = kTileRows * kGroup / (job.is_int8 ? 1 : 2);
  for (int64_t g = 0; g < groups; ++g)
    for (int first = 0; first < kTileRows; first += kLanes) {
      Block block{};  // rows past the last are zeros, whose codes, scale and minimum are 0
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = tile * kTileRows + first + lane;
        if (row >= rows) break;
        const T* in = job.weight.ptr<T>() + row * job.weight.strides[0] + g * kGroup;
        for (int i = 0; i < kGroup; ++i) block.column[i][lane] = cpu::to_float(in[i]);
      }
      const int64_t at = tile * groups + g, line = at * kTileRows + first;
      const Out out{job.data + at * group_bytes + first * 4, job.scales + line,
                    job.is_int8 ? nullptr : job.minima + line};
      if (job.is_int8)
        pack_int8(block, out);
      else
        pack_int4(block, out);
    }
}

int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

void run(void* context, int thread, int num_threads) {
  const Job& job = *static_cast<const Job*>(context);
  const int64_t tiles = tiles_of(job.weight.size(0));
  for (int64_t tile = tiles * thread / num_threads; tile < tiles * (thread + 1) / num_threads; ++tile)
    switch (job.weight.dtype) {
      case DType::bf16:
        pack_tile<cpu::bf16>(job, tile);
        break;
      case DType::f16:
        pack_tile<cpu::f16>(job, tile);
        break;
      default:
        pack_tile<float>(job, tile);
        break;
    }
}

void check(const TensorView& weight, const MatrixView& out) {
  if (!weight || (weight.dtype != DType::f32 && weight.dtype != DType::bf16 && weight.dtype != DType::f16))
    throw InvalidArgument("pack: weight is " + (weight ? weight.describe() : "missing") +
                          ", but must be float32, bfloat16 or float16");
  if (out.format != "int8" && out.format != "int4")
    throw InvalidArgument("pack: format '" + out.format + "' is unknown; int8 or int4");
  if (out.cols % kGroup)
    throw InvalidArgument("pack: " + std::to_string(out.cols) + " columns, but they must be a multiple of " +
                          std::to_string(kGroup));
  check_view("pack", "weight", weight, weight.dtype, {out.rows, out.cols}, false);
  const bool is_int8 = out.format == "int8";
  const int64_t tiles = tiles_of(out.rows), groups = out.cols / kGroup;
  check_view("pack", "data", out.data, DType::byte, {tiles, groups, is_int8 ? 8 : 4, kTileRows, 4});
  check_view("pack", "scales", out.scales, DType::f16, {tiles, groups, kTileRows});
  if (!is_int8) check_view("pack", "minima", out.minima, DType::f16, {tiles, groups, kTileRows});
  if (is_int8 && out.minima) throw InvalidArgument("pack: int8 has no minima");
}

}  // namespace

void pack(ThreadPool& pool, const TensorView& weight, const MatrixView& out) {
  check(weight, out);
  const bool is_int8 = out.format == "int8";
  Job job{weight, out.scales.ptr<cpu::f16>(), is_int8 ? nullptr : out.minima.ptr<cpu::f16>(),
          out.data.ptr<uint8_t>(), is_int8};
  pool.run(run, &job);
}

}  // namespace d3rt
