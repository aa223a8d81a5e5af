// One token of the router by the definitions, sums in double.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

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

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

/// A score that depends on its own logit alone.
double score_of(ScoreFunction score_function, double x) {
  return score_function == ScoreFunction::kSigmoid ? sigmoid_reference(x) : std::sqrt(softplus(x));
}
double slope_of(ScoreFunction score_function, double x) {
  if (score_function == ScoreFunction::kSigmoid) {
    return sigmoid_reference(x) * (1.0 - sigmoid_reference(x));
  }
  // Far below 0 both are e^x, and their quotient must not become 0 / 0.
  return x < -30.0 ? 0.5 * std::exp(0.5 * x) : 0.5 * sigmoid_reference(x) / std::sqrt(softplus(x));
}
double log_score_of(ScoreFunction score_function, double x) {
  if (score_function == ScoreFunction::kSigmoid) return log_sigmoid(x);
  return x < -37.0 ? 0.5 * x : 0.5 * std::log(softplus(x));
}
double log_slope_of(ScoreFunction score_function, double x) {
  if (score_function == ScoreFunction::kSigmoid) return 1.0 - sigmoid_reference(x);
  return x < -37.0 ? 0.5 : 0.5 * sigmoid_reference(x) / softplus(x);
}

/// What score_sum sums: softmax(logits), or softmax(log s) of other scores s.
std::vector<double> score_shares(ScoreFunction score_function, std::vector<double> logits) {
  if (score_function != ScoreFunction::kSoftmax) {
    for (double& x : logits) x = log_score_of(score_function, x);
  }
  return softmax(logits);
}

/// Score that ranks the experts, in T, the type of the logits. -inf marks experts that are taken
/// last: a bias cannot lift an expert whose logit is -inf (masked) or NaN.
/// @param is_logit  rank by the logit itself, which needs no score
template <typename T>
std::vector<T> selection_scores(const RouterOptions& options, const std::vector<double>& logits,
                                const float* expert_bias, bool is_logit) {
  std::vector<double> clean(logits.size());
  std::transform(logits.begin(), logits.end(), clean.begin(), nan_as_minus_infinity);
  std::vector<T> scores(clean.begin(), clean.end());
  if (is_logit) return scores;
  const std::vector<double> p = softmax(clean);
  for (size_t e = 0; e < scores.size(); ++e) {
    const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
    const double score = is_softmax ? p[e] : score_of(options.score_function, clean[e]);
    const float bias = expert_bias == nullptr ? 0.0F : expert_bias[e];
    const T biased = static_cast<T>(score) + static_cast<T>(bias);
    if (clean[e] > -kInfinity) {
      scores[e] = std::isnan(biased) ? -std::numeric_limits<T>::infinity() : biased;
    }
  }
  return scores;
}

/// Experts of the best groups: a group is as good as its best logit, or as the sum of its two best
/// scores.
template <typename T>
std::vector<bool> experts_of_groups(const RouterOptions& options, const std::vector<T>& scores,
                                    bool is_sum_of_two) {
  const size_t num_groups = static_cast<size_t>(options.num_groups);
  const size_t group_size = scores.size() / num_groups;
  std::vector<T> group_scores;
  for (size_t g = 0; g < num_groups; ++g) {
    std::vector<T> group(scores.begin() + g * group_size, scores.begin() + (g + 1) * group_size);
    std::sort(group.begin(), group.end(), std::greater<T>());
    const T score = is_sum_of_two ? group[0] + group[1] : group[0];
    group_scores.push_back(std::isnan(score) ? -std::numeric_limits<T>::infinity() : score);
  }
  std::vector<size_t> order(num_groups);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return group_scores[a] > group_scores[b]; });
  std::vector<bool> is_kept(scores.size(), false);
  for (int64_t i = 0; i < options.topk_groups; ++i) {
    for (size_t e = 0; e < group_size; ++e) is_kept[order[i] * group_size + e] = true;
  }
  return is_kept;
}

/// Infinite scores share equally and leave 0 to the others.
std::vector<double> shares_of(std::vector<double> scores) {
  const bool is_infinite = !has_nan(scores) && max_of(scores) == kInfinity;
  double sum = kSumEpsilon;
  for (double& x : scores) sum += x = is_infinite ? (x == kInfinity ? 1.0 : 0.0) : x;
  for (double& x : scores) x /= sum;
  return scores;
}

/// Weights of the selection before route_scale.
std::vector<double> selection_weights(const RouterOptions& options,
                                      const std::vector<double>& logits,
                                      const std::vector<int32_t>& expert_idx) {
  std::vector<double> selected;
  for (const int32_t e : expert_idx) selected.push_back(logits[e]);
  if (options.score_function != ScoreFunction::kSoftmax) {
    for (double& x : selected) x = score_of(options.score_function, x);
    return options.normalize ? shares_of(selected) : selected;
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
  const ScoreFunction score_function = options.score_function;
  if (score_function != ScoreFunction::kSoftmax) {
    double sum = kSumEpsilon, mean = 0;
    for (const double z : selected.logits) sum += score_of(score_function, z);
    if (options.normalize && sum == kInfinity) return;  // a convention, not a function
    for (size_t k = 0; k < selected.grads.size(); ++k) {
      mean += score_of(score_function, selected.logits[k]) / sum * selected.grads[k];
    }
    for (size_t k = 0; k < selected.grads.size(); ++k) {
      const double grad_s =
          options.normalize ? (selected.grads[k] - mean) / sum : selected.grads[k];
      result[selected.expert_idx[k]] += grad_s * slope_of(score_function, selected.logits[k]);
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
  const bool has_bias = expert_bias != nullptr;
  const std::vector<T> scores = selection_scores<T>(options, z, expert_bias, !has_bias);
  std::vector<bool> is_allowed(z.size(), true);
  if (options.num_groups > 1) {
    const bool is_max = options.score_function == ScoreFunction::kSoftmax && !has_bias;
    is_allowed =
        experts_of_groups(options, selection_scores<T>(options, z, expert_bias, is_max), !is_max);
  }
  std::vector<int32_t> by_score(z.size());
  std::iota(by_score.begin(), by_score.end(), 0);
  std::stable_sort(by_score.begin(), by_score.end(), [&](int32_t a, int32_t b) {
    return is_allowed[a] != is_allowed[b] ? bool{is_allowed[a]} : scores[a] > scores[b];
  });
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
    const ScoreFunction score_function = options.score_function;
    const bool is_softmax = score_function == ScoreFunction::kSoftmax;
    const std::vector<double> g(grad.grad_score_sum, grad.grad_score_sum + shape.num_experts);
    // log sigmoid(+inf) = 0 is finite: only a row of -inf has an infinite maximum there.
    const bool is_sigmoid = score_function == ScoreFunction::kSigmoid;
    const std::vector<double> grads =
        softmax_backward(score_shares(score_function, z), g, is_sigmoid ? std::min(max, 0.0) : max);
    for (size_t e = 0; e < grads.size(); ++e) {
      // Where the gradient of the softmax is 0 by convention the slope may not be a number.
      if (grads[e] != 0) {
        result[e] += grads[e] * (is_softmax ? 1.0 : log_slope_of(score_function, z[e]));
      }
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

}  // namespace perseid::kernels
