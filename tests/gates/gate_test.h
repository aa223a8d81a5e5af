#pragma once
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "gates/losses.h"
#include "gates/top_k_gate.h"
#include "tests/closed_form.h"

// What the tests of the gates share: a plain reference of the top-k router and short calls.

namespace perseid::testing {

using at::Tensor;
using gates::GateInput;
using gates::GateOutput;
using gates::Normalization;
using gates::Routing;
using gates::TopKGate;
using gates::TopKGateOptions;
using kernels::ScoreFunction;

inline constexpr ScoreFunction kScoreFunctions[] = {
    ScoreFunction::kSoftmax, ScoreFunction::kSigmoid, ScoreFunction::kSqrtSoftplus};

inline Tensor vector_of(const std::vector<double>& values) {
  return at::tensor(values, at::kDouble);
}
inline std::vector<int64_t> ids_of(const Tensor& tensor) {
  const Tensor values = tensor.to(at::kLong).contiguous();
  return {values.data_ptr<int64_t>(), values.data_ptr<int64_t>() + values.numel()};
}

/// A gate in float64 whose weight is `weight` [E, D].
inline std::shared_ptr<TopKGate> float64_gate(const TopKGateOptions& options,
                                              const Tensor& weight = {}, const Tensor& bias = {}) {
  auto gate = std::make_shared<TopKGate>(options);
  gate->to(at::kDouble);
  if (weight.defined()) gate->weight.set_data(weight.to(at::kDouble).clone());
  if (bias.defined()) gate->bias.set_data(bias.to(at::kDouble).clone());
  return gate;
}

/// A gate whose logits are `logits` [E] for the one token `one_token()`.
inline std::shared_ptr<TopKGate> gate_with_logits(TopKGateOptions options,
                                                  const std::vector<double>& logits) {
  options.d_model(1).num_experts(static_cast<int64_t>(logits.size()));
  return float64_gate(options, vector_of(logits).unsqueeze(1));
}
inline GateInput input_of(const Tensor& tokens, const std::optional<Tensor>& valid = {}) {
  GateInput input;
  input.tokens = tokens;
  input.valid = valid;
  return input;
}
inline GateInput one_token() { return input_of(at::ones({1, 1}, at::kDouble)); }

/// The aux loss of an output over its own tokens.
inline gates::NamedLoss aux_loss(const GateOutput& output, int64_t tokens_global = -1) {
  return gates::load_balance_loss(output.balance, output.balance.tokens_per_expert,
                                  tokens_global >= 0 ? tokens_global : output.stats.num_tokens);
}

inline Tensor dense(const GateOutput& output, int64_t num_experts) {
  return gates::dense_weights(output.routing, num_experts);
}

/// Value of a global loss of an output over its own tokens.
inline Tensor global_loss(const GateOutput& output, size_t i = 0) {
  return gates::finish_global_loss(output.global_losses[i],
                                   output.global_losses[i].local_sum.detach(),
                                   output.stats.num_tokens, 1)
      .value;
}

struct ReferenceRouter {
  Tensor weights;         ///< [T, E], 0 outside the selection
  Tensor score_sum;       ///< [E]
  Tensor lse_square_sum;  ///< scalar
};

/// The formulas of the router in ordinary differentiable operations, every row valid.
inline ReferenceRouter reference_router(const Tensor& logits, const TopKGateOptions& options) {
  const bool softmax = options.score_function() == ScoreFunction::kSoftmax;
  const bool normalize = options.normalization() == Normalization::kSelected ||
                         (options.normalization() == Normalization::kAuto && options.top_k() > 1);
  const Tensor order = std::get<1>(at::sort(logits.detach(), /*stable=*/true, 1, true));
  const Tensor selected = at::zeros_like(logits).scatter(1, order.slice(1, 0, options.top_k()), 1);
  const Tensor scores = softmax ? logits.softmax(1)
                        : options.score_function() == ScoreFunction::kSigmoid
                            ? logits.sigmoid()
                            : at::softplus(logits).sqrt();
  ReferenceRouter result;
  result.weights = scores * selected;
  if (normalize) result.weights = result.weights / result.weights.sum(1, /*keepdim=*/true);
  result.weights = result.weights * options.route_scale();
  result.score_sum = (scores / scores.sum(1, /*keepdim=*/true)).sum(0);
  result.lse_square_sum = logits.logsumexp(1).square().sum();
  return result;
}

/// Text of the ConfigError that `call` throws, "no error" if there is none.
template <typename Exception, typename Call>
std::string error_text(const Call& call) {
  try {
    call();
  } catch (const Exception& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace perseid::testing
