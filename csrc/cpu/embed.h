// embed: x[b] = table[token[b]], widened to float32.
#pragma once

#include "gemv.h"

namespace d3rt::cpu::D3RT_ISA {

template <class W>
D3RT_INLINE void embed_typed(const EmbedArgs& a, Range columns) {
  for (int b = 0; b < a.B; ++b) {
    const W* row = static_cast<const W*>(a.table.data) + a.token[b] * a.table.stride;
    float* x = a.x + static_cast<int64_t>(b) * a.D;
    for (int64_t i = columns.begin; i < columns.end; ++i) x[i] = to_float(row[i]);
  }
}

static void embed(const EmbedArgs& a, float*, int, const Worker& me) {
  const Range columns = share(a.D, me);
  switch (a.table.store) {
    case Store::f32:
      return embed_typed<float>(a, columns);
    case Store::bf16:
      return embed_typed<bf16>(a, columns);
    case Store::f16:
      return embed_typed<f16>(a, columns);
    case Store::int8:
    case Store::int4:
      for (int b = 0; b < a.B; ++b)
        unpack_row(a.table, a.token[b], columns.begin, columns.end, a.x + static_cast<int64_t>(b) * a.D);
  }
}

}  // namespace d3rt::cpu::D3RT_ISA
