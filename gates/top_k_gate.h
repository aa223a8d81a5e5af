#pragma once
#include <torch/arg.h>

#include "gates/gate.h"
#include "kernels/router.h"

namespace perseid::gates {

/// How the weights of the K selected experts are formed.
enum class Normalization : uint8_t {
  kAuto,      ///< kSelected for K >= 2, kAll for K = 1 (where kSelected has no gradient)
  kSelected,  ///< over the selection: weights sum to route_scale (Shazeer, Megatron, Mixtral)
  kAll,       ///< over all experts, not renormalised (Switch); sigmoid scores as they are
};

struct TopKGateOptions {
  TopKGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k) = 2;
  TORCH_ARG(kernels::ScoreFunction, score_function) = kernels::ScoreFunction::kSoftmax;
  TORCH_ARG(Normalization, normalization) = Normalization::kAuto;
  TORCH_ARG(double, route_scale) = 1.0;
  TORCH_ARG(double, aux_loss_coeff) = 1e-2;  ///< load-balance loss; 0 switches it off
  TORCH_ARG(double, z_loss_coeff) = 0.0;
  TORCH_ARG(bool, normalize_by_k) = true;  ///< aux loss is 1 * coeff at balance; false: K * coeff
  TORCH_ARG(InputNorm, input_norm) = InputNorm::kNone;
  TORCH_ARG(bool, bias) = false;  ///< a bias per expert in the logits, starts at 0
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// Exactly K experts per token by a linear router, softmax or sigmoid scores.
/// Parameters: weight [E, D] (Glorot uniform, keyed by seed, layer and gate; equal on every rank)
/// and bias [E] if asked for. Formulas: kernels/router.h. Losses: "z_loss" if its coefficient is
/// not 0; the balance terms if aux_loss_coeff is not 0. Saves the tokens as they are and 4*K bytes
/// per token (8*K with input.valid) for the backward, which forms the logits again. No second
/// derivatives.
class TopKGate : public Gate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit; warns once if the
  /// explicit normalisation leaves the router without a gradient (K = 1, kSelected).
  explicit TopKGate(const TopKGateOptions& options);
  GateOutput forward(const GateInput& input) override;

  const TopKGateOptions& options() const { return options_; }
  at::Tensor weight;  ///< [E, D]
  at::Tensor bias;    ///< [E] or undefined

 private:
  TopKGateOptions options_;
};

}  // namespace perseid::gates
