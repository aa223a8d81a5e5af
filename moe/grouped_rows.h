#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "gates/device.h"
#include "kernels/combine.h"
#include "kernels/permute.h"
#include "moe/routing_plan.h"
#include "moe/segments.h"
#include "moe/tensor_types.h"

// Internal: what grouped experts of all kinds do with rows, weights and stacked parameters.

namespace perseid {

inline at::Tensor expert_part(const at::Tensor& stacked, int64_t expert) {
  return stacked.defined() ? stacked.select(0, expert) : at::Tensor();
}

/// Values by assignment put in sorted order, and back.
inline at::Tensor to_sorted(const at::Tensor& values, const LocalPlan& plan) {
  at::Tensor sorted = at::empty_like(values);
  kernels::permute(data_of(values), int32_data(plan.order), mutable_data_of(sorted),
                   plan.num_assignments, values.size(1) * values.element_size(),
                   gates::stream_of(values, "experts"));
  return sorted;
}
inline at::Tensor from_sorted(const at::Tensor& sorted, const LocalPlan& plan) {
  at::Tensor values = at::empty_like(sorted);
  kernels::unpermute(data_of(sorted), int32_data(plan.order), mutable_data_of(values),
                     plan.num_assignments, sorted.size(1) * sorted.element_size(),
                     gates::stream_of(sorted, "experts"));
  return values;
}

/// Sums over the assignments of each row, which read and write sorted places: rows of products are
/// never copied into another order.
class RowSums {
 public:
  RowSums(const LocalPlan& plan, kernels::DType dtype)
      : plan_(plan), place_of_(plan.place_of_assignment()), dtype_(dtype) {}

  /// @param sorted   [R, width] @param weights [R, G] by assignment; undefined: 1
  at::Tensor reduced(const at::Tensor& sorted, const at::Tensor& weights = {}) const {
    const int64_t num_gates = weights.defined() ? weights.size(1) : 1;
    const int64_t width = sorted.size(1);
    at::Tensor out = at::empty({plan_.num_rows, num_gates * width}, sorted.options());
    if (plan_.num_assignments == 0) return out.zero_();
    kernels::combine(data_of(sorted), index(), data_of(weights), num_gates, mutable_data_of(out),
                     plan_.num_rows, width, dtype_, gates::stream_of(sorted, "experts"));
    return out;
  }

  /// Gradient of the weighted sum by sorted place: sum over gates of weights[a, g] * grad_out[n,
  /// g].
  at::Tensor expanded(const at::Tensor& grad_out, const at::Tensor& weights, int64_t width) const {
    at::Tensor sorted = at::empty({plan_.num_assignments, width}, grad_out.options());
    if (plan_.num_assignments == 0) return sorted;
    kernels::combine_backward(data_of(grad_out), nullptr, index(), data_of(weights),
                              weights.size(1), mutable_data_of(sorted), nullptr, plan_.num_rows,
                              width, dtype_, gates::stream_of(sorted, "experts"));
    return sorted;
  }

  /// Gradient of the weights: <grad_out[n, g], y[a]>.
  at::Tensor weight_gradient(const at::Tensor& grad_out, const at::Tensor& sorted,
                             const at::Tensor& weights) const {
    at::Tensor out = at::empty_like(weights);
    if (plan_.num_assignments == 0) return out;
    kernels::combine_backward(data_of(grad_out), data_of(sorted), index(), data_of(weights),
                              weights.size(1), nullptr, mutable_data_of(out), plan_.num_rows,
                              sorted.size(1), dtype_, gates::stream_of(sorted, "experts"));
    return out;
  }

 private:
  kernels::CombineIndex index() const {
    return {int32_data(plan_.row_offsets), plan_.fixed, int32_data(place_of_)};
  }
  const LocalPlan& plan_;
  at::Tensor place_of_;
  kernels::DType dtype_;
};

inline StackedGradient wanted_gradient(bool wanted, const at::Tensor& parameter,
                                       const std::vector<Segment>& segments) {
  return wanted && parameter.defined() ? StackedGradient(parameter, segments) : StackedGradient();
}

}  // namespace perseid
