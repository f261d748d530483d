#include "kv_state.h"

#include <algorithm>

namespace d3rt {

KvState::KvState(TensorView pos, TensorView filled) : pos_(pos), filled_(filled) {
  check_view("dispatcher", "pos", pos, DType::i32, {-1});
  check_view("dispatcher", "filled", filled, DType::i32, {-1, pos.size(0)}, false);
}

void KvState::check_layers(const LayerUse& use) const {
  const int64_t num_layers = filled_.size(0);
  for (const auto* layers : {&use.reads, &use.fills})
    for (int layer : *layers)
      if (layer < 0 || layer >= num_layers)
        throw InvalidArgument("dispatcher: layer " + std::to_string(layer) + " is not in 0.." +
                              std::to_string(num_layers - 1));
}

template <class Found>
bool KvState::find_hole(const LayerUse& use, Found found) const {
  for (int layer : use.reads) {
    for (int64_t slot = 0; slot < batch(); ++slot) {
      if (filled(layer)[slot] >= pos()[slot]) continue;
      found(layer, slot);
      return true;
    }
  }
  return false;
}

bool KvState::has_hole(const LayerUse& use) const {
  return find_hole(use, [](int, int64_t) {});
}

void KvState::check_holes(const LayerUse& use) const {
  find_hole(use, [&](int layer, int64_t slot) {
    throw Hole("layer " + std::to_string(layer) + " of slot " + std::to_string(slot) + " has K,V for " +
               std::to_string(filled(layer)[slot]) + " positions, but this step reads " +
               std::to_string(pos()[slot]) +
               ": the steps before skipped this layer without filling its cache; use kv_fill='eager'");
  });
}

void KvState::wrote(const LayerUse& use, const std::vector<bool>& finished) {
  // K,V of position pos now exist in the layers that ran or were filled; a layer with an older hole stays
  // where it is.
  for (const auto* layers : {&use.reads, &use.fills}) {
    for (int layer : *layers) {
      for (int64_t slot = 0; slot < batch(); ++slot) {
        int32_t& complete = filled(layer)[slot];
        if (complete == pos()[slot] && !finished[static_cast<size_t>(slot)]) complete = pos()[slot] + 1;
      }
    }
  }
}

void KvState::advance(const std::vector<bool>& finished) {
  // A slot that finished earlier stands still: it recomputes at one position past its end, which is never
  // read.
  for (int64_t slot = 0; slot < batch(); ++slot)
    if (!finished[static_cast<size_t>(slot)]) ++pos()[slot];
}

void KvState::copy(const KvState& other) {
  std::copy_n(other.pos(), batch(), pos());
  for (int64_t layer = 0; layer < filled_.size(0); ++layer)
    std::copy_n(other.filled(layer), batch(), filled(layer));
}

}  // namespace d3rt
