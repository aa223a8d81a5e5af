// DSelect-k by its definitions: one token after the other, each r by the product of its bits, each
// derivative by the product of the other bits. Sums in double.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/dselect_k_token.h"

namespace perseid::kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Selector {
  std::vector<SmoothStep<double>> switches;
  std::vector<double> soft_reach;  ///< r
  std::vector<double> reach;       ///< r, one-hot with hard_eval
  std::vector<size_t> experts;     ///< of the codes
  double mass = 0;
  double alpha = 0;
};

struct Token {
  std::vector<Selector> selectors;
  std::vector<double> weights;  ///< before the cut-off
  double divisor = 1;
  double max = -kInfinity;  ///< of omega
  bool has_nan = false;
  bool is_non_finite = false;
  int64_t num_switches = 0;
  int64_t saturated_switches = 0;
};

/// +1 or -1: the switch of bit b of code j stands on 1 or on 0.
double sign_of(int64_t j, int64_t b, int64_t bits) { return (j >> (bits - 1 - b)) & 1 ? 1 : -1; }

/// The product of the shares of the bits of code j but for bit `left_out`.
double product(const Selector& selector, int64_t j, int64_t left_out = -1) {
  const auto bits = static_cast<int64_t>(selector.switches.size());
  double result = 1;
  for (int64_t b = 0; b < bits; ++b) {
    const SmoothStep<double>& step = selector.switches[static_cast<size_t>(b)];
    if (b != left_out) result *= sign_of(j, b, bits) > 0 ? step.value : step.complement;
  }
  return result;
}

template <typename T>
Selector read_selector(const T* z, int64_t num_experts, const DSelectKOptions& options) {
  Selector selector;
  const auto gamma = static_cast<double>(static_cast<T>(options.gamma));
  for (int64_t b = 0; b < dselect_k_bits(num_experts); ++b) {
    selector.switches.push_back(smooth_step(static_cast<double>(z[b]), gamma));
  }
  int64_t largest = 0;
  for (int64_t j = 0; j < num_experts; ++j) {
    const double r = product(selector, j);
    selector.soft_reach.push_back(r < static_cast<double>(std::numeric_limits<T>::min()) ? 0 : r);
    selector.mass += selector.soft_reach.back();
    if (r > selector.soft_reach[static_cast<size_t>(largest)]) largest = j;
  }
  selector.reach = selector.soft_reach;
  for (int64_t j = 0; j < num_experts && options.hard_eval; ++j) {
    double& r = selector.reach[static_cast<size_t>(j)];
    r = j == largest && r > 0 ? 1 : 0;
  }
  return selector;
}

template <typename T>
Token read_token(const DSelectKShape& shape, const DSelectKOptions& options,
                 const DSelectKInput& input, int64_t t) {
  const int64_t E = shape.num_experts, K = shape.num_selectors, bits = dselect_k_bits(E);
  const T* const row = static_cast<const T*>(input.logits) + t * K * (bits + 1);
  Token token;
  for (int64_t n = 0; n < K * (bits + 1); ++n) {
    token.has_nan |= std::isnan(row[n]);
    token.is_non_finite |= !std::isfinite(row[n]);
  }
  if (token.has_nan) return token;
  const T* const omega = row + K * bits;
  for (int64_t i = 0; i < K; ++i) {
    token.selectors.push_back(read_selector(row + i * bits, E, options));
    for (int64_t j = 0; j < E; ++j) {
      const int64_t expert = input.expert_map == nullptr ? j : input.expert_map[i * E + j];
      token.selectors.back().experts.push_back(static_cast<size_t>(expert));
    }
    token.max = std::max(token.max, static_cast<double>(omega[i]));
    for (const SmoothStep<double>& step : token.selectors.back().switches) {
      ++token.num_switches;
      token.saturated_switches += step.slope == 0 ? 1 : 0;
    }
  }
  double sum = 0;
  for (int64_t i = 0; i < K; ++i) {
    const auto logit = static_cast<double>(omega[i]);
    Selector& selector = token.selectors[static_cast<size_t>(i)];
    selector.alpha = logit == token.max ? 1 : std::exp(logit - token.max);
    sum += selector.alpha;
  }
  double total = 0;
  token.weights.assign(static_cast<size_t>(E), 0.0);
  for (Selector& selector : token.selectors) {
    selector.alpha /= sum;
    for (size_t j = 0; j < selector.reach.size(); ++j) {
      token.weights[selector.experts[j]] += selector.alpha * selector.reach[j];
    }
  }
  for (const double weight : token.weights) total += weight;
  if (options.renormalize && total > 0) token.divisor = total;
  for (double& weight : token.weights) weight /= token.divisor;
  return token;
}

