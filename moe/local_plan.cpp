// The experts' side of a plan, which needs no other rank.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

#include "kernels/error.h"
#include "kernels/sort.h"
#include "moe/routing_plan.h"
#include "moe/tensor_types.h"

namespace perseid {
at::Tensor LocalPlan::place_of_assignment() const {
  at::Tensor places = at::empty({num_assignments}, at::kInt);
  int32_t* out = places.mutable_data_ptr<int32_t>();
  const int32_t* sorted = int32_data(order);
  for (int64_t r = 0; r < num_assignments; ++r) out[sorted[r]] = static_cast<int32_t>(r);
  return places;
}

at::Tensor LocalPlan::row_of_sorted() const {
  at::Tensor rows = at::empty({num_assignments}, at::kInt);
  int32_t* out = rows.mutable_data_ptr<int32_t>();
  const int32_t* sorted = int32_data(order);
  if (!row_offsets.defined()) {
    const int32_t per_row = static_cast<int32_t>(fixed);
    for (int64_t r = 0; r < num_assignments; ++r) out[r] = sorted[r] / per_row;
    return rows;
  }
  std::vector<int32_t> row_of(static_cast<size_t>(num_assignments));
  const int32_t* offsets = int32_data(row_offsets);
  for (int64_t n = 0; n < num_rows; ++n) {
    std::fill(row_of.begin() + offsets[n], row_of.begin() + offsets[n + 1],
              static_cast<int32_t>(n));
  }
  for (int64_t r = 0; r < num_assignments; ++r) out[r] = row_of[static_cast<size_t>(sorted[r])];
  return rows;
}

LocalPlan make_local_plan(const gates::Routing& routing, int64_t num_experts) {
  LocalPlan local;
  local.num_rows = routing.num_tokens;
  local.num_assignments = routing.num_assignments();
  local.fixed = routing.top_k;
  local.row_offsets = routing.token_offsets;
  local.order = at::empty({local.num_assignments}, at::kInt);
  local.expert_offsets.resize(static_cast<size_t>(num_experts) + 1);
  kernels::counting_sort(int32_data(routing.expert_idx), local.num_assignments, num_experts,
                         local.expert_offsets.data(), local.order.mutable_data_ptr<int32_t>());
  return local;
}

LocalPlan make_dense_plan(int64_t num_tokens) {
  require(num_tokens >= 0 && num_tokens <= std::numeric_limits<int32_t>::max(), "make_dense_plan",
          "num_tokens", num_tokens, "is outside [0, 2147483647]");
  LocalPlan local;
  local.num_rows = num_tokens;
  local.num_assignments = num_tokens;
  local.fixed = 1;
  local.order = at::arange(num_tokens, at::kInt);
  local.expert_offsets = {0, num_tokens};
  return local;
}

}  // namespace perseid
