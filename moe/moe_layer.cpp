#include "moe/moe_layer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "comm/agree.h"
#include "comm/collectives.h"
#include "comm/exchange.h"
#include "gates/describe.h"
#include "gates/device.h"
#include "gates/losses.h"
#include "kernels/combine.h"
#include "kernels/error.h"
#include "moe/dispatch.h"
#include "moe/layer_checks.h"
#include "moe/layer_permutations.h"
#include "moe/layer_stats.h"
#include "moe/ranks_agree.h"
#include "moe/selection.h"
#include "moe/tensor_types.h"
#include "moe/threads.h"
#include "moe/trace.h"

namespace perseid {
namespace {

/// Throws Diverged, on all ranks alike, if logits of any rank were not finite.
void raise_non_finite(int64_t non_finite, const comm::Group& world, const comm::CallSite& site) {
  if (non_finite == 0) return;
  throw Diverged({kMoELayer, "non_finite_tokens", to_text(non_finite),
                  "exceeds 0: tokens or gate parameters hold a NaN or an infinity", world.rank(),
                  -1, site.layer, site.step});
}

std::string gate_name(size_t gate, size_t num_gates) {
  return num_gates == 1 ? "gate" : "gate_" + std::to_string(gate);
}

/// What each rank tells the others at the start of a forward.
struct RankShare {
  int64_t num_tokens;
  int64_t num_valid;
  std::array<int64_t, 6> settings;  ///< equal on all ranks, see kSettings
};
constexpr std::array<const char*, 6> kSettings = {
    "placement.hash", "num_gates", "strict", "training", "has_earlier", "expert_map.hash"};

void require_same_settings(const std::vector<RankShare>& all, int rank,
                           const comm::CallSite& site) {
  for (size_t i = 0; i < kSettings.size(); ++i) {
    std::vector<int64_t> values;
    for (const RankShare& share : all) values.push_back(share.settings[i]);
    require_same_on_ranks(values, kSettings[i], rank, site);
  }
}

/// All that several ranks need on the host, in one wait: counts, the chosen experts, local sums of
/// losses (which go back to their devices once they are summed over ranks).
void fetch(MoEStats& stats, Selection& selection, std::vector<at::Tensor>& loss_sums) {
  const gates::Routing& routing = selection.routing;
  if (!gates::is_on_device(routing.expert_idx)) return;
  std::vector<at::Tensor> tensors = {routing.expert_idx, routing.token_offsets};
  for (const gates::GateStats& gate : stats.gates) {
    tensors.insert(tensors.end(), {gate.unread, gate.tokens_per_expert});
  }
  tensors.insert(tensors.end(), loss_sums.begin(), loss_sums.end());
  tensors = gates::to_host(tensors);
  auto next = tensors.begin();
  selection.on_host = routing;
  selection.on_host->weights = at::Tensor();
  selection.on_host->expert_idx = *next++;
  selection.on_host->token_offsets = *next++;
  for (gates::GateStats& gate : stats.gates) {
    gate.unread = *next++;
    gate.tokens_per_expert = *next++;
  }
  stats.read();  // waits for nothing: all of it is on the host
  for (at::Tensor& sum : loss_sums) sum = *next++;
}

/// One local plan for a module that every token passes.
std::shared_ptr<const RoutingPlan> dense_plan(const at::Tensor& tokens) {
  const int64_t num_tokens = tokens.size(0);
  auto plan = std::make_shared<RoutingPlan>();
  plan->num_tokens = num_tokens;
  plan->num_assignments = num_tokens;
  plan->local = make_dense_plan(num_tokens, tokens.device());
  return plan;
}

}  // namespace

at::Tensor MoEOutput::loss() const {
  at::Tensor sum;
  for (const gates::NamedLoss& loss : losses) sum = sum.defined() ? sum + loss.value : loss.value;
  return sum.defined() ? sum : at::zeros({}, at::kFloat);
}

MoELayer::MoELayer(std::vector<std::shared_ptr<gates::Gate>> gates,
                   std::shared_ptr<Experts> experts, ExpertPlacement placement,
                   ParallelGroups groups, MoELayerOptions options, std::shared_ptr<Experts> shared)
    : torch::nn::Module("moe_layer"),
      gates_(std::move(gates)),
      experts_(std::move(experts)),
      shared_(std::move(shared)),
      placement_(std::move(placement)),
      groups_(std::move(groups)),
      options_(options) {
  use_libtorch_threads();
  require(!gates_.empty(), kMoELayer, "gates", gates_.size(), "is empty; pass 1 gate or more");
  require(experts_ != nullptr, kMoELayer, "experts", "null", "is not a module");
  for (const auto& gate : gates_) {
    require(gate != nullptr, kMoELayer, "gates", "null", "is not a module");
    require(gate->num_experts() == placement_.num_experts(), kMoELayer, "gate.num_experts",
            gate->num_experts(),
            "differs from num_experts=" + std::to_string(placement_.num_experts()) +
                " of the placement");
  }
  const comm::Group& ep = groups_.expert_parallel;
  require(placement_.num_ranks() == ep.size(), kMoELayer, "placement.num_ranks",
          placement_.num_ranks(), "differs from ep_size=" + std::to_string(ep.size()));
  require(experts_->expert_ids() == placement_.experts_of(ep.rank()), kMoELayer, "experts",
          experts_->num_local_experts(),
          "are not those that the placement gives to rank " + std::to_string(ep.rank()) +
              " of the expert-parallel group");
  if (shared_) {
    require(shared_->num_local_experts() == 1, kMoELayer, "shared.num_local_experts",
            shared_->num_local_experts(), "is not 1; pass one expert, of any width inside");
    require(shared_->d_in() == experts_->d_in(), kMoELayer, "shared.d_in", shared_->d_in(),
            "differs from d_in=" + to_text(experts_->d_in()) + " of the experts");
    require(shared_->d_out() == experts_->d_out(), kMoELayer, "shared.d_out", shared_->d_out(),
            "differs from d_out=" + to_text(experts_->d_out()) + " of the experts");
    shared_->set_replicated(true);
    register_module("shared", shared_);
  }
  for (size_t g = 0; g < gates_.size(); ++g) {
    register_module(gate_name(g, gates_.size()), gates_[g]);
  }
  register_module("experts", experts_);
  permutations_ = make_permutations(gates_, options_.permutation, options_.layer_id);
  for (size_t i = 0; i < permutations_.size(); ++i) {
    register_module(permutations_.size() == 1 ? "permutation" : "permutation_" + std::to_string(i),
                    permutations_[i]);
  }
}

MoEOutput MoELayer::forward(const MoEInput& input) {
  const comm::CallSite site{kMoELayer, options_.layer_id, input.step};
  const gates::GateInput gate_input = agree_on_input(input, site);
  Decision decision = decide(gate_input, input.earlier, site);
  at::Tensor shared_output;
  const at::Tensor mixed =
      probe_ ? run_probed(input.tokens, decision.selection, &shared_output, site)
             : run_experts(input.tokens, decision.selection, &shared_output, site);
  return finish(input, mixed, shared_output, std::move(decision));
}

at::Tensor MoELayer::run_experts(const at::Tensor& tokens, const Selection& selection,
                                 at::Tensor* shared_output, comm::CallSite site) {
  const comm::Group& ep = groups_.expert_parallel;
  const auto plan =
      make_routing_plan(selection.routing, placement_, ep,
                        {options_.strict, site, selection.on_host ? &*selection.on_host : nullptr});
  const at::Tensor rows = dispatch(tokens, plan, ep, site);
  const at::Tensor weights =
      dispatch_weights(selection.weights.to(weight_type(tokens)), plan, ep, site);
  at::Tensor outputs;
  comm::before_exchange(comm::NextExchange::kRows, ep, site, [&] {
    outputs = experts_->forward(rows, weights, plan);
    check_expert_output(outputs, rows.size(0), weights.size(1) * experts_->d_out(), tokens,
                        "experts.output");
    if (shared_output != nullptr) *shared_output = run_shared(tokens);
  });
  return combine(outputs, plan, ep, site);
}

at::Tensor MoELayer::run_shared(const at::Tensor& tokens) {
  if (!shared_) return {};
  const int64_t num_tokens = tokens.size(0);
  const at::Tensor ones =
      at::ones({num_tokens, 1}, tokens.options().dtype(weight_type(tokens)).requires_grad(false));
  at::Tensor output = shared_->forward(tokens, ones, dense_plan(tokens));
  check_expert_output(output, num_tokens, shared_->d_out(), tokens, "shared.output");
  return output;
}

gates::GateInput MoELayer::agree_on_input(const MoEInput& input, comm::CallSite site) const {
  gates::GateInput gate_input;
  const comm::Group& world = groups_.world;
  comm::agree(world, site, [&] {
    check_layer_input(input, *experts_, placement_.num_experts(), gates_.size());
    gate_input.tokens = input.features.value_or(input.tokens);
    gate_input.keys = input.keys;
    gate_input.valid = input.valid;
    gate_input.sequence = input.sequence;
    gate_input.step = input.step;
    gate_input.progress = input.progress;
    gate_input.training = is_training();
    // Alone on a GPU the layer needs no number of its own on the host before the end of the
    // forward; with other ranks it fetches all at once, see fetch.
    gate_input.defer_counts = true;
    gates::validate(gate_input, -1, kMoELayer);
  });
  // Tokens of the ranks before this one, and the valid ones of all.
  const RankShare mine = {input.tokens.size(0),
                          input.valid ? input.valid->sum().item<int64_t>() : input.tokens.size(0),
                          {placement_.hash(), static_cast<int64_t>(gates_.size()),
                           options_.strict ? 1 : 0, is_training() ? 1 : 0, input.earlier ? 1 : 0,
                           world.size() > 1 ? hash_of(permutations_) : 0}};
  std::vector<RankShare> all(static_cast<size_t>(world.size()));
  comm::all_gather(&mine, sizeof(mine), all.data(), world, site);
  require_same_settings(all, world.rank(), site);
  for (size_t r = 0; r < all.size(); ++r) {
    if (r < static_cast<size_t>(world.rank())) gate_input.first_token += all[r].num_tokens;
    gate_input.tokens_global += all[r].num_valid;
  }
  return gate_input;
}

gates::GateOutput MoELayer::run_gate(size_t g, const gates::GateInput& input,
                                     const std::vector<at::Tensor>& relaxed) {
  if (permutations_.empty()) return gates_[g]->forward(input);
  const size_t i = permutation_of(permutations_, g);
  return permutations_[i]->forward(*gates_[g], input, relaxed.empty() ? at::Tensor() : relaxed[i]);
}

MoELayer::Decision MoELayer::decide(const gates::GateInput& input,
                                    const std::optional<MoEStats>& earlier, comm::CallSite site) {
  const Trace trace("perseid::gates");
  Decision decision;
  MoEStats stats;
  std::vector<gates::Routing> routings;
  std::vector<gates::BalanceTerms> balances;
  std::vector<gates::GlobalLoss> global_losses;
  std::vector<at::Tensor> loss_sums;
  comm::agree(groups_.world, site, [&] {
    int64_t non_finite = 0;
    const std::vector<at::Tensor> relaxed = relax(permutations_, input);
    for (size_t i = 0; i < relaxed.size(); ++i) {
      decision.losses.push_back(permutations_[i]->loss(relaxed[i], groups_.world.size()));
      stats.relaxed_permutations.push_back(relaxed[i].detach());
    }
    if (probe_) probe_->output_weights.clear();
    for (size_t g = 0; g < gates_.size(); ++g) {
      const auto& gate = gates_[g];
      gates::GateOutput out = run_gate(g, input, relaxed);
      check_gate_output(out, input.tokens.size(0), *experts_, placement_.num_experts(),
                        gate->name().c_str());
      warn_of_capacity(*gate, out.stats, options_.capacity);
      CappedRouting capped =
          apply_capacity(out.routing, options_.capacity, out.stats.num_tokens, gate->top_k(),
                         placement_.num_experts(),
                         {input.training, input.step, options_.layer_id, input.first_token});
      stats.num_dropped += capped.num_dropped;
      if (probe_ && probe_->record) {
        probe_->output_weights.push_back(weights_by_output(
            *permutations_[permutation_of(permutations_, g)], *gate, input, capped.routing));
      }
      routings.push_back(std::move(capped.routing));
      balances.push_back(std::move(out.balance));
      decision.residual_weights.push_back(std::move(out.residual_weight));
      for (gates::GlobalLoss& loss : out.global_losses) global_losses.push_back(std::move(loss));
      stats.gates.push_back(std::move(out.stats));
      for (gates::NamedLoss& loss : out.losses) decision.losses.push_back(std::move(loss));
    }
    decision.selection = merge_routings(routings);
    for (const gates::GlobalLoss& loss : global_losses) {
      loss_sums.push_back(loss.local_sum.detach().to(at::kDouble).contiguous());
    }
    if (groups_.world.size() > 1) fetch(stats, decision.selection, loss_sums);
    for (const gates::GateStats& gate : stats.gates) non_finite += gate.non_finite_tokens;
    if (options_.on_nonfinite == OnNonFinite::kRaise) {
      raise_non_finite(non_finite, groups_.world, site);
    }
  });
  stats.num_tokens = stats.gates.front().num_tokens;
  stats.rows_processed = decision.selection.routing.num_assignments();
  sum_over_ranks(stats, loss_sums, groups_.world, site);
  decision.stats = std::move(stats);

  for (size_t g = 0; g < balances.size(); ++g) {
    if (!balances[g].score_sum.defined()) continue;
    at::Tensor counts = decision.stats.gates[g].tokens_per_expert;
    int64_t counted_tokens = input.tokens_global;
    if (earlier) {
      counts = counts + earlier->gates[g].tokens_per_expert.to(counts.device());
      counted_tokens += earlier->gates[g].num_tokens;
    }
    decision.losses.push_back(
        gates::load_balance_loss(balances[g], counts, input.tokens_global, counted_tokens));
  }
  for (size_t i = 0; i < global_losses.size(); ++i) {
    const at::Device home = global_losses[i].local_sum.device();
    decision.losses.push_back(gates::finish_global_loss(global_losses[i], loss_sums[i].to(home),
                                                        input.tokens_global, groups_.world.size()));
  }
  return decision;
}

MoEOutput MoELayer::finish(const MoEInput& input, const at::Tensor& combined,
                           const at::Tensor& shared_output, Decision decision) {
  MoEOutput out;
  for (size_t g = 0; g < gates_.size(); ++g) {
    const at::Tensor mine =
        gates_.size() == 1
            ? combined
            : combined.narrow(1, static_cast<int64_t>(g) * experts_->d_out(), experts_->d_out());
    out.outputs.push_back(shared_output.defined() ? mine + shared_output : mine);
    const at::Tensor& residual = decision.residual_weights[g];
    if (residual.defined()) {
      at::Tensor passed = residual.unsqueeze(1).to(input.tokens.scalar_type()) * input.tokens;
      // Tokens that are not valid may hold anything, and 0 * NaN is not 0.
      if (input.valid) passed = passed.masked_fill(input.valid->logical_not().unsqueeze(1), 0);
      out.outputs.back() = out.outputs.back() + passed;
    }
  }
  out.losses = std::move(decision.losses);
  out.stats = std::move(decision.stats);
  if (options_.on_nonfinite == OnNonFinite::kRaise && out.stats.is_unread()) {
    out.stats.read();  // all of the forward is queued by now
    int64_t non_finite = 0;
    for (const gates::GateStats& gate : out.stats.gates) non_finite += gate.non_finite_tokens;
    raise_non_finite(non_finite, groups_.world, {kMoELayer, options_.layer_id, input.step});
  }
  return out;
}

void MoELayer::after_step(const MoEStats& stats_in) {
  MoEStats stats = stats_in;
  stats.read();
  check_stats(stats, placement_.num_experts(), gates_.size(), "stats");
  for (size_t g = 0; g < gates_.size(); ++g) {
    gates_[g]->after_step(
        permutations_.empty()
            ? stats.gates[g]
            : permutations_[permutation_of(permutations_, g)]->by_gate_output(stats.gates[g]));
  }
  require(stats.relaxed_permutations.empty() ||
              stats.relaxed_permutations.size() == permutations_.size(),
          kMoELayer, "stats.relaxed_permutations", stats.relaxed_permutations.size(),
          "differs from the " + to_text(permutations_.size()) + " permutations of the layer");
  for (size_t i = 0; i < permutations_.size(); ++i) {
    permutations_[i]->after_step(
        stats.relaxed_permutations.empty() ? at::Tensor() : stats.relaxed_permutations[i]);
  }
}

}  // namespace perseid
