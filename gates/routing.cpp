#include "gates/routing.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gates/describe.h"
#include "gates/device.h"
#include "gates/ragged_table.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

using at::Tensor;

/// [T] lengths of the rows.
Tensor row_lengths(const Tensor& offsets) {
  return offsets.slice(0, 1).sub(offsets.slice(0, 0, -1));
}

void require_countable(int64_t num_assignments) {
  require(num_assignments <= std::numeric_limits<int32_t>::max(), "routing", "num_assignments",
          num_assignments, "exceeds 2147483647; split the batch");
}

/// [T+1] int32 from [T] row lengths.
Tensor offsets_of(const Tensor& lengths) {
  const Tensor ends = lengths.cumsum(0, at::kLong);
  require_countable(ends.numel() == 0 ? 0 : ends[-1].item<int64_t>());
  return at::cat({at::zeros({1}, ends.options()), ends}).to(at::kInt);
}

/// [A] int64 token of each assignment.
Tensor token_of_assignment(const Routing& routing) {
  const std::optional<int64_t> num_assignments = routing.num_assignments();
  return at::repeat_interleave(row_lengths(explicit_offsets(routing)).to(at::kLong),
                               num_assignments);
}

/// Sort key of weights: NaN goes last, whatever its position.
Tensor sort_key(const Tensor& weights) {
  const Tensor values = weights.detach();
  return at::where(values.isnan(), -std::numeric_limits<double>::infinity(), values);
}

Tensor as_gate_weights(const Tensor& weights) {
  return weights.scalar_type() == at::kDouble ? weights : weights.to(at::kFloat);
}

/// Are equal weights of each row in the order of their ids? Other weights are: only ids changed.
template <typename T>
bool ties_in_order(const Routing& routing) {
  const T* const weights = routing.weights.const_data_ptr<T>();
  const int32_t* const ids = routing.expert_idx.const_data_ptr<int32_t>();
  const Tensor offsets = explicit_offsets(routing).contiguous();
  const int32_t* const row = offsets.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    for (int64_t a = row[t]; a + 1 < row[t + 1]; ++a) {
      const bool is_tie =
          weights[a] == weights[a + 1] || (std::isnan(weights[a]) && std::isnan(weights[a + 1]));
      if (is_tie && ids[a] > ids[a + 1]) return false;
    }
  }
  return true;
}

bool is_vector(const Tensor& tensor) { return tensor.defined() && tensor.dim() == 1; }

void require_weights(const Routing& routing, const char* operation) {
  const int64_t A = routing.num_assignments();
  require(is_vector(routing.weights) && routing.weights.size(0) == A &&
              (routing.weights.scalar_type() == at::kFloat ||
               routing.weights.scalar_type() == at::kDouble),
          operation, "weights", describe(routing.weights),
          "is not float32 or float64 [A=" + to_text(A) + "]");
}

}  // namespace

Routing routing_from_table(const Tensor& expert_idx, const Tensor& weights, int64_t num_experts) {
  constexpr const char* kOperation = "routing_from_table";
  require(expert_idx.defined() && expert_idx.dim() == 2 &&
              at::isIntegralType(expert_idx.scalar_type(), /*includeBool=*/false),
          kOperation, "expert_idx", describe(expert_idx), "is not an integer [T, K] table");
  require(weights.defined() && weights.sizes() == expert_idx.sizes() && weights.is_floating_point(),
          kOperation, "weights", describe(weights),
          "is not a floating table of the shape of expert_idx=" + describe(expert_idx));
  const int64_t K = expert_idx.size(1);
  require(K >= 1 && K <= num_experts, kOperation, "expert_idx", describe(expert_idx),
          "has K outside [1, num_experts=" + to_text(num_experts) + "]");

  // By id, then stably by weight: equal weights stay in the order of ids.
  const auto [ids, by_id] = at::sort(expert_idx.to(at::kLong), /*dim=*/1);
  if (ids.numel() > 0) {
    const int64_t smallest = ids.min().item<int64_t>();
    const int64_t largest = ids.max().item<int64_t>();
    require(smallest >= 0 && largest < num_experts, kOperation, "expert_idx",
            smallest < 0 ? smallest : largest,
            "is outside [0, num_experts=" + to_text(num_experts) + ")");
    require(!ids.slice(1, 1).eq(ids.slice(1, 0, -1)).any().item<bool>(), kOperation, "expert_idx",
            describe(expert_idx), "has an expert twice in a row; merge the two by adding weights");
  }
  const Tensor by_weight = std::get<1>(at::sort(sort_key(weights).gather(1, by_id),
                                                /*stable=*/true, /*dim=*/1, /*descending=*/true));
  const Tensor order = by_id.gather(1, by_weight);

  Routing routing;
  routing.num_tokens = expert_idx.size(0);
  routing.top_k = K;
  routing.expert_idx = expert_idx.gather(1, order).to(at::kInt).reshape({-1});
  routing.weights = as_gate_weights(weights).gather(1, order).reshape({-1});
  return routing;
}

