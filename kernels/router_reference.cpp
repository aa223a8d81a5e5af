// The router by its definitions: one token after the other, sums in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/router.h"
#include "kernels/router_token.h"

namespace perseid::kernels {

namespace {

void check_groups(const char* operation, const RouterShape& shape, const RouterOptions& options,
                  bool has_bias) {
  const int64_t num_groups = options.num_groups, topk_groups = options.topk_groups;
  require(num_groups >= 1 && shape.num_experts % num_groups == 0, operation, "num_groups",
          num_groups, "does not divide num_experts=" + to_text(shape.num_experts));
  require(topk_groups >= 1 && topk_groups <= num_groups, operation, "topk_groups", topk_groups,
          "is outside [1, num_groups=" + to_text(num_groups) + "]");
  const int64_t group_size = shape.num_experts / num_groups;
  require(shape.top_k <= topk_groups * group_size, operation, "top_k", shape.top_k,
          "exceeds the " + to_text(topk_groups * group_size) +
              " experts of topk_groups=" + to_text(topk_groups) + " groups; use more groups");
  const bool is_max = options.score_function == ScoreFunction::kSoftmax && !has_bias;
  require(num_groups == 1 || is_max || group_size >= 2, operation, "num_groups", num_groups,
          "leaves 1 expert in a group, but the two best rank it; choose at most " +
              to_text(shape.num_experts / 2));
}

}  // namespace

void check_router(const char* operation, const RouterShape& shape, const RouterOptions& options,
                  const RouterInput& input) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  require_count(operation, "num_tokens", shape.num_tokens);
  require(shape.num_experts >= 1 && shape.num_experts <= kMax, operation, "num_experts",
          shape.num_experts, "is out of range; choose it in [1, " + to_text(kMax) + "]");
  const std::string choice = "; choose top_k in [1, " + to_text(shape.num_experts) + "]";
  require(shape.top_k >= 1, operation, "top_k", shape.top_k, "is below 1" + choice);
  require(shape.top_k <= shape.num_experts, operation, "top_k", shape.top_k,
          "exceeds num_experts=" + to_text(shape.num_experts) + choice);
  require(std::isfinite(options.route_scale) && options.route_scale > 0.0, operation, "route_scale",
          options.route_scale, "is not a positive number; choose a finite one above 0");
  require(options.score_function <= ScoreFunction::kSqrtSoftplus, operation, "score_function",
          static_cast<int>(options.score_function),
          "is unknown; choose softmax, sigmoid or sqrt_softplus");
  check_groups(operation, shape, options, input.expert_bias != nullptr);
  require_buffer(operation, "logits", input.logits, shape.num_tokens * shape.num_experts);
}

void route_reference(const RouterShape& shape, const RouterOptions& options, DType dtype,
                     const RouterInput& input, const RouterOutput& output) {
  check_router("route", shape, options, input);
  dispatch_float_dtype(dtype, "route", [&](auto tag) {
    using T = decltype(tag);
    const int64_t num_experts = shape.num_experts, top_k = shape.top_k;
    std::vector<double> score_sum(static_cast<size_t>(num_experts), 0.0);
    std::vector<int64_t> tokens_per_expert(static_cast<size_t>(num_experts), 0);
    double lse_square_sum = 0;
    double entropy_sum = 0;
    int64_t non_finite_tokens = 0;
    TokenRoute route;
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      const bool is_valid = input.valid == nullptr || input.valid[t] != 0;
      if (is_valid) {
        route_token(shape, options, static_cast<const T*>(input.logits) + t * num_experts,
                    input.expert_bias, route);
        for (int64_t e = 0; e < num_experts; ++e) score_sum[e] += route.score_shares[e];
        for (const int32_t e : route.expert_idx) ++tokens_per_expert[e];
        lse_square_sum += route.lse * route.lse;
        for (const double w : route.weights) {
          if (w > 0 && std::isfinite(w)) entropy_sum -= w * std::log(w);
        }
        non_finite_tokens += route.is_non_finite;
      }
      for (int64_t e = 0; output.score_shares != nullptr && e < num_experts; ++e) {
        static_cast<T*>(output.score_shares)[t * num_experts + e] =
            is_valid ? static_cast<T>(route.score_shares[e]) : T{0};
      }
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t at = t * top_k + k;
        if (output.expert_idx != nullptr) {
          output.expert_idx[at] = is_valid ? route.expert_idx[k] : -1;
        }
        if (output.weights != nullptr) {
          static_cast<T*>(output.weights)[at] = is_valid ? static_cast<T>(route.weights[k]) : T{0};
        }
      }
    }
    for (int64_t e = 0; e < num_experts; ++e) {
      if (output.score_sum != nullptr) {
        static_cast<T*>(output.score_sum)[e] = static_cast<T>(score_sum[e]);
      }
      if (output.tokens_per_expert != nullptr) output.tokens_per_expert[e] = tokens_per_expert[e];
    }
    if (output.lse_square_sum != nullptr) {
      *static_cast<T*>(output.lse_square_sum) = static_cast<T>(lse_square_sum);
    }
    if (output.entropy_sum != nullptr) *output.entropy_sum = entropy_sum;
    if (output.non_finite_tokens != nullptr) *output.non_finite_tokens = non_finite_tokens;
  });
}

void route_backward_reference(const RouterShape& shape, const RouterOptions& options, DType dtype,
                              const RouterInput& input, const RouterGradInput& grad,
                              void* grad_logits) {
  check_router("route_backward", shape, options, input);
  dispatch_float_dtype(dtype, "route_backward", [&](auto tag) {
    using T = decltype(tag);
    std::vector<T> grad_shares(static_cast<size_t>(shape.num_experts));
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      const int64_t row = t * shape.num_experts;
      T* const target = static_cast<T*>(grad_logits) + row;
      if (input.valid != nullptr && input.valid[t] == 0) {
        std::fill(target, target + shape.num_experts, T{0});
        continue;
      }
      TokenGrad<T> token;
      if (grad.grad_weights != nullptr) {
        token.expert_idx = grad.expert_idx + t * shape.top_k;
        token.grad_weights = static_cast<const T*>(grad.grad_weights) + t * shape.top_k;
      }
      token.grad_score_sum = static_cast<const T*>(grad.grad_score_sum);
      if (grad.grad_score_shares != nullptr) {
        const T* const own = static_cast<const T*>(grad.grad_score_shares) + row;
        for (int64_t e = 0; e < shape.num_experts; ++e) {
          grad_shares[e] = own[e] + (token.grad_score_sum == nullptr
                                         ? T{0}
                                         : static_cast<const T*>(grad.grad_score_sum)[e]);
        }
        token.grad_score_sum = grad_shares.data();
      }
      token.grad_lse_square_sum = static_cast<const T*>(grad.grad_lse_square_sum);
      route_token_backward(shape, options, static_cast<const T*>(input.logits) + row, token,
                           target);
    }
  });
}

}  // namespace perseid::kernels
