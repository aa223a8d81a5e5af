#pragma once
#include <torch/arg.h>

#include "gates/gate.h"

namespace perseid::gates {

/// How the order in which the outputs of a gate meet the experts is searched.
enum class PermSearch : uint8_t {
  kNone,      ///< output l is expert l
  kSinkhorn,  ///< COMET+ (Ibrahim et al. 2023, arXiv 2306.02824): a relaxed permutation is trained
              ///< with the model at first, then rounded and frozen
  kSwap,      ///< exchanges are tried on held batches: PermutationSearch (moe/permutation_search.h)
};

/// What has an order of its own.
enum class PermScope : uint8_t {
  kShared,   ///< one for all gates of a layer and all their trees, as published
  kPerGate,  ///< each gate
  kPerTree,  ///< each tree or selector of each gate, which must be a TreeGate
};

struct PermutationOptions {
  /// Throws ConfigError that names operation, option, value and limit.
  void validate(const char* operation) const;
  TORCH_ARG(PermSearch, search) = PermSearch::kNone;
  TORCH_ARG(PermScope, scope) = PermScope::kShared;
  /// Share of the training, in [0, 1], in which the order is searched; frozen from then on.
  /// Published runs of kSinkhorn have 0.01 to 0.1.
  TORCH_ARG(double, until) = 0.1;
  TORCH_ARG(double, entropy_coeff) = 1e-4;  ///< of "permutation_loss", kSinkhorn
  TORCH_ARG(uint64_t, seed) = 0;
};

/// Temperature and iterations of the relaxation, at the share rho in [0, 1] of its stage: 10^-(3 +
/// 4 rho) and floor(20 + 130 rho), the schedule of the release.
struct SinkhornSchedule {
  double temperature;
  int64_t iterations;
};
SinkhornSchedule sinkhorn_schedule(double rho);

/// The order in which outputs of gates meet the experts: output l of unit u is expert
/// expert_map[u, l]. A unit is one tree of a TreeGate (kPerTree), else all that the object is used
/// for. Experts, parameters of gates and their optimiser states stay where they are: only the
/// numbers change, so an exchange costs nothing and weights never move between ranks.
///
/// With kSinkhorn there is a soft stage, in training while progress < until: the weights g of a
/// gate become g Pi, scaled back to the sum of g, where Pi = kernels::doubly_stochastic(phi): every
/// expert runs for every token at first, and fewer as entries of Pi fall to exactly 0. Terms of a
/// load-balance loss are left out. Equal on every rank, keyed by seed, layer and index.
///   loss   "permutation_loss": entropy_coeff * the mean over units of the entropies (-p log(p +
///          1e-6), summed) of Pi and of Pi with its rows divided by their sums
///   map    after each step the best assignment for the Pi of that step; outside of training and
///          after the stage nothing but this map is used
/// Afterwards phi needs no gradient and has none: an optimiser leaves it alone.
class ExpertPermutation : public torch::nn::Module {
 public:
  /// @param index  number of the object in its layer, a key of initial values
  ExpertPermutation(int64_t num_units, int64_t num_experts, const PermutationOptions& options,
                    int64_t layer_id = 0, int64_t index = 0);

  int64_t num_units() const { return num_units_; }
  int64_t num_experts() const { return num_experts_; }
  const PermutationOptions& options() const { return options_; }

  /// Is Pi in use for this input?
  bool is_soft(const GateInput& input) const;
  /// Pi [U, E, E] at this progress, differentiable.
  at::Tensor relaxed_now(double progress) const;
  /// See above. A rank counts 1/num_ranks of it: the sum over ranks is the loss.
  NamedLoss loss(const at::Tensor& relaxed_now, int num_ranks) const;
  /// Ends the soft stage: phi needs no gradient from now on. Called by forwards after it.
  void freeze();

  /// The gate's output with its routing, statistics and balance terms by expert.
  /// @param relaxed_now  of is_soft inputs, else undefined
  GateOutput forward(Gate& gate, const GateInput& input, const at::Tensor& relaxed_now) const;
  /// Statistics by output of the gate, for Gate::after_step, from those by expert.
  GateStats by_gate_output(const GateStats& by_expert) const;

  /// Once per step of the soft stage, with the Pi of its forward.
  void after_step(const at::Tensor& relaxed);

  /// A copy on the host. [U, E] int32
  at::Tensor host_map() const;
  /// Equal maps have equal hashes.
  uint64_t hash() const;
  /// @param map  [U, E] any integer type, each row a permutation of 0 .. E-1, else ConfigError
  void set_map(const at::Tensor& map);

  at::Tensor expert_map;  ///< buffer [U, E] int32; 0 .. E-1 at first
  at::Tensor phi;         ///< parameter [U, E, E], uniform in +-0.05 at first. kSinkhorn

  using torch::nn::Module::to;
  void to(at::Device device, at::ScalarType dtype, bool non_blocking = false) override;
  void to(at::ScalarType dtype, bool non_blocking = false) override;

 private:
  int64_t num_units_;
  int64_t num_experts_;
  PermutationOptions options_;
};

}  // namespace perseid::gates