bool is_valid(const DSelectKInput& input, int64_t t) {
  return input.valid == nullptr || input.valid[t] != 0;
}

struct Sums {
  double entropy = 0, penalty = 0, removed = 0;
  int64_t switches = 0, saturated = 0, non_finite = 0;
};

void add_losses(const Token& token, Sums& sums) {
  for (const Selector& selector : token.selectors) {
    for (const double r : selector.soft_reach) sums.entropy -= r * std::log(r + kEntropyEpsilon);
    sums.penalty += 1 / (kPenaltyEpsilon + selector.mass);
  }
}

template <typename T>
void forward(const DSelectKShape& shape, const DSelectKOptions& options, const DSelectKInput& input,
             const DSelectKOutput& output) {
  const int64_t E = shape.num_experts;
  Sums sums;
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    std::vector<double> weights(static_cast<size_t>(E), 0.0);
    if (is_valid(input, t)) {
      const Token token = read_token<T>(shape, options, input, t);
      sums.switches += token.num_switches;
      sums.saturated += token.saturated_switches;
      sums.non_finite += token.is_non_finite ? 1 : 0;
      add_losses(token, sums);
      if (token.has_nan) {
        std::fill_n(weights.begin(), shape.num_selectors, kNaN);
        sums.entropy = sums.penalty = sums.removed = kNaN;
      } else {
        weights = token.weights;
      }
    }
    for (int64_t m = 0; m < E; ++m) {
      double& g = weights[static_cast<size_t>(m)];
      if (g < options.min_weight) {
        sums.removed += g;
        g = 0;
      }
      if (output.weights != nullptr) static_cast<T*>(output.weights)[t * E + m] = static_cast<T>(g);
    }
  }
  if (output.entropy_sum != nullptr) *output.entropy_sum = sums.entropy;
  if (output.penalty_sum != nullptr) *output.penalty_sum = sums.penalty;
  if (output.removed_weight != nullptr) *output.removed_weight = sums.removed;
  if (output.num_switches != nullptr) *output.num_switches = sums.switches;
  if (output.saturated_switches != nullptr) *output.saturated_switches = sums.saturated;
  if (output.non_finite_tokens != nullptr) *output.non_finite_tokens = sums.non_finite;
}

/// dL/d(weights before they are renormalised), from what may be read of dL/dg.
template <typename T>
std::vector<double> weight_gradients(const Token& token, const DSelectKOptions& options,
                                     const T* weights, const T* grad_weights) {
  std::vector<double> rho(token.weights.size(), 0.0);
  double mean = 0;
  for (size_t j = 0; j < rho.size() && grad_weights != nullptr; ++j) {
    if (!(weights[j] > 0)) continue;
    rho[j] = static_cast<double>(grad_weights[j]);
    mean += static_cast<double>(weights[j]) * rho[j];
  }
  for (double& value : rho) {
    if (options.renormalize) value = (value - mean) / token.divisor;
  }
  return rho;
}

/// Gradients of one token, [K*bits + K].
std::vector<double> token_gradients(const Token& token, const DSelectKShape& shape,
                                    const DSelectKOptions& options, const std::vector<double>& rho,
                                    double entropy_coeff, double penalty_coeff) {
  const int64_t E = shape.num_experts, bits = dselect_k_bits(E);
  std::vector<double> of_z, of_alpha;
  double mean = 0;
  for (const Selector& selector : token.selectors) {
    std::vector<double> of_bits(static_cast<size_t>(bits), 0.0);
    of_alpha.push_back(0);
    for (int64_t j = 0; j < E; ++j) {
      const auto at = static_cast<size_t>(j);
      const double of_weight = rho[selector.experts[at]];
      of_alpha.back() += selector.reach[at] * of_weight;
      const double r = selector.soft_reach[at];
      if (r == 0) continue;
      const double mass = selector.mass + kPenaltyEpsilon;
      const double of_reach =
          (options.hard_eval ? 0 : selector.alpha * of_weight) - penalty_coeff / (mass * mass) +
          entropy_coeff * (-std::log(r + kEntropyEpsilon) - r / (r + kEntropyEpsilon));
      for (int64_t b = 0; b < bits; ++b) {
        of_bits[static_cast<size_t>(b)] += selector.switches[static_cast<size_t>(b)].slope *
                                           of_reach * sign_of(j, b, bits) * product(selector, j, b);
      }
    }
    mean += selector.alpha * of_alpha.back();
    of_z.insert(of_z.end(), of_bits.begin(), of_bits.end());
  }
  for (size_t i = 0; i < of_alpha.size(); ++i) {
    const double alpha = std::isfinite(token.max) ? token.selectors[i].alpha : 0;
    of_z.push_back(alpha * (of_alpha[i] - mean));
  }
  return of_z;
}

