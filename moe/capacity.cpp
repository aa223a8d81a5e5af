#include "moe/capacity.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "gates/device.h"
#include "kernels/error.h"
#include "kernels/parallel.h"
#include "kernels/random.h"
#include "kernels/select.h"
#include "kernels/sort.h"

namespace perseid {
namespace {
void validate(const CapacityOptions& options, const char* operation) {
  require(!std::isnan(options.capacity_factor), operation, "capacity_factor",
          options.capacity_factor, "must be a number; choose 0 for dropless");
  require(options.capacity_min >= 0, operation, "capacity_min", options.capacity_min,
          "must be at least 0");
}

/// The routing on the host, with explicit rows.
struct Rows {
  explicit Rows(const gates::Routing& routing)
      : num_tokens(routing.num_tokens),
        num_assignments(routing.num_assignments()),
        host(gates::to_host({gates::explicit_offsets(routing).contiguous(),
                             routing.expert_idx.contiguous(),
                             routing.weights.detach().contiguous()})),
        weights(host[2]),
        offsets(host[0].const_data_ptr<int32_t>()),
        expert_of(host[1].const_data_ptr<int32_t>()) {}

  int64_t num_tokens;
  int64_t num_assignments;
  std::vector<at::Tensor> host;
  at::Tensor weights;        // [A]
  const int32_t* offsets;    // [T+1]
  const int32_t* expert_of;  // [A]
};

/// Tokens in the order in which they may take places.
std::vector<int32_t> token_order(const Rows& rows, const CapacityOptions& options,
                                 const DropContext& context) {
  std::vector<int32_t> order(static_cast<size_t>(rows.num_tokens));
  std::iota(order.begin(), order.end(), 0);
  const auto sort_by = [&](const auto& comes_first) {
    std::stable_sort(order.begin(), order.end(), comes_first);
  };
  if (options.drop_policy == DropPolicy::kBatchPriority) {
    const at::Tensor values = rows.weights.to(at::kDouble);
    const double* weight = values.const_data_ptr<double>();
    std::vector<double> largest(order.size(), -std::numeric_limits<double>::infinity());
    for (size_t t = 0; t < order.size(); ++t) {
      for (int32_t a = rows.offsets[t]; a < rows.offsets[t + 1]; ++a) {
        if (weight[a] > largest[t]) largest[t] = weight[a];  // never a NaN
      }
    }
    sort_by([&](int32_t a, int32_t b) {
      return largest[static_cast<size_t>(a)] > largest[static_cast<size_t>(b)];
    });
  } else if (options.drop_policy == DropPolicy::kRandom && context.training) {
    const kernels::RandomKey key = kernels::random_key(options.seed)
                                       .with(static_cast<uint64_t>(context.step))
                                       .with(static_cast<uint64_t>(context.layer_id));
    const auto draw = [&](int32_t token) {
      return kernels::random_bits(key, static_cast<uint64_t>(context.first_token + token));
    };
    sort_by([&](int32_t a, int32_t b) { return draw(a) < draw(b); });
  }
  return order;
}

/// Assignments by choice, then in the order of their tokens.
std::vector<int32_t> by_choice(const Rows& rows, const std::vector<int32_t>& order) {
  const auto count = static_cast<size_t>(rows.num_assignments);
  std::vector<int32_t> listed, choice;
  listed.reserve(count);
  choice.reserve(count);
  int32_t num_choices = 0;
  for (const int32_t t : order) {
    const int32_t begin = rows.offsets[t];
    for (int32_t a = begin; a < rows.offsets[t + 1]; ++a) {
      listed.push_back(a);
      choice.push_back(a - begin);
      num_choices = std::max(num_choices, a - begin + 1);
    }
  }
  // Stable, so equal choices stay in the order of tokens.
  std::vector<int64_t> choice_offsets(static_cast<size_t>(num_choices) + 1);
  std::vector<int32_t> sorted(count);
  kernels::counting_sort(choice.data(), rows.num_assignments, num_choices, choice_offsets.data(),
                         sorted.data());
  for (int32_t& place : sorted) place = listed[static_cast<size_t>(place)];
  return sorted;
}

void keep_first(const Rows& rows, const std::vector<int32_t>& order, int64_t capacity,
                int64_t num_experts, std::vector<uint8_t>& is_kept) {
  std::vector<int64_t> taken(static_cast<size_t>(num_experts), 0);
  for (const int32_t a : by_choice(rows, order)) {
    is_kept[static_cast<size_t>(a)] = taken[static_cast<size_t>(rows.expert_of[a])]++ < capacity;
  }
}

/// Each token keeps the first choice that has room. Returns the tokens that found none.
int64_t keep_one(const Rows& rows, const std::vector<int32_t>& order, int64_t capacity,
                 int64_t num_experts, std::vector<uint8_t>& is_kept) {
  std::vector<int64_t> taken(static_cast<size_t>(num_experts), 0);
  std::vector<int32_t> token_of(is_kept.size());
  std::vector<uint8_t> is_routed(static_cast<size_t>(rows.num_tokens), 0);
  int64_t num_left = 0;
  for (int64_t t = 0; t < rows.num_tokens; ++t) {
    num_left += rows.offsets[t + 1] > rows.offsets[t];
    std::fill(token_of.begin() + rows.offsets[t], token_of.begin() + rows.offsets[t + 1],
              static_cast<int32_t>(t));
  }
  for (const int32_t a : by_choice(rows, order)) {
    uint8_t& routed = is_routed[static_cast<size_t>(token_of[static_cast<size_t>(a)])];
    int64_t& count = taken[static_cast<size_t>(rows.expert_of[a])];
    if (routed != 0 || count >= capacity) continue;
    is_kept[static_cast<size_t>(a)] = routed = 1;
    ++count;
    --num_left;
  }
  return num_left;
}

template <typename T>
void keep_largest(const Rows& rows, int64_t capacity, int64_t num_experts,
                  std::vector<uint8_t>& is_kept) {
  std::vector<int64_t> first(static_cast<size_t>(num_experts) + 1);
  std::vector<int32_t> order(is_kept.size());
  kernels::counting_sort(rows.expert_of, rows.num_assignments, num_experts, first.data(),
                         order.data());
  const T* weight_of = rows.weights.const_data_ptr<T>();
  std::vector<T> sorted(is_kept.size());
  std::vector<uint8_t> sorted_is_kept(is_kept.size());
  constexpr kernels::DType kType =
      sizeof(T) == sizeof(double) ? kernels::DType::kFloat64 : kernels::DType::kFloat32;
  kernels::parallel_tasks(num_experts, [&](int64_t e) {
    const auto begin = static_cast<size_t>(first[static_cast<size_t>(e)]);
    const auto end = static_cast<size_t>(first[static_cast<size_t>(e) + 1]);
    if (begin == end) return;
    for (size_t i = begin; i < end; ++i) sorted[i] = weight_of[order[i]];
    kernels::select_k(sorted.data() + begin, static_cast<int64_t>(end - begin), capacity, kType,
                      sorted_is_kept.data() + begin);
    for (size_t i = begin; i < end; ++i) {
      is_kept[static_cast<size_t>(order[i])] = sorted_is_kept[i];
    }
  });
}

/// Survivors of tokens that lost something, times old sum / new sum. Where the survivors sum to 0
/// there is nothing to scale.
at::Tensor renormalized(const at::Tensor& old_weights, const at::Tensor& old_token_of,
                        const at::Tensor& weights, const at::Tensor& token_of,
                        const at::Tensor& has_loss) {
  const at::Tensor zero = at::zeros({has_loss.size(0)}, weights.options());
  const at::Tensor old_sum = zero.index_add(0, old_token_of, old_weights);
  const at::Tensor new_sum = zero.index_add(0, token_of, weights);
  const at::Tensor one = at::ones_like(new_sum);
  const at::Tensor is_scaled = has_loss.logical_and(new_sum.ne(0));
  // The divisor is replaced too: the gradient of a masked quotient by 0 would be NaN.
  const at::Tensor ratio =
      at::where(is_scaled, old_sum, one).div(at::where(is_scaled, new_sum, one));
  return weights.mul(ratio.index_select(0, token_of));
}
}  // namespace

int64_t expert_capacity(const CapacityOptions& options, int64_t num_tokens, int64_t top_k,
                        int64_t num_experts) {
  constexpr const char* kOperation = "expert_capacity";
  validate(options, kOperation);
  require(num_tokens >= 0, kOperation, "num_tokens", num_tokens, "must be at least 0");
  require(top_k >= 1, kOperation, "top_k", top_k, "must be at least 1");
  require(num_experts >= 1, kOperation, "num_experts", num_experts, "must be at least 1");
  if (num_tokens == 0 || options.capacity_factor <= 0) return num_tokens;
  const double share = std::ceil(options.capacity_factor *
                                 (static_cast<double>(num_tokens) * static_cast<double>(top_k)) /
                                 static_cast<double>(num_experts));
  if (share >= static_cast<double>(num_tokens)) return num_tokens;
  return std::min(num_tokens, std::max(options.capacity_min, static_cast<int64_t>(share)));
}

CappedRouting apply_capacity(const gates::Routing& routing, const CapacityOptions& options,
                             int64_t num_tokens, int64_t top_k, int64_t num_experts,
                             const DropContext& context) {
  validate(options, "apply_capacity");
  const bool is_one = options.drop_policy == DropPolicy::kNoTokenLeftBehind;
  require(!is_one || options.capacity_factor > 0, "apply_capacity", "capacity_factor",
          options.capacity_factor,
          "leaves drop_policy=no_token_left_behind without a limit; choose one above 0");
  if (options.capacity_factor <= 0) return CappedRouting{routing, 0};
  const int64_t capacity = expert_capacity(options, num_tokens, is_one ? 1 : top_k, num_experts);
  return drop_over_capacity(routing, capacity, options, num_experts, context);
}

CappedRouting drop_over_capacity(const gates::Routing& routing, int64_t capacity,
                                 const CapacityOptions& options, int64_t num_experts,
                                 const DropContext& context) {
  constexpr const char* kOperation = "drop_over_capacity";
  validate(options, kOperation);
  require(capacity >= 0, kOperation, "capacity", capacity, "must be at least 0");
  require(num_experts >= 1, kOperation, "num_experts", num_experts, "must be at least 1");
  gates::validate_shapes(routing, num_experts, kOperation);

  const Rows rows(routing);
  const int64_t num_assignments = rows.num_assignments;
  std::vector<int64_t> first(static_cast<size_t>(num_experts) + 1);
  kernels::counting_sort(rows.expert_of, num_assignments, num_experts, first.data(), nullptr);
  require(first.back() == num_assignments, kOperation, "expert_idx",
          to_text(num_assignments - first.back()) + " ids",
          "lie outside [0, " + to_text(num_experts) + ")");
  int64_t num_kept = 0;
  for (size_t e = 1; e < first.size(); ++e) num_kept += std::min(capacity, first[e] - first[e - 1]);
  const bool is_one = options.drop_policy == DropPolicy::kNoTokenLeftBehind;
  if (num_kept == num_assignments && !is_one) return CappedRouting{routing, 0};

  std::vector<uint8_t> is_kept(static_cast<size_t>(num_assignments));
  int64_t num_dropped = num_assignments - num_kept;
  if (is_one) {
    num_dropped =
        keep_one(rows, token_order(rows, options, context), capacity, num_experts, is_kept);
    num_kept = std::count(is_kept.begin(), is_kept.end(), uint8_t{1});
  } else if (options.drop_policy != DropPolicy::kProbability) {
    keep_first(rows, token_order(rows, options, context), capacity, num_experts, is_kept);
  } else if (routing.weights.scalar_type() == at::kDouble) {
    keep_largest<double>(rows, capacity, num_experts, is_kept);
  } else {
    keep_largest<float>(rows, capacity, num_experts, is_kept);
  }

  const bool renormalize = options.renormalize_after_drop;
  const at::TensorOptions int_options = at::kInt;
  const at::Tensor offsets = at::empty({rows.num_tokens + 1}, int_options);
  const at::Tensor kept = at::empty({num_kept}, int_options);
  const at::Tensor token_of = at::empty({renormalize ? num_kept : 0}, int_options);
  const at::Tensor old_token_of = at::empty({renormalize ? num_assignments : 0}, int_options);
  const at::Tensor has_loss = at::zeros({rows.num_tokens}, int_options.dtype(at::kBool));
  auto* offset = offsets.mutable_data_ptr<int32_t>();
  auto* kept_out = kept.mutable_data_ptr<int32_t>();
  auto* token_out = token_of.mutable_data_ptr<int32_t>();
  auto* old_token_out = old_token_of.mutable_data_ptr<int32_t>();
  auto* loss_out = has_loss.mutable_data_ptr<bool>();
  int32_t count = 0;
  offset[0] = 0;
  for (int64_t t = 0; t < rows.num_tokens; ++t) {
    for (int32_t a = rows.offsets[t]; a < rows.offsets[t + 1]; ++a) {
      if (renormalize) old_token_out[a] = static_cast<int32_t>(t);
      if (is_kept[static_cast<size_t>(a)] == 0) {
        loss_out[t] = true;
        continue;
      }
      if (renormalize) token_out[count] = static_cast<int32_t>(t);
      kept_out[count++] = a;
    }
    offset[t + 1] = count;
  }

  CappedRouting capped;
  capped.num_dropped = num_dropped;
  capped.routing.num_tokens = rows.num_tokens;
  const at::Device home = routing.expert_idx.device();
  const at::Tensor kept_home = kept.to(home);
  capped.routing.token_offsets = offsets.to(home);
  capped.routing.expert_idx = routing.expert_idx.index_select(0, kept_home);
  capped.routing.weights = routing.weights.index_select(0, kept_home);
  capped.routing.scores = routing.scores;
  if (renormalize) {
    capped.routing.weights =
        renormalized(routing.weights, old_token_of.to(home), capped.routing.weights,
                     token_of.to(home), has_loss.to(home));
  }
  return capped;
}

}  // namespace perseid
