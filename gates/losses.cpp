#include "gates/losses.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/_unique.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "gates/describe.h"
#include "gates/device.h"
#include "gates/gate_parts.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

void require_by_expert(const char* operation, const char* argument, const at::Tensor& sum) {
  require(sum.defined() && sum.dim() == 1 && sum.is_floating_point(), operation, argument,
          describe(sum), "is not floating [num_experts]");
}

/// scale * counts in double.
at::Tensor scaled_counts(const at::Tensor& counts, double scale, at::Device device) {
  const bool is_plain = counts.is_cpu() && device.is_cpu() && counts.is_contiguous() &&
                        counts.scalar_type() == at::kLong;
  if (!is_plain) return counts.to(device, at::kDouble).mul(scale).contiguous();
  at::Tensor scaled = at::empty(counts.sizes(), at::kDouble);
  const int64_t* const source = counts.const_data_ptr<int64_t>();
  double* const target = scaled.mutable_data_ptr<double>();
  for (int64_t i = 0; i < counts.numel(); ++i) target[i] = static_cast<double>(source[i]) * scale;
  return scaled;
}

bool is_plain_on_cpu(const at::Tensor& sum) {
  return sum.is_cpu() && sum.is_contiguous() &&
         (sum.scalar_type() == at::kFloat || sum.scalar_type() == at::kDouble);
}

/// factor * sum_i slope[i] * sum[i], formed in double, in the type of `sum`.
at::Tensor linear_sum(const at::Tensor& sum, const at::Tensor& slope, double factor) {
  if (!is_plain_on_cpu(sum)) {
    return at::dot(sum.to(at::kDouble), slope).mul(factor).to(sum.scalar_type());
  }
  const double* const slopes = slope.const_data_ptr<double>();
  double total = 0, lost = 0;  // Kahan's sum: perfect balance is exact for any number of experts
  AT_DISPATCH_FLOATING_TYPES(sum.scalar_type(), "linear_sum", [&] {
    const auto* const values = sum.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < sum.numel(); ++i) {
      const double term = static_cast<double>(values[i]) * slopes[i] - lost;
      const double next = total + term;
      lost = (next - total) - term;
      total = next;
    }
  });
  at::Tensor result = at::empty({}, sum.options());
  result.fill_(total * factor);
  return result;
}

/// factor * slope in the type of `sum`.
at::Tensor scaled_slope(const at::Tensor& sum, const at::Tensor& slope, double factor) {
  const double* const slopes = slope.const_data_ptr<double>();
  at::Tensor scaled = at::empty_like(sum);
  AT_DISPATCH_FLOATING_TYPES(sum.scalar_type(), "scaled_slope", [&] {
    auto* const values = scaled.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < sum.numel(); ++i) {
      values[i] = static_cast<scalar_t>(factor * slopes[i]);
    }
  });
  return scaled;
}

/// linear_sum with its gradient: one node of the graph where LibTorch's operations make four, in
/// every step of every layer.
struct LinearSum : torch::autograd::Function<LinearSum> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& sum,
                            const at::Tensor& slope, double factor) {
    ctx->save_for_backward({sum, slope});
    ctx->saved_data["factor"] = factor;
    return linear_sum(sum, slope, factor);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    const at::Tensor &sum = saved[0], &slope = saved[1], &grad = grads[0];
    const double factor = ctx->saved_data["factor"].toDouble();
    const bool has_graph = c10::GradMode::is_enabled();  // of a second derivative
    if (!has_graph && is_plain_on_cpu(sum)) {
      return {scaled_slope(sum, slope, factor * grad.item<double>()), {}, {}};
    }
    return {grad.to(at::kDouble).mul(factor).mul(slope).to(sum.scalar_type()), {}, {}};
  }
};

}  // namespace

