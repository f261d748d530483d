// Ladder: the recorded parts of a decode step whose depth is decided while it runs. The dispatcher replays
// the segments from the bottom up; each but the last leaves a confidence for every slot, and where that is
// enough the step ends with the rung's exit program instead of going on. What a confidence is, is up to the
// recorded ops.
#pragma once

#include <vector>

#include "tensor.h"

namespace d3rt {

// By the numbers of their programs. segment: some layers, and a test of what they made. exit: all that is
// left to do when the step ends here: K,V of the layers above, and the logits unless the test made them.
struct Rung {
  int segment, exit;
};

struct Ladder {
  std::vector<Rung> rungs;
  int top = 0;            // program: the layers above the last rung, and the logits
  TensorView confidence;  // [B] float32, written by each rung's segment
};

// Whether a step may end: the whole batch by its worst slot, those that have finished left out. At a
// threshold of 0 or less it always may; a NaN is never enough.
inline bool confident(const TensorView& confidence, const std::vector<bool>& finished, double threshold) {
  if (threshold <= 0) return true;
  const float* values = confidence.ptr<float>();
  for (size_t slot = 0; slot < finished.size(); ++slot)
    if (!finished[slot] && !(static_cast<double>(values[slot]) >= threshold)) return false;
  return true;
}

}  // namespace d3rt
