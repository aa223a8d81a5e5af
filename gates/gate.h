#pragma once
#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
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
  int64_t first_token = 0;             ///< global id of token 0 of this rank, below 2^32
  int64_t tokens_global =
      0;             ///< valid tokens of all ranks, the divisor of every mean; 0: those given here
  int64_t step = 0;  ///< optimiser step, a key of randomness
  /// On a GPU a gate may leave counts there, see GateStats::unread, so that the host need not wait.
  bool defer_counts = false;
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

/// A loss that is not linear in sums over all tokens: squared coefficient of variation of a load,
/// entropy of the mean weights. The gate gives its local sum; the caller adds those of all ranks
/// and calls finish_global_loss (gates/losses.h).
struct GlobalLoss {
  std::string name;
  double coeff = 0;
  at::Tensor local_sum;  ///< [N] over the local valid tokens, differentiable
  /// The loss without its coefficient, a scalar, of the sum over ranks [N]: a pure function in
  /// LibTorch operations, 0 for tokens_global = 0.
  std::function<at::Tensor(const at::Tensor& global_sum, int64_t tokens_global)> loss;
};

/// Counts of the local tokens; values only. Over ranks, fields are summed but for the maximum.
struct GateStats {
  at::Tensor tokens_per_expert;  ///< [E] int64
  int64_t num_tokens = 0;        ///< valid tokens
  int64_t num_assignments = 0;
  int64_t tokens_without_expert = 0;
  int64_t tokens_with_one_expert = 0;
  int64_t max_experts_per_token = 0;  ///< over ranks: the maximum
  int64_t non_finite_tokens = 0;
  int64_t num_nodes = 0;        ///< smooth-step gates: switches of all tokens (code bits, and split
                                ///< nodes that have a path of weight above 0 from the root)
  int64_t saturated_nodes = 0;  ///< of these, at exactly 0 or 1: they pass no gradient
  double entropy_sum = 0;       ///< sum over tokens of -sum g log g, the routing entropy in nats
  double removed_weight = 0;    ///< weight left out by a cut-off (min_weight)
  /// Undefined, or [2] float64 on a GPU: non_finite_tokens and entropy_sum, whose fields are 0
  /// until read_counts; tokens_per_expert is on the GPU until then, too.
  at::Tensor unread;
};

/// Fills the fields of statistics with unread counts and brings their tokens_per_expert to the
/// host: the host waits once for all of them.
void read_counts(const std::vector<GateStats*>& stats);

struct GateOutput {
  Routing routing;
  std::vector<NamedLoss> losses;
  BalanceTerms balance;
  std::vector<GlobalLoss> global_losses;
  /// Optional [T], differentiable: the token itself, times this, is added to the layer's output
  /// (BASE layers mix expert and token). Needs experts with d_out = d_in.
  at::Tensor residual_weight;
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

/// Throws ConfigError unless input.tokens is dense, floating and [T, d_model] (d_model < 0: any),
/// keys, valid and sequence have T entries of the right type on its device, and numbers are in
/// their ranges. Looks at no data.
void validate(const GateInput& input, int64_t d_model, const char* operation);

/// Throws ConfigError unless the tensor has these sizes. For parameters and buffers: a checkpoint
/// of another layer replaces them with tensors of its own shape.
void require_shape(const at::Tensor& tensor, at::IntArrayRef sizes, const char* operation,
                   const char* argument);

/// Throws ConfigError unless the product of the sizes of a parameter is at most 2^40.
/// @param argument  names the factors, "num_experts*d_model"
void require_product(at::IntArrayRef sizes, const char* operation, const char* argument);

/// Statistics of a routing, non-finite tokens and smooth-step fields left at 0. One pass over the
/// assignments; throws ConfigError for a routing that is not legal.
GateStats count_assignments(const Routing& routing, int64_t num_experts, int64_t num_valid_tokens);

}  // namespace perseid::gates