Routing routing_from_dense(const Tensor& weights) {
  require(weights.defined() && weights.dim() == 2 && weights.is_floating_point(),
          "routing_from_dense", "weights", describe(weights), "is not a floating [T, E] table");
  const Tensor table = as_gate_weights(weights);
  const RaggedTable rows = ragged_of(table.detach(), /*with_positions=*/true);
  Routing routing;
  routing.num_tokens = weights.size(0);
  routing.token_offsets = rows.token_offsets;
  routing.expert_idx = rows.expert_idx;
  routing.weights = table.reshape({-1}).index_select(0, rows.positions);
  return routing;
}

Routing routing_from_mask(const Tensor& weights, const Tensor& is_selected) {
  constexpr const char* kOperation = "routing_from_mask";
  require(weights.defined() && weights.dim() == 2 && weights.is_floating_point(), kOperation,
          "weights", describe(weights), "is not a floating [T, E] table");
  require(is_selected.defined() && is_selected.sizes() == weights.sizes() &&
              is_selected.scalar_type() == at::kBool,
          kOperation, "is_selected", describe(is_selected),
          "is not a bool table of the shape of weights=" + describe(weights));
  const int64_t E = weights.size(1);
  const Tensor values = as_gate_weights(weights).reshape({-1});
  // By token and id, then stably by weight, then stably by token.
  const Tensor pairs = at::nonzero(is_selected.reshape({-1})).squeeze(1);
  const Tensor by_weight =
      pairs.index_select(0, std::get<1>(at::sort(sort_key(values.index_select(0, pairs)),
                                                 /*stable=*/true, /*dim=*/0, /*descending=*/true)));
  const Tensor order = std::get<1>(
      at::sort(by_weight.div(E, "floor"), /*stable=*/true, /*dim=*/0, /*descending=*/false));
  const Tensor positions = by_weight.index_select(0, order);
  Routing routing;
  routing.num_tokens = weights.size(0);
  routing.token_offsets = offsets_of(is_selected.sum(1));
  routing.expert_idx = positions.remainder(E).to(at::kInt);
  routing.weights = values.index_select(0, positions);
  return routing;
}

Routing without_invalid(const Routing& routing, const Tensor& valid) {
  constexpr const char* kOperation = "without_invalid";
  validate_shapes(routing, std::numeric_limits<int32_t>::max(), kOperation);
  require(valid.defined() && valid.dim() == 1 && valid.scalar_type() == at::kBool &&
              valid.size(0) == routing.num_tokens,
          kOperation, "valid", describe(valid),
          "is not bool[num_tokens=" + to_text(routing.num_tokens) + "]");
  if (valid.all().item<bool>()) return routing;
  // int32: the index is kept for the backward.
  const Tensor kept =
      at::nonzero(valid.index_select(0, token_of_assignment(routing))).squeeze(1).to(at::kInt);

  Routing result = routing;
  result.top_k = 0;
  result.token_offsets = offsets_of(row_lengths(explicit_offsets(routing)).mul(valid));
  result.expert_idx = routing.expert_idx.index_select(0, kept);
  result.weights = routing.weights.index_select(0, kept);
  return result;
}

Routing renumbered(const Routing& routing, const Tensor& map) {
  Routing result = routing;
  result.expert_idx = map.index_select(0, routing.expert_idx);
  if (routing.scores.defined()) {
    result.scores =
        at::empty_like(routing.scores).index_copy_(1, map.to(at::kLong), routing.scores);
  }
  result.weights = routing.weights.contiguous();
  if (!is_on_device(result.expert_idx)) {
    const bool is_double = result.weights.scalar_type() == at::kDouble;
    if (is_double ? ties_in_order<double>(result) : ties_in_order<float>(result)) return result;
  }
  // By id, then stably by weight, then stably by token. On a GPU always: the host does not look.
  const Tensor by_id = std::get<1>(at::sort(result.expert_idx));
  const Tensor by_weight =
      by_id.index_select(0, std::get<1>(at::sort(sort_key(result.weights).index_select(0, by_id),
                                                 /*stable=*/true, /*dim=*/0, /*descending=*/true)));
  const Tensor by_token =
      std::get<1>(at::sort(token_of_assignment(result).index_select(0, by_weight),
                           /*stable=*/true, /*dim=*/0, /*descending=*/false));
  const Tensor order = by_weight.index_select(0, by_token);
  result.expert_idx = result.expert_idx.index_select(0, order);
  result.weights = result.weights.index_select(0, order);
  return result;
}

