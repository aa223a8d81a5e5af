#pragma once
#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "gates/expert_permutation.h"
#include "gates/gate.h"
#include "moe/capacity.h"
#include "moe/experts.h"
#include "moe/layer_probe.h"
#include "moe/parallel_groups.h"
#include "moe/selection.h"

namespace perseid {

enum class OnNonFinite : uint8_t {
  kRaise,  ///< a NaN or infinity in the logits of any rank makes all ranks throw Diverged; on a GPU
           ///< the host waits for the count at the end of the forward
  kCount,  ///< only counted in the statistics
};

struct MoELayerOptions {
  CapacityOptions capacity;
  OnNonFinite on_nonfinite = OnNonFinite::kRaise;
  bool strict = true;  ///< same bits at any number of ranks, see RoutingPlan
  int layer_id = 0;    ///< names the layer in errors and in the headers that ranks compare
  /// Search over the order in which the outputs of gates meet the experts; none by default.
  gates::PermutationOptions permutation;
};

/// Counts of one forward, summed over all ranks; values only.
struct MoEStats {
  std::vector<gates::GateStats> gates;  ///< [G]
  int64_t num_dropped = 0;              ///< assignments lost to capacity
  int64_t num_tokens = 0;               ///< valid tokens
  int64_t rows_processed = 0;  ///< (token, expert) pairs that experts ran, after merging gates
  /// Of each of MoELayer::permutations(), the Pi of this forward; empty outside of their soft
  /// stage.
  std::vector<at::Tensor> relaxed_permutations;

  /// On a GPU, with one rank and OnNonFinite::kCount, some counts stay there, so that a forward
  /// never waits (gates::GateStats::unread); read() fetches them. Otherwise they are read already.
  bool is_unread() const;
  void read();

  /// Adds the counts of another micro-batch of the same layer, after reading both.
  MoEStats& operator+=(const MoEStats& other);
};

struct MoEInput {
  MoEInput(at::Tensor tokens_) : tokens(std::move(tokens_)) {}  // NOLINT: a tensor is an input
  at::Tensor tokens;                   ///< [T, D] what the experts read; T may be 0
  std::optional<at::Tensor> features;  ///< [T, any] what the gates read; absent: tokens
  std::optional<at::Tensor> keys;      ///< [T] int64, for hash gates
  std::optional<at::Tensor> valid;     ///< [T] bool, true = a real token
  std::optional<at::Tensor> sequence;  ///< [T] int64
  int64_t step = 0;
  double progress = 0;
  /// Statistics of the earlier micro-batches of this optimiser step, added up: the load-balance
  /// loss then balances the whole batch (arXiv 2501.11873). Absent: this micro-batch alone.
  std::optional<MoEStats> earlier;
};

struct MoEOutput {
  std::vector<at::Tensor> outputs;  ///< [G] of [T, d_out], one for each gate
  std::vector<gates::NamedLoss> losses;
  MoEStats stats;

  const at::Tensor& output() const { return outputs.front(); }
  /// Sum of the losses, a scalar (0 without losses): add it to the local loss of the task.
  at::Tensor loss() const;
};

/// A sparse mixture-of-experts layer over the ranks of its groups. Several gates (one per task)
/// share the experts: an expert that more than one gate selects for a token runs once. forward is
/// collective over groups.world and keeps nothing of the step in the layer. All ranks must call it,
/// also those without tokens, and the backward as well.
class MoELayer : public torch::nn::Module {
 public:
  /// @param gates    1..G gates with equal num_experts; registered as "gate" or "gate_0" ...
  /// @param experts  this rank's experts; their ids must be those of `placement`
  /// @param shared   optional module that every token passes, [T, D] -> [T, d_out], added to each
  /// output
  MoELayer(std::vector<std::shared_ptr<gates::Gate>> gates, std::shared_ptr<Experts> experts,
           ExpertPlacement placement, ParallelGroups groups, MoELayerOptions options = {},
           std::shared_ptr<Experts> shared = nullptr);

  /// Throws on every rank alike, also where one rank alone is given a wrong input or its gates or
  /// experts return one; see MoELayerOptions::on_nonfinite and comm::Group. The groups stay usable.
  MoEOutput forward(const MoEInput& input);

  /// Once per optimiser step in training: lets gates move their balancing state and permutations
  /// theirs.
  void after_step(const MoEStats& stats);

  const std::vector<std::shared_ptr<gates::Gate>>& gates() const { return gates_; }
  const std::shared_ptr<Experts>& experts() const { return experts_; }
  const ParallelGroups& groups() const { return groups_; }
  const MoELayerOptions& options() const { return options_; }

  /// The order in which outputs of gates meet experts, registered as "permutation" or
  /// "permutation_0" ...: none with PermSearch::kNone, one with PermScope::kShared, else one for
  /// each gate.
  const std::vector<std::shared_ptr<gates::ExpertPermutation>>& permutations() const {
    return permutations_;
  }
  /// For searches (moe/permutation_search.h). Null: none. The caller keeps it alive.
  void set_probe(LayerProbe* probe) { probe_ = probe; }

 private:
  /// What the gates decided: which experts run, with which weights, and what it costs.
  struct Decision {
    Selection selection;
    std::vector<gates::NamedLoss> losses;
    std::vector<at::Tensor> residual_weights;  ///< [G], undefined for gates without
    MoEStats stats;
  };
  gates::GateInput agree_on_input(const MoEInput& input, comm::CallSite site) const;
  gates::GateOutput run_gate(size_t g, const gates::GateInput& input,
                             const std::vector<at::Tensor>& relaxed);
  Decision decide(const gates::GateInput& input, const std::optional<MoEStats>& earlier,
                  comm::CallSite site);
  /// Outputs of the selected experts, mixed for each gate. [T, G*d_out]
  at::Tensor run_experts(const at::Tensor& tokens, const Selection& selection,
                         at::Tensor* shared_output, comm::CallSite site);
  /// The same with a probe.
  at::Tensor run_probed(const at::Tensor& tokens, const Selection& selection,
                        at::Tensor* shared_output, comm::CallSite site);
  /// Each expert on each token. [T, E, d_out]
  /// Runs the pairs at `places` of [T, E] (int64) and keeps what they give. Collective.
  void run_pairs(const at::Tensor& tokens, const at::Tensor& places, KeptOutputs& kept,
                 comm::CallSite site);
  KeptOutputs probe_every_expert(const at::Tensor& tokens, comm::CallSite site);
  at::Tensor run_shared(const at::Tensor& tokens);  ///< undefined without a shared module
  MoEOutput finish(const MoEInput& input, const at::Tensor& combined,
                   const at::Tensor& shared_output, Decision decision);

  std::vector<std::shared_ptr<gates::Gate>> gates_;
  std::shared_ptr<Experts> experts_;
  std::shared_ptr<Experts> shared_;
  std::vector<std::shared_ptr<gates::ExpertPermutation>> permutations_;
  LayerProbe* probe_ = nullptr;
  ExpertPlacement placement_;
  ParallelGroups groups_;
  MoELayerOptions options_;
};

/// Largest load / mean load - 1 over experts (arXiv 2408.15664); 0 is perfect balance.
double max_vio(const at::Tensor& tokens_per_expert);

}  // namespace perseid