NamedLoss load_balance_loss(const BalanceTerms& terms, const at::Tensor& global_tokens_per_expert,
                            int64_t tokens_global, int64_t counted_tokens) {
  constexpr const char* kOperation = "load_balance_loss";
  require(terms.score_sum.defined() && terms.score_sum.dim() == 1, kOperation, "score_sum",
          terms.score_sum.defined() ? to_text(terms.score_sum.sizes()) : "undefined",
          "is not [num_experts]; call it for gates that fill their balance terms");
  require(
      global_tokens_per_expert.defined() &&
          global_tokens_per_expert.sizes() == terms.score_sum.sizes(),
      kOperation, "global_tokens_per_expert",
      global_tokens_per_expert.defined() ? to_text(global_tokens_per_expert.sizes()) : "undefined",
      "differs from score_sum=" + to_text(terms.score_sum.sizes()) +
          "; sum the tokens_per_expert of the same gate over ranks");
  require(tokens_global >= 0, kOperation, "tokens_global", tokens_global, "is negative");
  require(terms.top_k >= 1, kOperation, "top_k", terms.top_k, "is below 1");
  require_coefficient(kOperation, "aux_loss_coeff", terms.aux_loss_coeff);

  // f and the sum in double, so that perfect balance gives the coefficient and not one near it.
  double scale = 0;
  if (counted_tokens < 0) counted_tokens = tokens_global;
  if (tokens_global > 0 && counted_tokens > 0) {
    const double assignments = static_cast<double>(counted_tokens) *
                               (terms.normalize_by_k ? static_cast<double>(terms.top_k) : 1.0);
    scale = static_cast<double>(terms.score_sum.size(0)) / assignments /
            static_cast<double>(tokens_global);
  }
  const at::Tensor f = scaled_counts(global_tokens_per_expert, scale, terms.score_sum.device());
  return {"aux_loss", LinearSum::apply(terms.score_sum, f, terms.aux_loss_coeff),
          linear_sum(terms.score_sum.detach(), f, 1)};
}

NamedLoss sequence_balance_loss(const at::Tensor& score_shares, const at::Tensor& expert_idx,
                                const at::Tensor& sequence, double coeff, bool normalize_by_k,
                                int64_t tokens_global) {
  constexpr const char* kOperation = "sequence_balance_loss";
  require(score_shares.defined() && score_shares.dim() == 2 && score_shares.is_floating_point(),
          kOperation, "score_shares", describe(score_shares), "is not a floating [T, E] table");
  const bool is_table = expert_idx.defined() && expert_idx.dim() == 2 &&
                        expert_idx.size(0) == score_shares.size(0) &&
                        at::isIntegralType(expert_idx.scalar_type(), /*includeBool=*/false);
  require(is_table, kOperation, "expert_idx", describe(expert_idx),
          "is not an integer [T, K] table for score_shares=" + describe(score_shares));
  require(sequence.defined() && sequence.dim() == 1 && sequence.size(0) == score_shares.size(0) &&
              sequence.scalar_type() == at::kLong,
          kOperation, "sequence", describe(sequence),
          "is not Long[" + to_text(score_shares.size(0)) + "], one entry for each token");
  require_coefficient(kOperation, "coeff", coeff);
  require(tokens_global >= 0, kOperation, "tokens_global", tokens_global, "is negative");
  if (expert_idx.numel() > 0) {
    const int64_t largest = expert_idx.max().item<int64_t>();
    require(largest < score_shares.size(1), kOperation, "expert_idx", largest,
            "is outside [-1, num_experts=" + to_text(score_shares.size(1)) + ")");
  }
  const int64_t E = score_shares.size(1), K = expert_idx.size(1);
  const auto [numbers, slot] = at::_unique(sequence, /*sorted=*/true, /*return_inverse=*/true);
  const int64_t num_sequences = numbers.size(0);
  const at::Tensor is_chosen = expert_idx.ge(0);
  const at::Tensor pairs = slot.unsqueeze(1).mul(E).add(expert_idx).masked_select(is_chosen);
  const at::Tensor counts = at::bincount(pairs, {}, num_sequences * E).view({num_sequences, E});
  // Every valid token has K pairs, so the counts of a sequence sum to K times its tokens.
  const double sum_of_f = normalize_by_k ? 1.0 : static_cast<double>(K);
  const at::Tensor f =
      counts.to(at::kDouble).mul(sum_of_f).div(counts.sum(1, /*keepdim=*/true).clamp_min(1));
  const at::Tensor score_sum =
      at::zeros({num_sequences, E}, score_shares.options()).index_add(0, slot, score_shares);
  const double scale =
      tokens_global > 0 ? static_cast<double>(E) / static_cast<double>(tokens_global) : 0.0;
  const at::Tensor raw = score_sum.to(at::kDouble).mul(f).sum(1).sum().mul(scale);
  const at::ScalarType type = score_shares.scalar_type();
  return {"aux_loss", raw.mul(coeff).to(type), raw.detach().to(type)};
}

