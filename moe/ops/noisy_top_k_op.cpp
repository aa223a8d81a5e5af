#include "gates/noisy_top_k_gate.h"

#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

gates::GateOutput run(const Arguments& arguments) {
  constexpr const char* kName = "noisy_top_k_gate";
  const Tensor weight = router_matrix(kName, arguments);
  const Tensor noise_weight = arguments.tensor("noise_weight");
  const int64_t E = weight.size(0), D = weight.size(1);
  require_sizes(kName, "noise_weight", noise_weight, {E, D});
  const auto options =
      with_key(gates::NoisyTopKGateOptions(D, E), arguments)
          .top_k(arguments.integer("top_k"))
          .noise(noise_weight.defined() ? gates::RouterNoise::kLearned : gates::RouterNoise::kFixed)
          .noise_epsilon(arguments.real("noise_epsilon"))
          .noise_std(arguments.real("noise_std"))
          .importance_coeff(arguments.real("importance_coeff"))
          .load_coeff(arguments.real("load_coeff"))
          .input_norm(input_norm(arguments));
  gates::NoisyTopKGate gate(options);
  gate.weight = weight;
  gate.noise_weight = noise_weight;
  return gate.forward(gate_input(arguments, arguments.tensor("tokens")));
}

}  // namespace

// With noise_weight the noise is learnt (Shazeer), without it is fixed (V-MoE).
GateOp noisy_top_k_op() {
  return {"noisy_top_k_gate",
          "Tensor tokens, Tensor weight, Tensor? noise_weight=None, *, int top_k, "
          "float noise_epsilon=0.01, float noise_std=1.0, float importance_coeff=0.1, "
          "float load_coeff=0.1, bool layer_norm=False, " PERSEID_COMMON_ARGUMENTS,
          {"tokens", "weight", "noise_weight"},
          {"importance_loss", "load_loss"},
          &linear_shape,
          &run};
}

}  // namespace perseid::ops
