// KvState: which positions have K,V, and at which position each slot stands. A loop asks it before each step
// whether the step would read a hole, and tells it what the step wrote.
#pragma once

#include <vector>

#include "tensor.h"

namespace d3rt {

// What one recorded step does to the cache: layers whose attention runs, and layers it only writes K,V of.
struct LayerUse {
  std::vector<int> reads, fills;
};

class KvState {
 public:
  // pos [B], filled [L, B] int32, in host memory. pos[b] is the position of slot b's newest token once it is
  // consumed; filled[l][b] says that layer l has K,V for positions 0 .. filled - 1 of slot b.
  KvState(TensorView pos, TensorView filled);

  int64_t batch() const { return pos_.size(0); }
  // Throws InvalidArgument for a layer that there is not.
  void check_layers(const LayerUse& use) const;
  // Throws Hole when the step would read K,V that was never written.
  void check_holes(const LayerUse& use) const;
  bool has_hole(const LayerUse& use) const;
  // A step with this use has run; slots that had finished before stood still.
  void wrote(const LayerUse& use, const std::vector<bool>& finished);
  // A token was chosen for each slot that had not finished before.
  void advance(const std::vector<bool>& finished);
  void copy(const KvState& other);  // of the same shape

 private:
  template <class Found>
  bool find_hole(const LayerUse& use, Found found) const;
  int32_t* pos() const { return pos_.ptr<int32_t>(); }
  int32_t* filled(int64_t layer) const { return filled_.ptr<int32_t>() + layer * filled_.strides[0]; }

  TensorView pos_, filled_;
};

}  // namespace d3rt
