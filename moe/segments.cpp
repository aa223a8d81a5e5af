#include "moe/segments.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>

#include "kernels/parallel.h"

namespace perseid {
namespace {

// Long enough for products to run at full speed, short enough that one hot expert is shared out.
constexpr int64_t kSegmentRows = 512;

}  // namespace

std::vector<Segment> make_segments(const LocalPlan& plan) {
  std::vector<Segment> segments;
  for (int64_t e = 0; e < plan.num_local_experts(); ++e) {
    const int64_t begin = plan.expert_offsets[static_cast<size_t>(e)];
    const int64_t rows = plan.expert_offsets[static_cast<size_t>(e) + 1] - begin;
    const int64_t parts = (rows + kSegmentRows - 1) / kSegmentRows;
    for (int64_t p = 0; p < parts; ++p) {
      segments.push_back({e, begin + rows * p / parts, begin + rows * (p + 1) / parts, p});
    }
  }
  std::stable_sort(segments.begin(), segments.end(),
                   [](const Segment& a, const Segment& b) { return a.num_rows() > b.num_rows(); });
  return segments;
}

at::Tensor Scratch::rows(size_t slot, int64_t num_rows, int64_t width,
                         const at::TensorOptions& options) {
  if (slot >= buffers_.size()) buffers_.resize(slot + 1);
  at::Tensor& buffer = buffers_[slot];
  // Segments come longest first, so the first call of a slot makes the largest buffer.
  if (!buffer.defined() || buffer.numel() < num_rows * width) {
    buffer = at::empty({num_rows * width}, options);
  }
  return buffer.as_strided({num_rows, width}, {width, 1});
}

void* Scratch::workspace(int64_t num_bytes) {
  if (!workspace_.defined() || workspace_.numel() < num_bytes) {
    workspace_ = at::empty({num_bytes}, at::kByte);
  }
  return workspace_.mutable_data_ptr();
}

void for_each_segment(const std::vector<Segment>& segments,
                      const std::function<void(const Segment&, Scratch&)>& body) {
  const auto num_segments = static_cast<int64_t>(segments.size());
  const int64_t num_workers = std::min<int64_t>(kernels::num_threads(), num_segments);
  std::atomic<int64_t> next{0};
  kernels::parallel_for(0, num_workers, 1, [&](int64_t first, int64_t last) {
    at::AutoDispatchBelowADInplaceOrView below;
    const at::NoGradGuard no_grad;
    Scratch scratch;
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t i = next++; i < num_segments; i = next++) {
        body(segments[static_cast<size_t>(i)], scratch);
      }
    }
  });
}

StackedGradient::StackedGradient(const at::Tensor& parameter, const std::vector<Segment>& segments)
    : total_(at::empty_like(parameter)), further_(static_cast<size_t>(parameter.size(0))) {
  std::vector<bool> has_rows(further_.size(), false);
  for (const Segment& segment : segments) {
    const auto e = static_cast<size_t>(segment.expert);
    has_rows[e] = true;
    if (segment.part == 0) continue;
    auto& parts = further_[e];
    parts.resize(std::max(parts.size(), static_cast<size_t>(segment.part)));
    parts[static_cast<size_t>(segment.part) - 1] = at::empty_like(total_.select(0, segment.expert));
  }
  for (size_t e = 0; e < has_rows.size(); ++e) {
    if (!has_rows[e]) total_.select(0, static_cast<int64_t>(e)).zero_();
  }
}

at::Tensor StackedGradient::part(const Segment& segment) const {
  if (segment.part == 0) return total_.select(0, segment.expert);
  return further_[static_cast<size_t>(segment.expert)][static_cast<size_t>(segment.part) - 1];
}

at::Tensor StackedGradient::finish() {
  std::vector<int64_t> experts;
  for (size_t e = 0; e < further_.size(); ++e) {
    if (!further_[e].empty()) experts.push_back(static_cast<int64_t>(e));
  }
  kernels::parallel_tasks(static_cast<int64_t>(experts.size()), [&](int64_t task) {
    at::AutoDispatchBelowADInplaceOrView below;
    const at::NoGradGuard no_grad;
    const int64_t e = experts[static_cast<size_t>(task)];
    const at::Tensor total = total_.select(0, e);
    for (const at::Tensor& part : further_[static_cast<size_t>(e)]) total.add_(part);
  });
  return total_;
}

}  // namespace perseid
