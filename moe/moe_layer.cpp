#include "moe/moe_layer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <utility>

#include "comm/agree.h"
#include "comm/collectives.h"
#include "comm/exchange.h"
#include "gates/describe.h"
#include "gates/device.h"
#include "gates/losses.h"
#include "kernels/error.h"
#include "moe/dispatch.h"
#include "moe/layer_checks.h"
#include "moe/ranks_agree.h"
#include "moe/selection.h"
#include "moe/tensor_types.h"
#include "moe/threads.h"
#include "moe/trace.h"

namespace perseid {
namespace {

constexpr const char* kName = "moe_layer";

/// The fields of gate statistics by how they are added up.
template <typename Stats, typename Body>
void for_each_sum(Stats& gate, const Body& body) {
  for (auto* field : {&gate.num_tokens, &gate.num_assignments, &gate.tokens_without_expert,
                      &gate.tokens_with_one_expert, &gate.non_finite_tokens, &gate.num_nodes,
                      &gate.saturated_nodes}) {
    body(*field);
  }
}

/// Sums over ranks of statistics and of the sums that losses need, each kind in one buffer.
void sum_over_ranks(MoEStats& stats, std::vector<at::Tensor>& loss_sums, const comm::Group& world,
                    comm::CallSite site) {
  std::vector<at::Device> homes;
  for (at::Tensor& sum : loss_sums) {
    homes.push_back(sum.device());
    sum = sum.detach().to(at::kDouble).contiguous().clone();
  }
  if (world.size() == 1) return;  // the sums over one rank, without a copy of them on the host
  loss_sums = gates::to_host(loss_sums);
  std::vector<int64_t> counts = {stats.num_dropped, stats.num_tokens, stats.rows_processed};
  std::vector<int64_t> maxima;
  std::vector<double> sums;
  for (gates::GateStats& gate : stats.gates) {
    for_each_sum(gate, [&](int64_t field) { counts.push_back(field); });
    const int64_t* by_expert = gate.tokens_per_expert.const_data_ptr<int64_t>();
    counts.insert(counts.end(), by_expert, by_expert + gate.tokens_per_expert.numel());
    maxima.push_back(gate.max_experts_per_token);
    sums.insert(sums.end(), {gate.entropy_sum, gate.removed_weight});
  }
  for (const at::Tensor& sum : loss_sums) {
    sums.insert(sums.end(), sum.const_data_ptr<double>(),
                sum.const_data_ptr<double>() + sum.numel());
  }

  const auto length = [](const auto& values) { return static_cast<int64_t>(values.size()); };
  comm::all_reduce(counts.data(), length(counts), comm::ReduceOp::kSum, world, site);
  comm::all_reduce(maxima.data(), length(maxima), comm::ReduceOp::kMax, world, site);
  comm::all_reduce(sums.data(), length(sums), comm::ReduceOp::kSum, world, site);

  const int64_t* count = counts.data();
  const double* sum = sums.data();
  for (int64_t* field : {&stats.num_dropped, &stats.num_tokens, &stats.rows_processed}) {
    *field = *count++;
  }
  for (size_t g = 0; g < stats.gates.size(); ++g) {
    gates::GateStats& gate = stats.gates[g];
    for_each_sum(gate, [&](int64_t& field) { field = *count++; });
    const int64_t num_experts = gate.tokens_per_expert.numel();
    gate.tokens_per_expert = at::empty_like(gate.tokens_per_expert);
    std::copy(count, count + num_experts, gate.tokens_per_expert.mutable_data_ptr<int64_t>());
    count += num_experts;
    gate.max_experts_per_token = maxima[g];
    gate.entropy_sum = *sum++;
    gate.removed_weight = *sum++;
  }
  for (at::Tensor& loss_sum : loss_sums) {
    std::copy(sum, sum + loss_sum.numel(), loss_sum.mutable_data_ptr<double>());
    sum += loss_sum.numel();
  }
  for (size_t i = 0; i < homes.size(); ++i) loss_sums[i] = loss_sums[i].to(homes[i]);
}

/// Throws Diverged, on all ranks alike, if logits of any rank were not finite.
void raise_non_finite(int64_t non_finite, const comm::Group& world, const comm::CallSite& site) {
  if (non_finite == 0) return;
  throw Diverged({kName, "non_finite_tokens", to_text(non_finite),
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
  std::array<int64_t, 5> settings;  ///< equal on all ranks, see kSettings
};
constexpr std::array<const char*, 5> kSettings = {"placement.hash", "num_gates", "strict",
                                                  "training", "has_earlier"};

void require_same_settings(const std::vector<RankShare>& all, int rank,
                           const comm::CallSite& site) {
  for (size_t i = 0; i < kSettings.size(); ++i) {
    std::vector<int64_t> values;
    for (const RankShare& share : all) values.push_back(share.settings[i]);
    require_same_on_ranks(values, kSettings[i], rank, site);
  }
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

bool MoEStats::is_unread() const {
  return std::any_of(gates.begin(), gates.end(),
                     [](const gates::GateStats& gate) { return gate.unread.defined(); });
}

void MoEStats::read() {
  std::vector<gates::GateStats*> all;
  for (gates::GateStats& gate : gates) all.push_back(&gate);
  gates::read_counts(all);
}

MoEStats& MoEStats::operator+=(const MoEStats& other_in) {
  read();
  MoEStats other = other_in;
  other.read();
  require(gates.size() == other.gates.size(), kName, "stats.gates", other.gates.size(),
          "differs from " + std::to_string(gates.size()) + "; add statistics of one layer");
  num_dropped += other.num_dropped;
  num_tokens += other.num_tokens;
  rows_processed += other.rows_processed;
  for (size_t g = 0; g < gates.size(); ++g) {
    gates::GateStats& gate = gates[g];
    gates::GateStats more = other.gates[g];
    require(more.tokens_per_expert.defined() && gate.tokens_per_expert.defined() &&
                more.tokens_per_expert.sizes() == gate.tokens_per_expert.sizes(),
            kName, "stats.tokens_per_expert", gates::describe(more.tokens_per_expert),
            "differs from " + gates::describe(gate.tokens_per_expert) +
                "; add statistics of one layer");
    std::vector<int64_t> fields;
    for_each_sum(more, [&](int64_t field) { fields.push_back(field); });
    auto next = fields.begin();
    for_each_sum(gate, [&](int64_t& field) { field += *next++; });
    gate.tokens_per_expert = gate.tokens_per_expert + more.tokens_per_expert;
    gate.max_experts_per_token = std::max(gate.max_experts_per_token, more.max_experts_per_token);
    gate.entropy_sum += more.entropy_sum;
    gate.removed_weight += more.removed_weight;
  }
  return *this;
}

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
  require(!gates_.empty(), kName, "gates", gates_.size(), "is empty; pass 1 gate or more");
  require(experts_ != nullptr, kName, "experts", "null", "is not a module");
  for (const auto& gate : gates_) {
    require(gate != nullptr, kName, "gates", "null", "is not a module");
    require(gate->num_experts() == placement_.num_experts(), kName, "gate.num_experts",
            gate->num_experts(),
            "differs from num_experts=" + std::to_string(placement_.num_experts()) +
                " of the placement");
  }
  const comm::Group& ep = groups_.expert_parallel;
  require(placement_.num_ranks() == ep.size(), kName, "placement.num_ranks", placement_.num_ranks(),
          "differs from ep_size=" + std::to_string(ep.size()));
  require(experts_->expert_ids() == placement_.experts_of(ep.rank()), kName, "experts",
          experts_->num_local_experts(),
          "are not those that the placement gives to rank " + std::to_string(ep.rank()) +
              " of the expert-parallel group");
  if (shared_) {
    require(shared_->num_local_experts() == 1, kName, "shared.num_local_experts",
            shared_->num_local_experts(), "is not 1; pass one expert, of any width inside");
    require(shared_->d_in() == experts_->d_in(), kName, "shared.d_in", shared_->d_in(),
            "differs from d_in=" + to_text(experts_->d_in()) + " of the experts");
    require(shared_->d_out() == experts_->d_out(), kName, "shared.d_out", shared_->d_out(),
            "differs from d_out=" + to_text(experts_->d_out()) + " of the experts");
    shared_->set_replicated(true);
    register_module("shared", shared_);
  }
  for (size_t g = 0; g < gates_.size(); ++g) {
    register_module(gate_name(g, gates_.size()), gates_[g]);
  }
  register_module("experts", experts_);
}

MoEOutput MoELayer::forward(const MoEInput& input) {
  const comm::CallSite site{kName, options_.layer_id, input.step};
  const comm::Group& ep = groups_.expert_parallel;
  const gates::GateInput gate_input = agree_on_input(input, site);
  Decision decision = decide(gate_input, input.earlier, site);
  const auto plan =
      make_routing_plan(decision.selection.routing, placement_, ep, {options_.strict, site});
  const at::Tensor rows = dispatch(input.tokens, plan, ep, site);
  const at::Tensor weights =
      dispatch_weights(decision.selection.weights.to(weight_type(input.tokens)), plan, ep, site);
  at::Tensor outputs, shared_output;
  comm::before_exchange(comm::NextExchange::kRows, ep, site, [&] {
    outputs = experts_->forward(rows, weights, plan);
    check_expert_output(outputs, rows.size(0), weights.size(1) * experts_->d_out(), input.tokens,
                        "experts.output");
    shared_output = run_shared(input.tokens);
  });
  return finish(input, combine(outputs, plan, ep, site), shared_output, std::move(decision));
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
    // forward.
    gate_input.defer_counts = world.size() == 1;
    gates::validate(gate_input, -1, kName);
  });
  // Tokens of the ranks before this one, and the valid ones of all.
  const RankShare mine = {input.tokens.size(0),
                          input.valid ? input.valid->sum().item<int64_t>() : input.tokens.size(0),
                          {placement_.hash(), static_cast<int64_t>(gates_.size()),
                           options_.strict ? 1 : 0, is_training() ? 1 : 0, input.earlier ? 1 : 0}};
  std::vector<RankShare> all(static_cast<size_t>(world.size()));
  comm::all_gather(&mine, sizeof(mine), all.data(), world, site);
  require_same_settings(all, world.rank(), site);
  for (size_t r = 0; r < all.size(); ++r) {
    if (r < static_cast<size_t>(world.rank())) gate_input.first_token += all[r].num_tokens;
    gate_input.tokens_global += all[r].num_valid;
  }
  return gate_input;
}

MoELayer::Decision MoELayer::decide(const gates::GateInput& input,
                                    const std::optional<MoEStats>& earlier, comm::CallSite site) {
  const Trace trace("perseid::gates");
  Decision decision;
  MoEStats stats;
  std::vector<gates::Routing> routings;
  std::vector<gates::BalanceTerms> balances;
  std::vector<gates::GlobalLoss> global_losses;
  comm::agree(groups_.world, site, [&] {
    int64_t non_finite = 0;
    for (const auto& gate : gates_) {
      gates::GateOutput out = gate->forward(input);
      check_gate_output(out, input.tokens.size(0), *experts_, placement_.num_experts(),
                        gate->name().c_str());
      warn_of_capacity(*gate, out.stats, options_.capacity);
      CappedRouting capped =
          apply_capacity(out.routing, options_.capacity, out.stats.num_tokens, gate->top_k(),
                         placement_.num_experts(),
                         {input.training, input.step, options_.layer_id, input.first_token});
      stats.num_dropped += capped.num_dropped;
      non_finite += out.stats.non_finite_tokens;
      routings.push_back(std::move(capped.routing));
      balances.push_back(std::move(out.balance));
      decision.residual_weights.push_back(std::move(out.residual_weight));
      for (gates::GlobalLoss& loss : out.global_losses) global_losses.push_back(std::move(loss));
      stats.gates.push_back(std::move(out.stats));
      for (gates::NamedLoss& loss : out.losses) decision.losses.push_back(std::move(loss));
    }
    if (options_.on_nonfinite == OnNonFinite::kRaise) {
      raise_non_finite(non_finite, groups_.world, site);
    }
    decision.selection = merge_routings(routings);
  });
  stats.num_tokens = stats.gates.front().num_tokens;
  stats.rows_processed = decision.selection.routing.num_assignments();
  std::vector<at::Tensor> loss_sums;
  for (const gates::GlobalLoss& loss : global_losses) loss_sums.push_back(loss.local_sum);
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
    decision.losses.push_back(gates::finish_global_loss(global_losses[i], loss_sums[i],
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
    raise_non_finite(non_finite, groups_.world, {kName, options_.layer_id, input.step});
  }
  return out;
}

void MoELayer::after_step(const MoEStats& stats_in) {
  MoEStats stats = stats_in;
  stats.read();
  check_stats(stats, placement_.num_experts(), gates_.size(), "stats");
  for (size_t g = 0; g < gates_.size(); ++g) gates_[g]->after_step(stats.gates[g]);
}

double max_vio(const at::Tensor& tokens_per_expert) {
  require(tokens_per_expert.defined(), "max_vio", "tokens_per_expert", "undefined",
          "is not [num_experts]; pass that of the statistics");
  const at::Tensor counts = tokens_per_expert.to(at::kDouble);
  const double mean = counts.numel() > 0 ? counts.mean().item<double>() : 0;
  return mean > 0 ? counts.max().item<double>() / mean - 1 : 0;
}

}  // namespace perseid
