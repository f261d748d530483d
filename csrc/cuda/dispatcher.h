// Dispatcher: the decode loop on a GPU. The step's own kernels choose the token, advance and write the token
// into a ring in device memory, so the next step can be enqueued before the host knows the token. The host
// keeps `ahead` steps enqueued, copies each step's line of the ring after it, and reads tokens as they
// arrive.
//
// So it learns late that every slot has finished: the steps enqueued by then run for nothing, and change
// nothing, as finished slots stand still on the device (kernels/cuda/tokens.py, advance). Their tokens are
// dropped.
#pragma once

#include <memory>
#include <vector>

#include "cuda/step.h"
#include "loop.h"

namespace d3rt::cuda {

// What `sample` leaves in the ring in place of a token (kernels/cuda/tokens.py).
constexpr int32_t kNotFinite = -1;
constexpr int32_t kNoDistribution = -2;

// One generation. programs[i] is the step that makes token i: the first one only chooses, from the logits
// that the prefill left.
struct RunSpec {
  int first = 0;
  std::vector<int> programs;        // programs[i - 1] is enqueued at step i
  std::vector<int32_t> eos_tokens;  // as the device's `advance` has them
};

// The device's buffers of a generation (token, pos, step, finished, ...) are the caller's to set before
// start; the device's step must be 0 then.
//
// step_seconds() is the time from one token's arrival on the host to the next one's; step 0's counts from the
// start of the generation. Steps overlap with the host's work, so it is not the time of a step alone.
class Dispatcher : public Loop {
 public:
  // pos [B], filled [L, B] int32, in host memory: what the device's are, see KvState. ring: device address of
  // int32 [ring_rows, B], where step i writes its tokens to line i % ring_rows. ahead: steps that are
  // enqueued beyond the token that was read last, at least 1.
  Dispatcher(std::shared_ptr<Context> context, StreamHandle stream, TensorView pos, TensorView filled,
             DevicePointer ring, int64_t ring_rows, int ahead);
  ~Dispatcher() { end(); }

  // Adds a step; returns its number. `reads`: layers whose attention runs; `fills`: layers it only writes.
  int add(std::shared_ptr<Step> step, std::vector<int> reads, std::vector<int> fills);

  // Starts a generation on the dispatcher's thread. A driver's error, as any other, surfaces in wait and
  // read; the dispatcher can be started again afterwards, unless the context is broken.
  void start(RunSpec spec);

  // Driven from outside: begin, then for each step enqueue it and wait for it (for step 0 too, if it is to do
  // anything), choose tokens, set the device's token and pos, and commit.
  void step(int program);
  void commit(const std::vector<bool>& finished);

 private:
  class Generation;

  std::shared_ptr<Context> context_;
  StreamHandle stream_;
  DevicePointer ring_;
  int64_t ring_rows_;
  size_t ahead_;
  std::vector<std::shared_ptr<Step>> steps_;  // by program number
  PinnedMemory pinned_;                       // int32 [ahead, B]: step i arrives in line i % ahead
  std::vector<Event> arrived_;                // [ahead], likewise
  // What pos and filled would be if all that is enqueued had run and no slot ever finished: a hole that this
  // does not have, the truth does not have either.
  std::vector<int32_t> expected_pos_, expected_filled_;
};

}  // namespace d3rt::cuda