Tensor explicit_offsets(const Routing& routing) {
  if (routing.top_k == 0) {
    require(routing.token_offsets.defined(), "routing", "token_offsets", "undefined",
            "is needed with top_k=0; a gate fills one of them");
    return routing.token_offsets;
  }
  require(routing.num_tokens >= 0 && routing.num_tokens <= std::numeric_limits<int32_t>::max(),
          "routing", "num_tokens", routing.num_tokens, "is outside [0, 2147483647]");
  const int64_t total = routing.num_tokens * routing.top_k;
  require_countable(total);
  return at::arange(0, total + 1, routing.top_k, routing.expert_idx.options().dtype(at::kInt));
}

Tensor dense_weights(const Routing& routing, int64_t num_experts) {
  validate_without_wait(routing, num_experts, "dense_weights");
  const Tensor position = token_of_assignment(routing).mul_(num_experts).add_(routing.expert_idx);
  return at::zeros({routing.num_tokens * num_experts}, routing.weights.options())
      .scatter(0, position, routing.weights)
      .view({routing.num_tokens, num_experts});
}

void validate_row_shapes(const Routing& routing, int64_t num_experts, const char* operation) {
  const int64_t T = routing.num_tokens;
  require(num_experts >= 1 && num_experts <= std::numeric_limits<int32_t>::max(), operation,
          "num_experts", num_experts, "is outside [1, 2147483647]");
  require(T >= 0 && T <= std::numeric_limits<int32_t>::max(), operation, "num_tokens", T,
          "is outside [0, 2147483647]");
  require(is_vector(routing.expert_idx) && routing.expert_idx.scalar_type() == at::kInt, operation,
          "expert_idx", describe(routing.expert_idx), "is not int32 [A]");
  const int64_t A = routing.num_assignments();
  require(routing.top_k >= 0 && routing.top_k <= num_experts, operation, "top_k", routing.top_k,
          "is outside [0, num_experts=" + to_text(num_experts) + "]");
  if (routing.top_k > 0) {
    require(!routing.token_offsets.defined(), operation, "token_offsets",
            describe(routing.token_offsets),
            "is defined with top_k=" + to_text(routing.top_k) + "; leave one of them out");
    require(A == T * routing.top_k, operation, "expert_idx", describe(routing.expert_idx),
            "is not num_tokens * top_k = " + to_text(T * routing.top_k) + " long");
  } else {
    require(is_vector(routing.token_offsets) && routing.token_offsets.scalar_type() == at::kInt &&
                routing.token_offsets.size(0) == T + 1,
            operation, "token_offsets", describe(routing.token_offsets),
            "is not int32 [num_tokens + 1 = " + to_text(T + 1) + "]");
  }
}

void validate_shapes(const Routing& routing, int64_t num_experts, const char* operation) {
  validate_row_shapes(routing, num_experts, operation);
  require_weights(routing, operation);
}

void validate(const Routing& routing, int64_t num_experts, const char* operation) {
  validate_rows(routing, num_experts, operation);
  require_weights(routing, operation);
}

void validate_without_wait(const Routing& routing, int64_t num_experts, const char* operation) {
  if (is_on_device(routing.expert_idx)) {
    validate_shapes(routing, num_experts, operation);
  } else {
    validate(routing, num_experts, operation);
  }
}

void validate_rows(const Routing& routing, int64_t num_experts, const char* operation) {
  validate_row_shapes(routing, num_experts, operation);
  const int64_t T = routing.num_tokens, A = routing.num_assignments(), K = routing.top_k;
  require_countable(A);
  const std::vector<Tensor> host = to_host(
      {routing.expert_idx.contiguous(), K > 0 ? Tensor() : routing.token_offsets.contiguous()});
  const int32_t* const expert = host[0].const_data_ptr<int32_t>();
  const int32_t* const offsets = K > 0 ? nullptr : host[1].const_data_ptr<int32_t>();
  const auto offset = [&](int64_t t) -> int64_t { return K > 0 ? t * K : offsets[t]; };
  require(offset(0) == 0 && offset(T) == A, operation, "token_offsets",
          to_text(offset(0)) + ".." + to_text(offset(T)),
          "must run from 0 to the " + to_text(A) + " assignments");
  // Texts are made only for what is wrong: this runs over all assignments of every step.
  std::vector<int64_t> last_token(static_cast<size_t>(num_experts), -1);
  for (int64_t t = 0; t < T; ++t) {
    if (offset(t) > offset(t + 1) || offset(t + 1) > A) {
      require(false, operation, "token_offsets", offset(t + 1),
              "is not between " + to_text(offset(t)) + " and " + to_text(A) + " at token " +
                  to_text(t));
    }
    for (int64_t a = offset(t); a < offset(t + 1); ++a) {
      const int32_t e = expert[a];
      if (e < 0 || e >= num_experts) {
        require(false, operation, "expert_idx", e,
                "is outside [0, num_experts=" + to_text(num_experts) + ") at token " + to_text(t));
      }
      if (std::exchange(last_token[static_cast<size_t>(e)], t) == t) {
        require(false, operation, "expert_idx", e, "is twice in the row of token " + to_text(t));
      }
    }
  }
}

}  // namespace perseid::gates
