#pragma once
#include "kernels/comet.h"
#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {

/// All outputs of one call of comet.
template <typename T>
struct CometResult {
  std::vector<T> weights;
  double entropy_sum = -9, removed_weight = -9;
  int64_t reached_nodes = -9, saturated_nodes = -9, non_finite_tokens = -9;

  bool has_same_bits(const CometResult& other) const {
    const std::vector<double> mine = {entropy_sum, removed_weight};
    return same_bits(weights, other.weights) &&
           same_bits(mine, {other.entropy_sum, other.removed_weight}) &&
           reached_nodes == other.reached_nodes && saturated_nodes == other.saturated_nodes &&
           non_finite_tokens == other.non_finite_tokens;
  }
};

template <typename T>
struct CometGrads {
  std::vector<T> splits, leaves;
};

template <typename T>
struct CometCase {
  CometShape shape;
  CometOptions options;
  std::vector<T> splits, leaves;
  std::vector<int32_t> map;    ///< empty: none
  std::vector<uint8_t> valid;  ///< empty: all

  CometInput input() const {
    return {splits.data(), leaves.data(), map.empty() ? nullptr : map.data(),
            valid.empty() ? nullptr : valid.data()};
  }
  CometResult<T> forward(bool is_reference = false) const {
    CometResult<T> result;
    result.weights = nans<T>(shape.num_tokens * shape.num_experts);
    const CometOutput output{result.weights.data(),   &result.entropy_sum,
                             &result.removed_weight,  &result.reached_nodes,
                             &result.saturated_nodes, &result.non_finite_tokens};
    if (is_reference) {
      comet_reference(shape, options, DTypeOf<T>::value, input(), output);
    } else {
      comet(shape, options, DTypeOf<T>::value, input(), output);
    }
    return result;
  }
  /// Gradients of sum(upstream * weights) + entropy_coeff * entropy_sum.
  CometGrads<T> backward(const std::vector<T>& upstream, double entropy_coeff,
                         bool is_reference = false) const {
    const std::vector<T> weights = forward(is_reference).weights;
    CometGrads<T> result{nans<T>(static_cast<int64_t>(splits.size())),
                         nans<T>(static_cast<int64_t>(leaves.size()))};
    const CometGradInput grad{weights.data(), upstream.empty() ? nullptr : upstream.data(),
                              &entropy_coeff};
    if (is_reference) {
      comet_backward_reference(shape, options, DTypeOf<T>::value, input(), grad,
                               result.splits.data(), result.leaves.data());
    } else {
      comet_backward(shape, options, DTypeOf<T>::value, input(), grad, result.splits.data(),
                     result.leaves.data());
    }
    return result;
  }
  std::string name() const {
    return "T=" + to_text(shape.num_tokens) + " E=" + to_text(shape.num_experts) +
           " K=" + to_text(shape.num_trees) + " gamma=" + to_text(options.gamma) +
           (options.hard_eval ? " hard" : "") + (map.empty() ? "" : " mapped") +
           (valid.empty() ? "" : " masked") + " min_weight=" + to_text(options.min_weight);
  }
};

/// Random logits; about a third of the switches is saturated at gamma = 1.
template <typename T>
CometCase<T> random_comet(int64_t num_tokens, int64_t num_experts, int64_t num_trees,
                          uint32_t seed = 1, double scale = 0.5) {
  CometCase<T> result;
  result.shape = {num_tokens, num_experts, num_trees};
  result.splits = normal_values<T>(num_tokens * num_trees * (num_experts - 1), seed, scale);
  result.leaves = normal_values<T>(num_tokens * num_trees * num_experts, seed + 1);
  return result;
}

/// Width x map x mask x hard_eval x cut-off.
template <typename T, typename Body>
void for_each_variant(CometCase<T> at, Body body) {
  std::vector<uint8_t> valid;
  for (int64_t t = 0; t < at.shape.num_tokens; ++t) valid.push_back(t % 4 != 2);
  const auto map = shuffled_map(at.shape.num_trees, at.shape.num_experts);
  for (int variant = 0; variant < 32; ++variant) {
    at.options.gamma = (variant & 1) != 0 ? 1 : 10;
    at.options.hard_eval = (variant & 2) != 0;
    at.options.min_weight =
        (variant & 4) != 0 ? 0.5 / static_cast<double>(at.shape.num_experts) : 0;
    at.map = (variant & 8) != 0 ? map : std::vector<int32_t>{};
    at.valid = (variant & 16) != 0 ? valid : std::vector<uint8_t>{};
    body(at);
  }
}

}  // namespace perseid::kernels::testing
