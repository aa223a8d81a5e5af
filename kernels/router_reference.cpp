// The router by its definitions: one token after the other, sums in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/checks.h"
#include "kernels/router.h"
#include "kernels/router_token.h"

namespace perseid::kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
/// Keeps the sum of sigmoid scores away from 0 (DeepSeek-V3).
constexpr double kSumEpsilon = 1e-20;

double nan_as_minus_infinity(double x) { return std::isnan(x) ? -kInfinity : x; }

bool has_nan(const std::vector<double>& values) {
  return std::any_of(values.begin(), values.end(), [](double x) { return std::isnan(x); });
}

double max_of(const std::vector<double>& values) {
  double max = -kInfinity;
  for (const double x : values) max = std::max(max, nan_as_minus_infinity(x));
  return max;
}

/// Softmax with its limits: several +inf share equally, only -inf is uniform, a NaN makes all NaN.
std::vector<double> softmax(const std::vector<double>& values) {
  std::vector<double> result(values.size());
  if (has_nan(values)) {
    std::fill(result.begin(), result.end(), std::numeric_limits<double>::quiet_NaN());
    return result;
  }
  const double max = max_of(values);
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const bool is_max = values[i] == max;  // inf - inf is never formed
    result[i] = is_max ? 1.0 : std::isinf(max) ? 0.0 : std::exp(values[i] - max);
    sum += result[i];
  }
  for (double& x : result) x /= sum;
  return result;
}

double log_sum_exp(const std::vector<double>& values) {
  if (has_nan(values)) return std::numeric_limits<double>::quiet_NaN();
  const double max = max_of(values);
  if (std::isinf(max)) return max;
  double sum = 0;
  for (const double x : values) sum += std::exp(x - max);
  return max + std::log(sum);
}

double sigmoid_reference(double x) { return 1.0 / (1.0 + std::exp(-x)); }

/// log(sigmoid(x)) = -softplus(-x), without overflow.
double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }

/// What score_sum sums: softmax(logits), or softmax(log sigmoid(logits)).
std::vector<double> score_shares(ScoreFunction score_function, std::vector<double> logits) {
  if (score_function == ScoreFunction::kSigmoid) {
    for (double& x : logits) x = log_sigmoid(x);
  }
  return softmax(logits);
}

/// Score that ranks the experts, in T, the type of the logits. -inf marks experts that are taken
/// last: a bias cannot lift an expert whose logit is -inf (masked) or NaN.
template <typename T>
std::vector<T> selection_scores(const RouterOptions& options, const std::vector<double>& logits,
                                const float* expert_bias) {
  std::vector<double> clean(logits.size());
  std::transform(logits.begin(), logits.end(), clean.begin(), nan_as_minus_infinity);
  std::vector<T> scores(clean.begin(), clean.end());
  if (expert_bias == nullptr) return scores;
  const std::vector<double> p = softmax(clean);
  for (size_t e = 0; e < scores.size(); ++e) {
    const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
    const double score = is_softmax ? p[e] : sigmoid_reference(clean[e]);
    const T biased = static_cast<T>(score) + static_cast<T>(expert_bias[e]);
    if (clean[e] > -kInfinity) {
      scores[e] = std::isnan(biased) ? -std::numeric_limits<T>::infinity() : biased;
    }
  }
  return scores;
}

/// Weights of the selection before route_scale.
std::vector<double> selection_weights(const RouterOptions& options,
                                      const std::vector<double>& logits,
                                      const std::vector<int32_t>& expert_idx) {
  std::vector<double> selected;
  for (const int32_t e : expert_idx) selected.push_back(logits[e]);
  if (options.score_function == ScoreFunction::kSigmoid) {
    double sum = kSumEpsilon;
    for (double& x : selected) sum += x = sigmoid_reference(x);
    for (double& x : selected) x = options.normalize ? x / sum : x;
    return selected;
  }
  if (options.normalize) return softmax(selected);
  const bool is_uniform = !has_nan(logits) && max_of(logits) == -kInfinity;
  const std::vector<double> p = softmax(logits);
  for (size_t k = 0; k < selected.size(); ++k) {
    selected[k] = is_uniform ? 1.0 / static_cast<double>(selected.size()) : p[expert_idx[k]];
  }
  return selected;
}

/// p_j (g_j - sum of p g): softmax backward. Where the maximum is infinite p is a convention, not a
/// function of the logits, and its gradient is 0.
std::vector<double> softmax_backward(const std::vector<double>& p, const std::vector<double>& grad,
                                     double max) {
  std::vector<double> result(p.size(), 0.0);
  if (std::isinf(max) && !has_nan(p)) return result;
  double mean = 0;
  for (size_t i = 0; i < p.size(); ++i) mean += p[i] * grad[i];
  for (size_t i = 0; i < p.size(); ++i) result[i] = p[i] * (grad[i] - mean);
  return result;
}

/// The selected choices of a row whose ids are in range, and the gradients of their weights.
struct Selected {
  std::vector<int32_t> expert_idx;
  std::vector<double> logits;
  std::vector<double> grads;
};

