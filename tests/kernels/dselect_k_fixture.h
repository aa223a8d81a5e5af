#pragma once
#include "kernels/dselect_k.h"
#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {

/// All outputs of one call of dselect_k.
template <typename T>
struct DSelectKResult {
  std::vector<T> weights;
  double entropy_sum = -9, penalty_sum = -9, removed_weight = -9;
  int64_t num_switches = -9, saturated_switches = -9, non_finite_tokens = -9;

  bool has_same_bits(const DSelectKResult& other) const {
    const std::vector<double> mine = {entropy_sum, penalty_sum, removed_weight};
    return same_bits(weights, other.weights) &&
           same_bits(mine, {other.entropy_sum, other.penalty_sum, other.removed_weight}) &&
           num_switches == other.num_switches && saturated_switches == other.saturated_switches &&
           non_finite_tokens == other.non_finite_tokens;
  }
};

/// Coefficients of the two sums in the loss whose gradient is asked for.
struct SumCoefficients {
  double entropy = 0, penalty = 0;
};

template <typename T>
struct DSelectKCase {
  DSelectKShape shape;
  DSelectKOptions options;
  std::vector<T> logits;
  std::vector<int32_t> map;    ///< empty: none
  std::vector<uint8_t> valid;  ///< empty: all

  int64_t num_switches() const { return shape.num_selectors * dselect_k_bits(shape.num_experts); }
  int64_t row_size() const { return num_switches() + shape.num_selectors; }
  /// z of bit b of selector i, and omega of selector i, of token t.
  T& z(int64_t t, int64_t i, int64_t b) {
    const int64_t bits = dselect_k_bits(shape.num_experts);
    return logits[static_cast<size_t>(t * row_size() + i * bits + b)];
  }
  T& omega(int64_t t, int64_t i) {
    return logits[static_cast<size_t>(t * row_size() + num_switches() + i)];
  }

  DSelectKInput input() const {
    return {logits.data(), map.empty() ? nullptr : map.data(),
            valid.empty() ? nullptr : valid.data()};
  }
  DSelectKResult<T> forward(bool is_reference = false) const {
    DSelectKResult<T> result;
    result.weights = nans<T>(shape.num_tokens * shape.num_experts);
    const DSelectKOutput output{result.weights.data(),    &result.entropy_sum,
                                &result.penalty_sum,      &result.removed_weight,
                                &result.num_switches,     &result.saturated_switches,
                                &result.non_finite_tokens};
    if (is_reference) {
      dselect_k_reference(shape, options, DTypeOf<T>::value, input(), output);
    } else {
      dselect_k(shape, options, DTypeOf<T>::value, input(), output);
    }
    return result;
  }
  /// Gradient of sum(upstream * weights) + the sums by their coefficients.
  std::vector<T> backward(const std::vector<T>& upstream, const SumCoefficients& sums,
                          bool is_reference = false) const {
    const std::vector<T> weights = forward(is_reference).weights;
    std::vector<T> result = nans<T>(static_cast<int64_t>(logits.size()));
    const DSelectKGradInput grad{weights.data(), upstream.empty() ? nullptr : upstream.data(),
                                 &sums.entropy, &sums.penalty};
    if (is_reference) {
      dselect_k_backward_reference(shape, options, DTypeOf<T>::value, input(), grad, result.data());
    } else {
      dselect_k_backward(shape, options, DTypeOf<T>::value, input(), grad, result.data());
    }
    return result;
  }
  std::string name() const {
    return "T=" + to_text(shape.num_tokens) + " E=" + to_text(shape.num_experts) +
           " K=" + to_text(shape.num_selectors) + " gamma=" + to_text(options.gamma) +
           (options.hard_eval ? " hard" : "") + (options.renormalize ? " renormalized" : "") +
           (map.empty() ? "" : " mapped") + (valid.empty() ? "" : " masked") +
           " min_weight=" + to_text(options.min_weight) + " ";
  }
};

/// A worked example with K = 2: E = 4, and E = 3, where code 3 has no expert.
inline DSelectKCase<double> golden_dselect_k(int64_t num_experts) {
  DSelectKCase<double> at;
  at.shape = {1, num_experts, 2};
  at.logits = {.25, -.1, .6, 0, .3, -.2};
  return at;
}

/// Sum of the weights of a token.
inline double weight_sum(const std::vector<double>& weights, int64_t E, int64_t t = 0) {
  double sum = 0;
  for (int64_t m = 0; m < E; ++m) sum += weights[static_cast<size_t>(t * E + m)];
  return sum;
}

/// Random logits; about a third of the switches is saturated at gamma = 1.
template <typename T>
DSelectKCase<T> random_dselect_k(int64_t num_tokens, int64_t num_experts, int64_t num_selectors,
                                 uint32_t seed = 1, double scale = 0.5) {
  DSelectKCase<T> result;
  result.shape = {num_tokens, num_experts, num_selectors};
  result.logits = normal_values<T>(num_tokens * result.row_size(), seed, scale);
  return result;
}

/// Width x hard_eval x cut-off x renormalize x mask x map.
template <typename T, typename Body>
void for_each_variant(DSelectKCase<T> at, Body body) {
  std::vector<uint8_t> valid;
  for (int64_t t = 0; t < at.shape.num_tokens; ++t) valid.push_back(t % 4 != 2);
  const auto map = shuffled_map(at.shape.num_selectors, at.shape.num_experts);
  for (int variant = 0; variant < 64; ++variant) {
    at.options.gamma = (variant & 1) != 0 ? 1 : 10;
    at.options.hard_eval = (variant & 2) != 0;
    at.options.min_weight =
        (variant & 4) != 0 ? 0.5 / static_cast<double>(at.shape.num_experts) : 0;
    at.options.renormalize = (variant & 8) != 0;
    at.valid = (variant & 16) != 0 ? valid : std::vector<uint8_t>{};
    at.map = (variant & 32) != 0 ? map : std::vector<int32_t>{};
    body(at);
  }
}

}  // namespace perseid::kernels::testing
