// keep_hidden: the hidden state of a token as it stands, kept until the K,V of skipped layers are made of it.
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

template <class C>
D3RT_INLINE void keep_columns(const KeepHiddenArgs& a, Range columns) {
  for (int slot = 0; slot < a.B; ++slot) {
    const int64_t line = a.lines ? a.lines[slot] : slot;
    C* kept = static_cast<C*>(a.hidden) + line * a.line_stride + a.pos[slot] * a.pos_stride;
    const float* x = a.x + static_cast<int64_t>(slot) * a.D;
    for (int64_t i = columns.begin; i < columns.end; ++i) from_float(x[i], kept + i);
  }
}

static void keep_hidden(const KeepHiddenArgs& a, float*, int, const Worker& me) {
  const Range columns = share(a.D, me);
  switch (a.store) {
    case Store::f32:
      return keep_columns<float>(a, columns);
    case Store::bf16:
      return keep_columns<bf16>(a, columns);
    default:
      return keep_columns<f16>(a, columns);
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
