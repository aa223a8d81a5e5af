#pragma once
#include <ATen/ATen.h>

#include "gates/dselect_k_gate.h"
#include "kernels/dselect_k.h"
#include "tests/gates/gate_test.h"

namespace perseid::testing {

using gates::DSelectKGate;
using gates::DSelectKGateOptions;
using gates::InputNorm;

/// A gate whose parameters are uniform in +-scale; about a third of the switches of random tokens
/// is saturated at the default scale.
inline std::shared_ptr<DSelectKGate> random_gate(DSelectKGateOptions options, double scale = 1,
                                                 at::ScalarType type = at::kDouble,
                                                 InputNorm norm = InputNorm::kNone) {
  auto gate = std::make_shared<DSelectKGate>(options.input_norm(norm));
  gate->to(type);
  uint64_t seed = 20;
  for (Tensor& parameter : gate->parameters()) {
    parameter.set_data(random_tensor(parameter.sizes(), ++seed, -scale, scale, type));
  }
  return gate;
}

/// A float64 gate that has these logits for every token.
inline std::shared_ptr<DSelectKGate> gate_with_logits(const DSelectKGateOptions& options,
                                                      const std::vector<double>& codes,
                                                      const std::vector<double>& selectors) {
  auto gate = random_gate(options, 0);
  gate->code_bias.set_data(vector_of(codes));
  gate->selector_bias.set_data(vector_of(selectors));
  return gate;
}

struct ReferenceDSelectK {
  Tensor weights;      ///< [T, E]
  Tensor entropy_sum;  ///< scalar
  Tensor penalty_sum;  ///< scalar
};

/// The formulas in ordinary differentiable operations.
/// @param codes      [T, K*bits]
/// @param selectors  [T, K]
inline ReferenceDSelectK reference_dselect_k(const Tensor& codes, const Tensor& selectors,
                                             int64_t num_experts, double gamma) {
  const int64_t T = selectors.size(0), K = selectors.size(1);
  const Tensor u = (codes.view({T, K, -1}) / gamma + .5).clamp(0, 1);
  const Tensor s = u * u * (3 - 2 * u);
  Tensor reach = at::ones({T, K, 1}, selectors.options());
  for (int64_t b = 0; b < s.size(2); ++b) {  // each bit appends itself to the number
    const Tensor one = s.narrow(2, b, 1);
    reach = at::stack({reach * (1 - one), reach * one}, 3).flatten(2);
  }
  const Tensor r = reach.narrow(2, 0, num_experts);
  return {(selectors.softmax(1).unsqueeze(2) * r).sum(1), -(r * (r + 1e-6).log()).sum(),
          (1 / (1e-6 + r.sum(2))).sum()};
}

inline ReferenceDSelectK reference_of(const DSelectKGate& gate, const Tensor& tokens) {
  return reference_dselect_k(at::linear(tokens, gate.code_weight, gate.code_bias),
                             at::linear(tokens, gate.selector_weight, gate.selector_bias),
                             gate.num_experts(), gate.options().gamma());
}

}  // namespace perseid::testing
