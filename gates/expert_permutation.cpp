#include "gates/expert_permutation.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "gates/describe.h"
#include "gates/gate_parts.h"
#include "gates/relaxed_permutation.h"
#include "gates/smooth_step_gate.h"
#include "gates/state_buffer.h"
#include "gates/tree_gate.h"
#include "kernels/assignment.h"
#include "kernels/error.h"
#include "kernels/random.h"

namespace perseid::gates {
namespace {

using at::Tensor;

constexpr const char* kExpertPermutation = "expert_permutation";
constexpr double kScoreBound = 0.05;
constexpr double kEntropyEpsilon = 1e-6;
/// Apart from every key of a gate's parameters.
constexpr uint64_t kScoreKey = 0x7065726D;

bool is_permutation(const int32_t* row, int64_t size) {
  std::vector<bool> seen(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) {
    if (row[i] < 0 || row[i] >= size || seen[static_cast<size_t>(row[i])]) return false;
    seen[static_cast<size_t>(row[i])] = true;
  }
  return true;
}

/// [U, E] int32 on the host: for each unit the permutation of the largest sum of entries.
Tensor best_assignment(const Tensor& relaxed) {
  const Tensor cost = relaxed.detach().to(at::kCPU, at::kDouble).neg().contiguous();
  if (!cost.isfinite().all().item<bool>()) {
    throw Diverged({kExpertPermutation, "relaxed", "non-finite",
                    "has no assignment: phi holds a NaN or an infinity"});
  }
  const int64_t U = cost.size(0), E = cost.size(1);
  Tensor map = at::empty({U, E}, at::kInt);
  for (int64_t u = 0; u < U; ++u) {
    kernels::assign({E, E}, cost.const_data_ptr<double>() + u * E * E, nullptr,
                    map.mutable_data_ptr<int32_t>() + u * E);
  }
  return map;
}

/// sum over entries of -p log(p + epsilon), the mean over units.
Tensor entropy(const Tensor& p) {
  return p.mul(p.add(kEntropyEpsilon).log()).sum().neg().div(p.size(0));
}

/// [E] by expert from [E] by output.
Tensor by_expert(const Tensor& by_output, const Tensor& map) {
  const Tensor index = map.to(by_output.device(), at::kLong);
  return at::empty_like(by_output).index_copy(0, index, by_output);
}

/// The dense table of a gate's weights, each output's share going to all experts by Pi, and rows
/// scaled back to their sums.
Tensor mixed_weights(Gate& gate, const GateInput& input, const Routing& routing,
                     const Tensor& relaxed_in, bool per_tree) {
  Tensor mixed, sums;
  if (per_tree) {
    const Tensor weights = dynamic_cast<TreeGate&>(gate).tree_weights(input);  // [T, U, E]
    const Tensor relaxed = relaxed_in.to(weights.scalar_type());
    sums = weights.sum({1, 2});
    mixed = weights.flatten(1).mm(relaxed.flatten(0, 1));
  } else {
    const Tensor weights = dense_weights(routing, gate.num_experts());
    sums = weights.sum(1);
    mixed = weights.mm(relaxed_in[0].to(weights.scalar_type()));
  }
  const Tensor mixed_sums = mixed.sum(1);
  // Where nothing is left nothing is scaled: an empty row stays empty. NaN rows stay NaN.
  const Tensor is_empty = mixed_sums.eq(0);
  const Tensor scale =
      at::where(is_empty, at::zeros_like(sums), sums.div(mixed_sums.masked_fill(is_empty, 1)));
  return mixed.mul(scale.unsqueeze(1));
}

}  // namespace

void PermutationOptions::validate(const char* operation) const {
  require(until() >= 0 && until() <= 1, operation, "permutation.until", until(),
          "is outside [0, 1], a share of the training; 0.1 is usual");
  require_coefficient(operation, "permutation.entropy_coeff", entropy_coeff());
}

SinkhornSchedule sinkhorn_schedule(double rho) {
  require(!std::isnan(rho), kExpertPermutation, "rho", rho, "is not a number in [0, 1]");
  const double at = std::clamp(rho, 0.0, 1.0);
  return {std::pow(10.0, -3.0 - 4.0 * at), static_cast<int64_t>(20.0 + 130.0 * at)};
}

ExpertPermutation::ExpertPermutation(int64_t num_units, int64_t num_experts,
                                     const PermutationOptions& options, int64_t layer_id,
                                     int64_t index)
    : torch::nn::Module("expert_permutation"),
      num_units_(num_units),
      num_experts_(num_experts),
      options_(options) {
  options.validate(kExpertPermutation);
  require(options.search() != PermSearch::kNone, kExpertPermutation, "search", "none",
          "leaves nothing to permute; choose sinkhorn or swap");
  require(num_units >= 1, kExpertPermutation, "num_units", num_units, "is below 1");
  require(num_experts >= 1, kExpertPermutation, "num_experts", num_experts, "is below 1");
  require_product({num_units, num_experts, num_experts}, kExpertPermutation,
                  "num_units*num_experts*num_experts");
  expert_map = register_buffer(
      "expert_map", at::arange(num_experts, at::kInt).repeat({num_units, 1}).contiguous());
  if (options.search() != PermSearch::kSinkhorn) return;
  const kernels::RandomKey key = kernels::random_key(options.seed())
                                     .with(static_cast<uint64_t>(layer_id))
                                     .with(kScoreKey)
                                     .with(static_cast<uint64_t>(index));
  phi = register_parameter("phi",
                           uniform_tensor({num_units, num_experts, num_experts}, kScoreBound, key));
}

bool ExpertPermutation::is_soft(const GateInput& input) const {
  return phi.defined() && input.training && std::max(input.progress, 0.0) < options_.until();
}

Tensor ExpertPermutation::relaxed_now(double progress) const {
  const SinkhornSchedule schedule = sinkhorn_schedule(progress / options_.until());
  const Tensor scores = phi.scalar_type() == at::kDouble ? phi : phi.to(at::kFloat);
  return relaxed_permutation(scores, schedule.temperature, schedule.iterations);
}

NamedLoss ExpertPermutation::loss(const Tensor& now, int num_ranks) const {
  const Tensor row_sums = now.sum(2, /*keepdim=*/true);
  const Tensor is_empty = row_sums.eq(0);
  const Tensor raw = entropy(now)
                         .add(entropy(now.div(row_sums.masked_fill(is_empty, 1))))
                         .div(static_cast<double>(num_ranks));
  return {"permutation_loss", raw.mul(options_.entropy_coeff()), raw.detach()};
}

void ExpertPermutation::freeze() {
  if (!phi.defined()) return;
  phi.requires_grad_(false);
  phi.mutable_grad() = Tensor();
}

GateOutput ExpertPermutation::forward(Gate& gate, const GateInput& input, const Tensor& now) const {
  const bool per_tree = options_.scope() == PermScope::kPerTree;
  auto* const tree_gate = dynamic_cast<TreeGate*>(&gate);
  if (now.defined()) {
    GateOutput output = gate.forward(input);
    output.routing = routing_from_dense(mixed_weights(gate, input, output.routing, now, per_tree));
    const GateStats all = count_assignments(output.routing, num_experts_, output.stats.num_tokens);
    GateStats& stats = output.stats;
    stats.tokens_per_expert = all.tokens_per_expert;
    stats.num_assignments = all.num_assignments;
    stats.tokens_without_expert = all.tokens_without_expert;
    stats.tokens_with_one_expert = all.tokens_with_one_expert;
    stats.max_experts_per_token = all.max_experts_per_token;
    output.balance = {};
    return output;
  }
  if (tree_gate != nullptr) {
    return tree_gate->forward_mapped(
        input, expert_map.expand({tree_gate->top_k(), num_experts_}).contiguous());
  }
  GateOutput output = gate.forward(input);
  const Tensor map = expert_map[0];
  output.routing = renumbered(output.routing, map);
  output.stats.tokens_per_expert = by_expert(output.stats.tokens_per_expert, map);
  if (output.balance.score_sum.defined()) {
    output.balance.score_sum = by_expert(output.balance.score_sum, map);
    output.balance.tokens_per_expert = by_expert(output.balance.tokens_per_expert, map);
  }
  return output;
}

GateStats ExpertPermutation::by_gate_output(const GateStats& stats) const {
  if (options_.scope() == PermScope::kPerTree) return stats;  // outputs of trees are not counted
  GateStats result = stats;
  const Tensor index = expert_map[0].to(stats.tokens_per_expert.device(), at::kLong);
  result.tokens_per_expert = stats.tokens_per_expert.index_select(0, index);
  return result;
}

void ExpertPermutation::after_step(const Tensor& now) {
  if (!now.defined()) {
    freeze();
    return;
  }
  require(phi.defined() && now.sizes() == phi.sizes(), kExpertPermutation, "relaxed", describe(now),
          "is not that of a forward of this layer");
  const at::NoGradGuard no_grad;
  expert_map.copy_(best_assignment(now));
}

Tensor ExpertPermutation::host_map() const { return expert_map.to(at::kCPU).clone(); }

uint64_t ExpertPermutation::hash() const {
  const Tensor map = host_map();
  const int32_t* const expert = map.const_data_ptr<int32_t>();
  kernels::RandomKey key = kernels::random_key(static_cast<uint64_t>(num_units_));
  for (int64_t i = 0; i < map.numel(); ++i) key = key.with(static_cast<uint64_t>(expert[i]));
  return key.value;
}

void ExpertPermutation::set_map(const Tensor& map) {
  require(map.defined() && at::isIntegralType(map.scalar_type(), /*includeBool=*/false) &&
              map.sizes() == expert_map.sizes(),
          kExpertPermutation, "map", describe(map),
          "is not an integer table [num_units=" + to_text(num_units_) +
              ", num_experts=" + to_text(num_experts_) + "]");
  const Tensor rows = map.to(at::kCPU, at::kInt).contiguous();
  for (int64_t u = 0; u < num_units_; ++u) {
    require(is_permutation(rows.const_data_ptr<int32_t>() + u * num_experts_, num_experts_),
            kExpertPermutation, "map.row", u, "is not a permutation of 0 .. num_experts-1");
  }
  const at::NoGradGuard no_grad;
  expert_map.copy_(rows);
}

void ExpertPermutation::to(at::Device device, at::ScalarType dtype, bool non_blocking) {
  keep_types({expert_map}, [&] { Module::to(device, dtype, non_blocking); });
}
void ExpertPermutation::to(at::ScalarType dtype, bool non_blocking) {
  keep_types({expert_map}, [&] { Module::to(dtype, non_blocking); });
}

}  // namespace perseid::gates