void add_weight_gradient(const RouterOptions& options, const std::vector<double>& logits,
                         const Selected& selected, std::vector<double>& result) {
  if (options.score_function == ScoreFunction::kSigmoid) {
    double sum = kSumEpsilon, mean = 0;
    for (const double z : selected.logits) sum += sigmoid_reference(z);
    for (size_t k = 0; k < selected.grads.size(); ++k) {
      mean += sigmoid_reference(selected.logits[k]) / sum * selected.grads[k];
    }
    for (size_t k = 0; k < selected.grads.size(); ++k) {
      const double s = sigmoid_reference(selected.logits[k]);
      const double grad_s =
          options.normalize ? (selected.grads[k] - mean) / sum : selected.grads[k];
      result[selected.expert_idx[k]] += grad_s * s * (1.0 - s);
    }
  } else if (options.normalize) {
    const std::vector<double> grads =
        softmax_backward(softmax(selected.logits), selected.grads, max_of(selected.logits));
    for (size_t k = 0; k < grads.size(); ++k) result[selected.expert_idx[k]] += grads[k];
  } else {
    std::vector<double> grad_p(logits.size(), 0.0);
    for (size_t k = 0; k < selected.grads.size(); ++k) {
      grad_p[selected.expert_idx[k]] = selected.grads[k];
    }
    const std::vector<double> grads = softmax_backward(softmax(logits), grad_p, max_of(logits));
    for (size_t e = 0; e < grads.size(); ++e) result[e] += grads[e];
  }
}

}  // namespace

// ---- one token ----
template <typename T>
void route_token(const RouterShape& shape, const RouterOptions& options, const T* logits,
                 const float* expert_bias, TokenRoute& route) {
  const std::vector<double> z(logits, logits + shape.num_experts);
  const std::vector<T> scores = selection_scores<T>(options, z, expert_bias);
  std::vector<int32_t> by_score(z.size());
  std::iota(by_score.begin(), by_score.end(), 0);
  std::stable_sort(by_score.begin(), by_score.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  route.expert_idx.assign(by_score.begin(), by_score.begin() + shape.top_k);
  // With a bias the selection is by score + bias, the order by the score without it.
  std::sort(route.expert_idx.begin(), route.expert_idx.end(), [&](int32_t a, int32_t b) {
    const double x = nan_as_minus_infinity(z[a]), y = nan_as_minus_infinity(z[b]);
    return x != y ? x > y : a < b;
  });
  route.weights = selection_weights(options, z, route.expert_idx);
  for (double& weight : route.weights) weight *= options.route_scale;
  route.score_shares = score_shares(options.score_function, z);
  route.lse = log_sum_exp(z);
  route.is_non_finite = std::any_of(z.begin(), z.end(), [](double x) { return !std::isfinite(x); });
}

template <typename T>
void route_token_backward(const RouterShape& shape, const RouterOptions& options, const T* logits,
                          const TokenGrad<T>& grad, T* grad_logits) {
  const std::vector<double> z(logits, logits + shape.num_experts);
  const double max = max_of(z);
  std::vector<double> result(z.size(), 0.0);
  if (grad.grad_weights != nullptr) {
    Selected selected;
    for (int64_t k = 0; k < shape.top_k; ++k) {
      const int32_t e = grad.expert_idx[k];
      if (e < 0 || e >= shape.num_experts) continue;
      selected.expert_idx.push_back(e);
      selected.logits.push_back(z[e]);
      selected.grads.push_back(options.route_scale * grad.grad_weights[k]);
    }
    add_weight_gradient(options, z, selected, result);
  }
  if (grad.grad_score_sum != nullptr) {
    const bool is_sigmoid = options.score_function == ScoreFunction::kSigmoid;
    const std::vector<double> g(grad.grad_score_sum, grad.grad_score_sum + shape.num_experts);
    // log sigmoid(+inf) = 0 is finite: only a row of -inf has an infinite maximum there.
    const std::vector<double> grads = softmax_backward(score_shares(options.score_function, z), g,
                                                       is_sigmoid ? std::min(max, 0.0) : max);
    for (size_t e = 0; e < grads.size(); ++e) {
      result[e] += grads[e] * (is_sigmoid ? 1.0 - sigmoid_reference(z[e]) : 1.0);
    }
  }
  if (grad.grad_lse_square_sum != nullptr && (!std::isinf(max) || has_nan(z))) {
    const std::vector<double> p = softmax(z);
    const double scale = 2.0 * log_sum_exp(z) * *grad.grad_lse_square_sum;
    for (size_t e = 0; e < p.size(); ++e) result[e] += scale * p[e];
  }
  for (size_t e = 0; e < result.size(); ++e) grad_logits[e] = static_cast<T>(result[e]);
}

template void route_token(const RouterShape&, const RouterOptions&, const float*, const float*,
                          TokenRoute&);
template void route_token(const RouterShape&, const RouterOptions&, const double*, const float*,
                          TokenRoute&);
template void route_token_backward(const RouterShape&, const RouterOptions&, const float*,
                                   const TokenGrad<float>&, float*);
template void route_token_backward(const RouterShape&, const RouterOptions&, const double*,
                                   const TokenGrad<double>&, double*);

// ---- all tokens ----
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
  require(options.score_function <= ScoreFunction::kSigmoid, operation, "score_function",
          static_cast<int>(options.score_function), "is unknown; choose softmax or sigmoid");
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
        non_finite_tokens += route.is_non_finite;
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
    if (output.non_finite_tokens != nullptr) *output.non_finite_tokens = non_finite_tokens;
  });
}

void route_backward_reference(const RouterShape& shape, const RouterOptions& options, DType dtype,
                              const RouterInput& input, const RouterGradInput& grad,
                              void* grad_logits) {
  check_router("route_backward", shape, options, input);
  dispatch_float_dtype(dtype, "route_backward", [&](auto tag) {
    using T = decltype(tag);
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
      token.grad_lse_square_sum = static_cast<const T*>(grad.grad_lse_square_sum);
      route_token_backward(shape, options, static_cast<const T*>(input.logits) + row, token,
                           target);
    }
  });
}

}  // namespace perseid::kernels
