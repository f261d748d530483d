// unpack: a packed matrix as plain floats, for the matrix products of a long prefill, which are the
// library's. Tiles are shared out.
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

// One group of one tile, row by row: out[lane][0..31].
template <class T>
D3RT_INLINE void unpack_group(const Matrix& m, int64_t at, int rows, T* out) {
  const bool is_int8 = m.store == Store::int8;
  const uint8_t* data = static_cast<const uint8_t*>(m.data) + at * kTileRows * kGroup / (is_int8 ? 1 : 2);
  for (int lane = 0; lane < rows; ++lane, out += m.cols) {
    const float scale = to_float(m.scales[at * kTileRows + lane]);
    const float minimum = m.minima ? to_float(m.minima[at * kTileRows + lane]) : is_int8 ? 0.0f : -8 * scale;
    float values[kGroup];
    if (is_int8) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(data) + 4 * lane;
      for (int c = 0; c < 8; ++c)
        for (int j = 0; j < 4; ++j) values[4 * c + j] = static_cast<float>(codes[64 * c + j]) * scale;
    } else {
      const uint8_t* codes = data + 4 * lane;
      for (int c = 0; c < 4; ++c)
        for (int j = 0; j < 4; ++j) {
          const int both = codes[64 * c + j];
          values[4 * c + j] = static_cast<float>(both & 15) * scale + minimum;
          values[16 + 4 * c + j] = static_cast<float>(both >> 4) * scale + minimum;
        }
    }
    for (int i = 0; i < kGroup; ++i) from_float(values[i], out + i);
  }
}

template <class T>
D3RT_INLINE void unpack_tiles(const UnpackArgs& a, Range tiles) {
  const int64_t groups = a.w.cols / kGroup;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t row = tile * kTileRows;
    const int rows = a.w.rows - row < kTileRows ? static_cast<int>(a.w.rows - row) : kTileRows;
    for (int64_t g = 0; g < groups; ++g)
      unpack_group(a.w, tile * groups + g, rows, static_cast<T*>(a.out) + row * a.w.cols + g * kGroup);
  }
}

static void unpack(const UnpackArgs& a, float*, int, const Worker& me) {
  const Range mine = share(granules(a.w), me);
  if (a.as == Store::bf16)
    unpack_tiles<bf16>(a, mine);
  else
    unpack_tiles<float>(a, mine);
}

}  // namespace d3rt::cpu::D3RT_ISA
