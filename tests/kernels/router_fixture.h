#pragma once
#include "kernels/router.h"
#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {

/// All outputs of one call of route.
template <typename T>
struct Routed {
  std::vector<int32_t> expert_idx;
  std::vector<T> weights, score_sum, lse_square_sum;
  std::vector<int64_t> tokens_per_expert, non_finite_tokens;
  std::vector<T> score_shares;
  std::vector<double> entropy_sum;

  bool has_same_bits(const Routed& other) const {
    return expert_idx == other.expert_idx && same_bits(weights, other.weights) &&
           same_bits(score_sum, other.score_sum) &&
           same_bits(lse_square_sum, other.lse_square_sum) &&
           tokens_per_expert == other.tokens_per_expert &&
           non_finite_tokens == other.non_finite_tokens &&
           same_bits(score_shares, other.score_shares) && same_bits(entropy_sum, other.entropy_sum);
  }
};

template <typename T>
struct RouterCase {
  RouterShape shape;
  RouterOptions options;
  std::vector<T> logits;
  std::vector<float> bias;     ///< empty: none
  std::vector<uint8_t> valid;  ///< empty: all

  RouterInput input() const {
    return {logits.data(), bias.empty() ? nullptr : bias.data(),
            valid.empty() ? nullptr : valid.data()};
  }
  Routed<T> route(bool is_reference = false) const {
    const int64_t choices = shape.num_tokens * shape.top_k;
    Routed<T> result{std::vector<int32_t>(static_cast<size_t>(choices), -9),
                     nans<T>(choices),
                     nans<T>(shape.num_experts),
                     nans<T>(1),
                     std::vector<int64_t>(static_cast<size_t>(shape.num_experts), -9),
                     {-9},
                     nans<T>(shape.num_tokens * shape.num_experts),
                     nans<double>(1)};
    const RouterOutput output{result.expert_idx.data(),        result.weights.data(),
                              result.score_sum.data(),         result.lse_square_sum.data(),
                              result.tokens_per_expert.data(), result.non_finite_tokens.data(),
                              result.score_shares.data(),      result.entropy_sum.data()};
    if (is_reference) {
      kernels::route_reference(shape, options, DTypeOf<T>::value, input(), output);
    } else {
      kernels::route(shape, options, DTypeOf<T>::value, input(), output);
    }
    return result;
  }
  std::vector<T> backward(const RouterGradInput& grad, bool is_reference = false) const {
    std::vector<T> result = nans<T>(shape.num_tokens * shape.num_experts);
    if (is_reference) {
      route_backward_reference(shape, options, DTypeOf<T>::value, input(), grad, result.data());
    } else {
      route_backward(shape, options, DTypeOf<T>::value, input(), grad, result.data());
    }
    return result;
  }
  std::string name() const {
    return "T=" + to_text(shape.num_tokens) + " E=" + to_text(shape.num_experts) +
           " K=" + to_text(shape.top_k) +
           (options.score_function == ScoreFunction::kSoftmax   ? " softmax"
            : options.score_function == ScoreFunction::kSigmoid ? " sigmoid"
                                                                : " sqrt_softplus") +
           " groups=" + to_text(options.topk_groups) + "/" + to_text(options.num_groups) +
           (options.normalize ? " normalized" : "") + (bias.empty() ? "" : " biased") +
           (valid.empty() ? "" : " masked");
  }
};

/// One token with the given logits.
template <typename T>
RouterCase<T> one_token(std::vector<T> logits, int64_t top_k,
                        ScoreFunction score_function = ScoreFunction::kSoftmax,
                        bool normalize = true) {
  RouterCase<T> result;
  result.shape = {1, static_cast<int64_t>(logits.size()), top_k};
  result.options = {score_function, normalize, 1.0};
  result.logits = std::move(logits);
  return result;
}

inline constexpr ScoreFunction kScoreFunctions[] = {
    ScoreFunction::kSoftmax, ScoreFunction::kSigmoid, ScoreFunction::kSqrtSoftplus};

/// Score function x normalisation x bias x mask x groups.
template <typename T, typename Body>
void for_each_variant(RouterCase<T> at, Body body) {
  const auto bias = normal_values<float>(at.shape.num_experts, 77, 0.3);
  std::vector<uint8_t> valid;
  for (int64_t t = 0; t < at.shape.num_tokens; ++t) valid.push_back(t % 4 != 2);
  // The smallest groups of two experts or more, as few as hold K; 1: the shape has none.
  int64_t num_groups = at.shape.num_experts / 2;
  while (num_groups > 1 && at.shape.num_experts % num_groups != 0) --num_groups;
  num_groups = std::max<int64_t>(num_groups, 1);
  const int64_t group_size = at.shape.num_experts / num_groups;
  const int64_t topk_groups = (at.shape.top_k + group_size - 1) / group_size;
  for (const auto score : kScoreFunctions) {
    for (const bool normalize : {true, false}) {
      for (const bool is_biased : {false, true}) {
        for (const bool is_masked : {false, true}) {
          at.bias = is_biased ? bias : std::vector<float>{};
          at.valid = is_masked ? valid : std::vector<uint8_t>{};
          at.options = {score, normalize, 2.5};
          body(at);
          if (num_groups == 1) continue;
          at.options = {score, normalize, 2.5, num_groups, topk_groups};
          body(at);
        }
      }
    }
  }
}

}  // namespace perseid::kernels::testing
