#pragma once
#include "gates/comet_gate.h"
#include "tests/gates/gate_test.h"

namespace perseid::testing {

using gates::CometGate;
using gates::CometGateOptions;
using gates::InputNorm;

/// A gate whose parameters are uniform in +-scale; about a third of the
/// switches of random tokens is saturated at the default scale.
inline std::shared_ptr<CometGate> random_gate(CometGateOptions options, double scale = 1,
                                              at::ScalarType type = at::kDouble,
                                              InputNorm norm = InputNorm::kNone) {
  auto gate = std::make_shared<CometGate>(options.input_norm(norm));
  gate->to(type);
  uint64_t seed = 20;
  for (Tensor& parameter : gate->parameters()) {
    parameter.set_data(random_tensor(parameter.sizes(), ++seed, -scale, scale, type));
  }
  return gate;
}

/// A float64 gate that has these logits for every token.
inline std::shared_ptr<CometGate> gate_with_logits(CometGateOptions options, const Tensor& splits,
                                                   const Tensor& leaves) {
  auto gate = random_gate(options, 0);
  gate->split_bias.set_data(splits.to(at::kDouble).reshape({-1}).clone());
  gate->leaf_bias.set_data(leaves.to(at::kDouble).reshape({-1}).clone());
  return gate;
}

struct ReferenceComet {
  Tensor weights;      ///< [T, E]
  Tensor entropy_sum;  ///< scalar
};

/// v of the leaves below `node`, in depth-first order, each [T].
inline void reference_leaves(const Tensor& left, int64_t node, const Tensor& reach,
                             std::vector<Tensor>& leaves) {
  if (node >= left.size(1)) {
    leaves.push_back(reach);
    return;
  }
  const Tensor h = left.select(1, node);
  reference_leaves(left, 2 * node + 1, reach * h, leaves);
  reference_leaves(left, 2 * node + 2, reach * (1 - h), leaves);
}

/// The formulas in ordinary differentiable operations.
/// @param splits  [T, K, E-1]
/// @param leaves  [T, K, E]
inline ReferenceComet reference_comet(const Tensor& splits, const Tensor& leaves, double gamma) {
  std::vector<Tensor> trees;
  for (int64_t i = 0; i < leaves.size(1); ++i) {
    const Tensor u = (splits.select(1, i) / gamma + .5).clamp(0, 1);
    std::vector<Tensor> reach;
    reference_leaves(u * u * (3 - 2 * u), 0, at::ones({leaves.size(0)}, leaves.options()), reach);
    trees.push_back(at::stack(reach, 1));
  }
  const Tensor v = at::stack(trees, 1);
  const Tensor max = leaves.detach().masked_fill(v.detach().le(0), -INFINITY).amax({1, 2}, true);
  const Tensor share = (leaves - max).clamp_max(0).exp() * v;
  return {share.sum(1) / share.sum(at::IntArrayRef({1, 2})).unsqueeze(1),
          -(v * (v + 1e-6).log()).sum()};
}

}  // namespace perseid::testing
