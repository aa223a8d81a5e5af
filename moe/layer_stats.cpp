#include "moe/layer_stats.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <string>

#include "comm/collectives.h"
#include "gates/describe.h"
#include "gates/device.h"
#include "kernels/error.h"
#include "moe/layer_checks.h"

namespace perseid {
namespace {

/// The fields of gate statistics by how they are added up.
template <typename Stats, typename Body>
void for_each_sum(Stats& gate, const Body& body) {
  for (auto* field : {&gate.num_tokens, &gate.num_assignments, &gate.tokens_without_expert,
                      &gate.tokens_with_one_expert, &gate.non_finite_tokens, &gate.num_nodes,
                      &gate.saturated_nodes}) {
    body(*field);
  }
}

}  // namespace

void sum_over_ranks(MoEStats& stats, std::vector<at::Tensor>& loss_sums, const comm::Group& world,
                    comm::CallSite site) {
  for (at::Tensor& sum : loss_sums) sum = sum.detach().to(at::kDouble).contiguous().clone();
  if (world.size() == 1) return;  // the sums over one rank, without a copy of them on the host
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
}

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
  require(gates.size() == other.gates.size(), kMoELayer, "stats.gates", other.gates.size(),
          "differs from " + std::to_string(gates.size()) + "; add statistics of one layer");
  num_dropped += other.num_dropped;
  num_tokens += other.num_tokens;
  rows_processed += other.rows_processed;
  relaxed_permutations = other.relaxed_permutations;
  for (size_t g = 0; g < gates.size(); ++g) {
    gates::GateStats& gate = gates[g];
    gates::GateStats more = other.gates[g];
    require(more.tokens_per_expert.defined() && gate.tokens_per_expert.defined() &&
                more.tokens_per_expert.sizes() == gate.tokens_per_expert.sizes(),
            kMoELayer, "stats.tokens_per_expert", gates::describe(more.tokens_per_expert),
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

double max_vio(const at::Tensor& tokens_per_expert) {
  require(tokens_per_expert.defined(), "max_vio", "tokens_per_expert", "undefined",
          "is not [num_experts]; pass that of the statistics");
  const at::Tensor counts = tokens_per_expert.to(at::kDouble);
  const double mean = counts.numel() > 0 ? counts.mean().item<double>() : 0;
  return mean > 0 ? counts.max().item<double>() / mean - 1 : 0;
}

}  // namespace perseid