template <typename T>
void backward(const DSelectKShape& shape, const DSelectKOptions& options,
              const DSelectKInput& input, const DSelectKGradInput& grad, T* grad_logits) {
  const int64_t E = shape.num_experts;
  const int64_t row_size = shape.num_selectors * (dselect_k_bits(E) + 1);
  const auto* const weights = static_cast<const T*>(grad.weights);
  const auto* const grad_weights = static_cast<const T*>(grad.grad_weights);
  const double entropy_coeff = grad.grad_entropy_sum == nullptr ? 0.0 : *grad.grad_entropy_sum;
  const double penalty_coeff = grad.grad_penalty_sum == nullptr ? 0.0 : *grad.grad_penalty_sum;
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    std::vector<double> row(static_cast<size_t>(row_size), 0.0);
    if (is_valid(input, t)) {
      const Token token = read_token<T>(shape, options, input, t);
      if (token.has_nan) {
        std::fill(row.begin(), row.end(), kNaN);
      } else {
        const auto rho =
            weight_gradients(token, options, weights == nullptr ? nullptr : weights + t * E,
                             grad_weights == nullptr ? nullptr : grad_weights + t * E);
        row = token_gradients(token, shape, options, rho, entropy_coeff, penalty_coeff);
      }
    }
    for (int64_t n = 0; n < row_size; ++n) {
      grad_logits[t * row_size + n] = static_cast<T>(row[static_cast<size_t>(n)]);
    }
  }
}

}  // namespace

void check_dselect_k(const char* operation, const DSelectKShape& shape,
                     const DSelectKOptions& options, const DSelectKInput& input) {
  const int64_t E = shape.num_experts, K = shape.num_selectors;
  require_count(operation, "num_tokens", shape.num_tokens);
  require(E >= 1 && E <= std::numeric_limits<int32_t>::max(), operation, "num_experts", E,
          "is outside [1, 2147483647]");
  require(K >= 1 && K <= E, operation, "num_selectors", K,
          "is outside [1, num_experts=" + to_text(E) + "]");
  require(std::isnormal(static_cast<float>(options.gamma)) && options.gamma > 0, operation, "gamma",
          options.gamma, "is not a finite number above 0");
  require(options.min_weight >= 0 && options.min_weight < 1, operation, "min_weight",
          options.min_weight, "is outside [0, 1)");
  require_buffer(operation, "logits", input.logits, shape.num_tokens * K * (dselect_k_bits(E) + 1));
}

void check_dselect_k_grad(const char* operation, const DSelectKShape& shape,
                          const DSelectKGradInput& grad, const void* grad_logits) {
  const int64_t E = shape.num_experts;
  if (grad.grad_weights != nullptr) {
    require_buffer(operation, "weights", grad.weights, shape.num_tokens * E);
  }
  require_buffer(operation, "grad_logits", grad_logits,
                 shape.num_tokens * shape.num_selectors * (dselect_k_bits(E) + 1));
}

void dselect_k_reference(const DSelectKShape& shape, const DSelectKOptions& options, DType dtype,
                         const DSelectKInput& input, const DSelectKOutput& output) {
  check_dselect_k("dselect_k", shape, options, input);
  dispatch_float_dtype(dtype, "dselect_k",
                       [&](auto tag) { forward<decltype(tag)>(shape, options, input, output); });
}

void dselect_k_backward_reference(const DSelectKShape& shape, const DSelectKOptions& options,
                                  DType dtype, const DSelectKInput& input,
                                  const DSelectKGradInput& grad, void* grad_logits) {
  check_dselect_k("dselect_k_backward", shape, options, input);
  check_dselect_k_grad("dselect_k_backward", shape, grad, grad_logits);
  dispatch_float_dtype(dtype, "dselect_k_backward", [&](auto tag) {
    using T = decltype(tag);
    backward<T>(shape, options, input, grad, static_cast<T*>(grad_logits));
  });
}

}  // namespace perseid::kernels
