// The experts' side of a plan, which needs no other rank.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "gates/device.h"
#include "kernels/error.h"
#include "kernels/plan.h"
#include "kernels/sort.h"
#include "moe/routing_plan.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

constexpr const char* kLocalPlan = "local_plan";

}  // namespace

int64_t LocalPlan::num_local_experts() const {
  return (device_offsets.defined() ? device_offsets.size(0)
                                   : static_cast<int64_t>(expert_offsets.size())) -
         1;
}

std::vector<int64_t> LocalPlan::host_offsets() const {
  if (!expert_offsets.empty()) return expert_offsets;
  const at::Tensor offsets = gates::to_host({device_offsets})[0];
  const int64_t* data = offsets.const_data_ptr<int64_t>();
  return {data, data + offsets.size(0)};
}

at::Tensor LocalPlan::expert_ends() const {
  at::Tensor ends = at::empty({num_local_experts()}, device_offsets.options().dtype(at::kInt));
  kernels::expert_ends(device_offsets.const_data_ptr<int64_t>(), num_local_experts(),
                       ends.mutable_data_ptr<int32_t>(),
                       gates::stream_of(device_offsets, kLocalPlan));
  return ends;
}

at::Tensor LocalPlan::place_of_assignment() const {
  at::Tensor places = at::empty({num_assignments}, order.options());
  kernels::invert_order(int32_data(order), num_assignments, places.mutable_data_ptr<int32_t>(),
                        gates::stream_of(order, kLocalPlan));
  return places;
}

at::Tensor LocalPlan::row_of_sorted() const {
  at::Tensor rows = at::empty({num_assignments}, order.options());
  kernels::row_of_sorted(int32_data(order), num_assignments, int32_data(row_offsets), num_rows,
                         fixed, rows.mutable_data_ptr<int32_t>(),
                         gates::stream_of(order, kLocalPlan));
  return rows;
}

LocalPlan make_local_plan(const gates::Routing& routing, int64_t num_experts) {
  LocalPlan local;
  local.num_rows = routing.num_tokens;
  local.num_assignments = routing.num_assignments();
  local.fixed = routing.top_k;
  local.row_offsets = routing.token_offsets;
  if (gates::is_on_device(routing.expert_idx)) {
    const at::TensorOptions options = routing.expert_idx.options();
    local.order = at::zeros({local.num_assignments}, options);
    local.device_offsets = at::empty({num_experts + 1}, options.dtype(at::kLong));
    kernels::counting_sort(int32_data(routing.expert_idx), local.num_assignments, num_experts,
                           local.device_offsets.mutable_data_ptr<int64_t>(),
                           local.order.mutable_data_ptr<int32_t>(),
                           gates::stream_of(routing.expert_idx, kLocalPlan));
    return local;
  }
  local.order = at::empty({local.num_assignments}, at::kInt);
  local.expert_offsets.resize(static_cast<size_t>(num_experts) + 1);
  kernels::counting_sort(int32_data(routing.expert_idx), local.num_assignments, num_experts,
                         local.expert_offsets.data(), local.order.mutable_data_ptr<int32_t>());
  return local;
}

LocalPlan make_dense_plan(int64_t num_tokens, at::Device device) {
  require(num_tokens >= 0 && num_tokens <= std::numeric_limits<int32_t>::max(), "make_dense_plan",
          "num_tokens", num_tokens, "is outside [0, 2147483647]");
  LocalPlan local;
  local.num_rows = num_tokens;
  local.num_assignments = num_tokens;
  local.fixed = 1;
  const auto ints = at::TensorOptions(at::kInt).device(device);
  local.order = at::arange(num_tokens, ints);
  if (gates::is_on_device(local.order)) {
    local.device_offsets = at::arange(2, ints.dtype(at::kLong)).mul(num_tokens);
  } else {
    local.expert_offsets = {0, num_tokens};
  }
  return local;
}

}  // namespace perseid
