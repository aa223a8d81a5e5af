#pragma once
#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gates/routing.h"

namespace perseid::gates {

/// What a gate is given. Only `tokens` is needed by every gate.
struct GateInput {
  at::Tensor tokens;                   ///< [T, D] any floating type
  std::optional<at::Tensor> keys;      ///< [T] int64, for hash gates: token id, user id, sample id
  std::optional<at::Tensor> valid;     ///< [T] bool, true = a real token; absent: all are
  std::optional<at::Tensor> sequence;  ///< [T] int64 sequence number, for sequence-level balancing
  int64_t first_token = 0;             ///< global id of token 0 of this rank
  int64_t tokens_global =
      0;             ///< valid tokens of all ranks, the divisor of every mean; 0: those given here
  int64_t step = 0;  ///< optimiser step, a key of randomness
  double progress = 0;  ///< of the training, in [0, 1]; clamped. Schedules read nothing else
  bool training = false;
};

/// A loss that is ready to be added: its coefficient is applied, and the sum over ranks is the
/// loss.
struct NamedLoss {
  std::string name;
  at::Tensor value;  ///< scalar, differentiable
  at::Tensor raw;    ///< scalar without the coefficient, no gradient
};

/// Local terms of the load-balance loss. The caller sums tokens_per_expert over ranks and calls
/// load_balance_loss (gates/losses.h); undefined score_sum: this gate has no such loss.
struct BalanceTerms {
  at::Tensor score_sum;          ///< [E] sum of scores over the local valid tokens, differentiable
  at::Tensor tokens_per_expert;  ///< [E] int64, local assignments
  double aux_loss_coeff = 0;
  int64_t top_k = 1;  ///< nominal K, for normalisation
  bool normalize_by_k = true;
};

/// Counts of the local tokens; values only. Sums over ranks are sums of the fields.
struct GateStats {
  at::Tensor tokens_per_expert;  ///< [E] int64
  int64_t num_tokens = 0;        ///< valid tokens
  int64_t num_assignments = 0;
  int64_t tokens_without_expert = 0;
  int64_t non_finite_tokens = 0;
};

struct GateOutput {
  Routing routing;
  std::vector<NamedLoss> losses;
  BalanceTerms balance;
  GateStats stats;
};

/// A router. To add one, derive from Gate and write forward; examples/custom_gate shows it.
/// forward is pure: it depends on parameters, buffers and input, stores nothing, and never
/// communicates. Gate arithmetic and weights are float32 (float64 if the parameters are float64)
/// whatever the type of the tokens. The backward may use d(loss)/d(weights) and nothing else of the
/// experts. Random choices are keyed by (seed, step, layer, gate, global token id).
class Gate : public torch::nn::Module {
 public:
  /// @param top_k  nominal K: capacity and load balance use it. Throws ConfigError unless 1 <= K <=
  /// E
  Gate(std::string name, int64_t num_experts, int64_t top_k);

  virtual GateOutput forward(const GateInput& input) = 0;

  /// Moves state that is not trained by gradients (balancing biases, counters). Called once per
  /// optimiser step, in training, with statistics summed over all ranks. Default: nothing.
  virtual void after_step(const GateStats& global_stats);

  int64_t num_experts() const { return num_experts_; }
  int64_t top_k() const { return top_k_; }

 private:
  int64_t num_experts_;
  int64_t top_k_;
};

enum class InputNorm : uint8_t { kNone, kLayerNorm };

/// Tokens in the type of the gate's arithmetic, normalised: kLayerNorm is layer norm without affine
/// part, epsilon 1e-5, then times 1/sqrt(D).
at::Tensor gate_features(const at::Tensor& tokens, InputNorm norm, at::ScalarType compute_type);

/// Throws ConfigError unless input.tokens is [T, d_model] (d_model < 0: any) floating, and keys,
/// valid and sequence have T entries of the right type.
void validate(const GateInput& input, int64_t d_model, const char* operation);

/// Statistics of a routing. One pass over the assignments.
GateStats count_assignments(const Routing& routing, int64_t num_experts, int64_t num_valid_tokens);

}  // namespace perseid::gates
