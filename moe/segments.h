#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "moe/routing_plan.h"

// How products over experts are dealt to threads: each product runs on one thread, so that no
// barrier is paid per expert, and the split depends on the plan alone, so that results do not
// depend on the number of threads.

namespace perseid {

/// Sorted places [begin, end) of one expert, the unit of work of one thread.
struct Segment {
  int64_t expert = 0;
  int64_t begin = 0;
  int64_t end = 0;
  int64_t part = 0;  ///< number among the segments of this expert
  int64_t num_rows() const { return end - begin; }
};

/// Segments of a plan, longest first. An expert with many rows has several, of nearly equal length.
std::vector<Segment> make_segments(const LocalPlan& plan);

/// Reusable buffers of one thread.
class Scratch {
 public:
  /// [num_rows, width] of uninitialised memory, valid until the next call with the same slot.
  at::Tensor rows(size_t slot, int64_t num_rows, int64_t width, const at::TensorOptions& options);
  /// As many bytes for a kernel to work in, valid until the next call.
  void* workspace(int64_t num_bytes);

 private:
  std::vector<at::Tensor> buffers_;
  at::Tensor workspace_;
};

/// Runs body(segment, scratch) for all segments on the threads of the pool. LibTorch's autograd is
/// off inside, and its products run on the calling thread.
void for_each_segment(const std::vector<Segment>& segments,
                      const std::function<void(const Segment&, Scratch&)>& body);

/// Gradient of a stacked parameter [L, ...] from its segments: the first part of an expert is
/// written in place, further parts beside it, and finish() adds them in order. Experts without rows
/// get 0.
class StackedGradient {
 public:
  StackedGradient() = default;  ///< not wanted: part() must not be called
  StackedGradient(const at::Tensor& parameter, const std::vector<Segment>& segments);
  bool wanted() const { return total_.defined(); }
  at::Tensor part(const Segment& segment) const;
  at::Tensor finish();  ///< undefined if not wanted

 private:
  at::Tensor total_;
  std::vector<std::vector<at::Tensor>> further_;  ///< by expert, parts 1, 2, ...
};

}  // namespace perseid