NamedLoss z_loss(const at::Tensor& lse_square_sum, double coeff, int64_t tokens_global) {
  require(lse_square_sum.defined() && lse_square_sum.numel() == 1, "z_loss", "lse_square_sum",
          lse_square_sum.defined() ? to_text(lse_square_sum.sizes()) : "undefined",
          "is not a scalar");
  require_coefficient("z_loss", "coeff", coeff);
  require(tokens_global >= 0, "z_loss", "tokens_global", tokens_global, "is negative");
  const double scale = tokens_global > 0 ? 1.0 / static_cast<double>(tokens_global) : 0.0;
  return {"z_loss", lse_square_sum.mul(coeff * scale), lse_square_sum.detach().mul(scale)};
}

NamedLoss finish_global_loss(const GlobalLoss& loss, const at::Tensor& global_sum,
                             int64_t tokens_global, int num_ranks) {
  const char* operation = loss.name.c_str();
  require(loss.local_sum.defined() && global_sum.defined() &&
              global_sum.sizes() == loss.local_sum.sizes(),
          operation, "global_sum", global_sum.defined() ? to_text(global_sum.sizes()) : "undefined",
          "differs from the local sum; sum those of the same gate over ranks");
  require(tokens_global >= 0, operation, "tokens_global", tokens_global, "is negative");
  require(num_ranks >= 1, operation, "num_ranks", num_ranks, "is below 1");
  require(std::isfinite(loss.coeff), operation, "coeff", loss.coeff, "is not a finite number");
  require(loss.loss != nullptr, operation, "loss", "empty", "must be a function of the global sum");
  at::Tensor value, slope;
  {
    const at::AutoGradMode grad(true);
    const at::Tensor at_sum = global_sum.detach().clone().requires_grad_(true);
    const at::Tensor raw = loss.loss(at_sum, tokens_global);
    slope = raw.requires_grad() ? torch::autograd::grad({raw}, {at_sum})[0] : at_sum.detach() * 0;
    value = raw.detach();
  }
  const at::Tensor mine = value.div(num_ranks);
  // 0 in value, so that rounding of the local sum does not reach it.
  const at::Tensor change = (slope * (loss.local_sum - loss.local_sum.detach())).sum();
  const at::ScalarType type = loss.local_sum.scalar_type();
  return {loss.name, (change + mine).mul(loss.coeff).to(type), mine.to(type)};
}

at::Tensor weight_per_expert(const Routing& routing, int64_t num_experts) {
  // Sums in the order of tokens, which atomic additions of a GPU would not keep.
  if (is_on_device(routing.weights)) return dense_weights(routing, num_experts).sum(0);
  validate(routing, num_experts, "weight_per_expert");
  return at::zeros({num_experts}, routing.weights.options())
      .index_add(0, routing.expert_idx, routing.weights);
}

GlobalLoss balance_entropy_loss(const at::Tensor& weight_sum, double coeff) {
  require_by_expert("balance_loss", "weight_sum", weight_sum);
  require_coefficient("balance_loss", "coeff", coeff);
  return {"balance_loss", coeff, weight_sum,
          [](const at::Tensor& sum, int64_t /*tokens_global*/) -> at::Tensor {
            const at::Tensor total = sum.sum();
            // Without any weight the mean is 0, not 0/0.
            const at::Tensor divisor = at::where(total == 0, at::ones_like(total), total);
            const at::Tensor mean = at::where(total == 0, at::zeros_like(sum), sum / divisor);
            // An expert without weight adds 0; log of the smallest number keeps its slope finite.
            return (mean * mean.clamp_min(1e-30).log()).sum();
          }};
}

GlobalLoss cv_squared_loss(const std::string& name, const at::Tensor& sum, double coeff) {
  require_by_expert(name.c_str(), "sum", sum);
  require_coefficient(name.c_str(), "coeff", coeff);
  return {name, coeff, sum, [](const at::Tensor& v, int64_t /*tokens_global*/) -> at::Tensor {
            const at::Tensor mean = v.mean();
            return (v - mean).square().mean() / (mean.square() + 1e-10);
          }};
}

}  // namespace perseid::gates
