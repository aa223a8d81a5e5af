#include "gates/tree_parts.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <limits>

#include "kernels/dselect_k.h"
#include "kernels/error.h"

namespace perseid::gates {

using at::Tensor;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// S and 1 - S of kernels/smooth_step.h. The slope in u is 0 at both ends, and the clamp passes no
/// gradient beyond them.
struct Shares {
  Tensor value, complement;
};
Shares smooth_step(const Tensor& z, double gamma) {
  const Tensor u = (z / gamma + 0.5).clamp(0, 1);
  const Tensor v = 1 - u;
  return {u * u * (3 - 2 * u), v * v * (1 + 2 * u)};
}

/// Reach of the two branches below each node, side by side: [N, K, n] becomes [N, K, 2n].
Tensor branch(const Tensor& reach, const Tensor& first, const Tensor& second) {
  return at::stack({reach * first, reach * second}, 3).flatten(2);
}

/// A product of shares counts as 0 below the smallest normal number, as in the kernels.
Tensor without_subnormal(const Tensor& reach) {
  const double smallest = reach.scalar_type() == at::kDouble
                              ? std::numeric_limits<double>::min()
                              : static_cast<double>(std::numeric_limits<float>::min());
  return reach.masked_fill(reach.lt(smallest), 0);
}

/// v [N, K, E]: down the heap, level by level. Leaves of the lowest level come first in the order
/// of leaves.
Tensor tree_reach(const Tensor& splits, double gamma) {
  const Shares left = smooth_step(splits, gamma);
  const int64_t num_splits = splits.size(2);
  Tensor reach = at::ones({splits.size(0), splits.size(1), 1}, splits.options());
  Tensor leaves_above;
  for (int64_t first = 0; first < num_splits; first = 2 * first + 1) {
    const int64_t count = std::min(first + 1, num_splits - first), width = reach.size(2);
    if (count < width) leaves_above = reach.narrow(2, count, width - count);
    reach = branch(reach.narrow(2, 0, count), left.value.narrow(2, first, count),
                   left.complement.narrow(2, first, count));
  }
  return without_subnormal(leaves_above.defined() ? at::cat({reach, leaves_above}, 2) : reach);
}

/// r [N, K, E]: bit by bit, the most significant one first.
Tensor code_reach(const Tensor& codes, int64_t num_experts, double gamma) {
  const Shares one = smooth_step(codes, gamma);
  Tensor reach = at::ones({codes.size(0), codes.size(1), 1}, codes.options());
  for (int64_t b = 0; b < codes.size(2); ++b) {
    reach = branch(reach, one.complement.narrow(2, b, 1), one.value.narrow(2, b, 1));
  }
  return without_subnormal(reach.narrow(2, 0, num_experts));
}

/// e^(logit - max). An infinite max counts the logits that equal it, and passes no gradient.
Tensor shares_of_max(const Tensor& logits, const Tensor& max) {
  const auto number = [&](double value) { return at::scalar_tensor(value, logits.options()); };
  const Tensor of_infinite = at::where(logits.detach().eq(max), number(0), number(-kInfinity));
  return at::where(max.isfinite(), logits - max, of_infinite).exp();
}

/// Sum over parts and outputs, [N, 1, 1].
Tensor total_of(const Tensor& weights) { return weights.sum({1, 2}, /*keepdim=*/true); }

/// Tokens with a NaN in a logit: NaN for output u of part u alone, so that the sum over parts has
/// it where the kernels have it.
Tensor with_nan_rule(const Tensor& weights, const Tensor& has_nan) {
  const Tensor rows = has_nan.view({-1, 1, 1});
  const Tensor is_own =
      at::eye(weights.size(1), weights.size(2), weights.options().dtype(at::kBool));
  return weights.masked_fill(rows, 0).masked_fill(rows.logical_and(is_own), kNaN);
}

}  // namespace

Tensor checked_expert_map(const Tensor& expert_map, const Gate& gate, c10::Device device,
                          const char* operation) {
  if (!expert_map.defined()) return {};
  require_shape(expert_map, {gate.top_k(), gate.num_experts()}, operation, "expert_map");
  require(expert_map.scalar_type() == at::kInt, operation, "expert_map.dtype",
          expert_map.scalar_type(), "is not int32");
  require(expert_map.device() == device, operation, "expert_map.device", expert_map.device(),
          "differs from tokens.device=" + to_text(device));
  return expert_map.contiguous();
}

Tensor one_expert_tree_weights(const GateInput& input) {
  const at::ScalarType type = input.tokens.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return for_tokens(at::ones({1, 1, 1}, input.tokens.options().dtype(type).requires_grad(false)),
                    input);
}

Tensor comet_tree_weights(const Tensor& splits, const Tensor& leaves, int64_t num_trees,
                          double gamma) {
  const Tensor z = splits.unflatten(1, {num_trees, -1}), a = leaves.unflatten(1, {num_trees, -1});
  const Tensor v = tree_reach(z, gamma);
  const Tensor is_unreached = v.detach().eq(0);
  // What is not reached has no influence, whatever its a, which may be much larger than the rest.
  const Tensor reached = a.masked_fill(is_unreached, -kInfinity);
  const Tensor max = reached.detach().amax({1, 2}, /*keepdim=*/true);
  const Tensor factor = shares_of_max(reached, max).masked_fill(is_unreached, 0);
  const Tensor products = factor * v;
  const Tensor weights = products / total_of(products);
  const Tensor has_nan = splits.detach().isnan().any(1).logical_or(leaves.detach().isnan().any(1));
  return with_nan_rule(at::where(max.isfinite(), weights, weights.detach()), has_nan);
}

Tensor dselect_k_tree_weights(const Tensor& logits, int64_t num_experts, int64_t num_selectors,
                              double gamma, bool renormalize) {
  const int64_t num_switches = num_selectors * kernels::dselect_k_bits(num_experts);
  const Tensor codes = logits.narrow(1, 0, num_switches).unflatten(1, {num_selectors, -1});
  const Tensor omega = logits.narrow(1, num_switches, num_selectors);
  const Tensor shares = shares_of_max(omega, omega.detach().amax({1}, /*keepdim=*/true));
  const Tensor alpha = shares / shares.sum(1, /*keepdim=*/true);
  Tensor weights = alpha.unsqueeze(2) * code_reach(codes, num_experts, gamma);
  if (renormalize) {
    const Tensor total = total_of(weights);
    weights = weights / total.masked_fill(total.detach().eq(0), 1);
  }
  return with_nan_rule(weights, logits.detach().isnan().any(1));
}

Tensor for_tokens(const Tensor& weights, const GateInput& input) {
  const Tensor rows = weights.expand({input.tokens.size(0), weights.size(1), weights.size(2)});
  if (!input.valid.has_value()) return rows;
  return rows.masked_fill(input.valid->logical_not().view({-1, 1, 1}), 0);
}

}  // namespace perseid::gates
