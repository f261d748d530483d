// Step: one decode step that can be repeated: a graph made of a tape, a graph that somebody else captured, or
// the tape itself, launch by launch. A graph costs one call of the driver a step.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda/tape.h"

namespace d3rt::cuda {

class Step {
 public:
  // A graph of the tape's launches, one after the other. The driver prepares it on `stream`, and is waited
  // for.
  static std::shared_ptr<Step> graph(const Tape& tape, StreamHandle stream);
  // exec: of a graph that the caller made and keeps alive. ops: what is in it, for whoever asks.
  static std::shared_ptr<Step> captured(std::shared_ptr<Context> context, ExecHandle exec,
                                        std::vector<std::string> ops);
  // The tape as it is now.
  static std::shared_ptr<Step> eager(const Tape& tape);

  const std::string& mode() const { return mode_; }  // "graph", "captured", "eager"
  const std::vector<std::string>& ops() const { return ops_; }
  size_t nodes() const { return ops_.size(); }
  // Device memory that the graph took: what was free before less what was free after, 0 for the other modes.
  // Another user of the device at the same moment is counted in.
  size_t bytes() const { return bytes_; }
  const std::shared_ptr<Context>& context() const { return context_; }

  // Enqueues the step on the stream and does not wait for it.
  void launch(StreamHandle stream) const;
  // The same where the context is current already.
  void enqueue(StreamHandle stream) const;

 private:
  Step(std::shared_ptr<Context> context, std::string mode, std::vector<std::string> ops)
      : context_(std::move(context)), mode_(std::move(mode)), ops_(std::move(ops)) {}

  std::shared_ptr<Context> context_;
  std::string mode_;
  std::vector<std::string> ops_;
  size_t bytes_ = 0;
  std::unique_ptr<Tape> tape_;  // of "eager"; of "graph" for the kernels, which must stay loaded
  Exec owned_;                  // of "graph"
  ExecHandle exec_ = nullptr;
};

}  // namespace d3rt::cuda
