#include "moe/routing_plan.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

#include "gates/device.h"
#include "kernels/error.h"
#include "kernels/sort.h"
#include "moe/tensor_types.h"
#include "moe/threads.h"
#include "moe/trace.h"

namespace perseid {
namespace {

constexpr const char* kMakeRoutingPlan = "make_routing_plan";

at::Tensor empty_int32(int64_t size) { return at::empty({size}, at::kInt); }

/// One assignment as it travels: the row of the sender's block that it belongs to, and the expert's
/// slot on the receiving rank.
struct Placed {
  int32_t row;
  int32_t slot;
};
static_assert(sizeof(Placed) == 8, "travels as two int32");

bool is_identity(const int32_t* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] != i) return false;
  }
  return true;
}

/// Token of each assignment.
std::vector<int32_t> token_of_assignment(const gates::Routing& routing) {
  std::vector<int32_t> token(static_cast<size_t>(routing.num_assignments()));
  const at::Tensor explicit_rows =
      routing.top_k > 0 ? at::Tensor() : routing.token_offsets.contiguous();
  const int32_t* offsets = int32_data(explicit_rows);
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    const int64_t begin = offsets ? offsets[t] : t * routing.top_k;
    const int64_t end = offsets ? offsets[t + 1] : begin + routing.top_k;
    std::fill(token.begin() + begin, token.begin() + end, static_cast<int32_t>(t));
  }
  return token;
}

/// What this rank sends: fills the sender's fields of the plan and returns the assignments as they
/// travel, grouped by rank.
std::vector<Placed> plan_sends(const gates::Routing& routing, const ExpertPlacement& placement,
                               int num_ranks, bool row_per_assignment, RoutingPlan& plan) {
  const int64_t num_assignments = routing.num_assignments();
  const at::Tensor expert_idx = routing.expert_idx.contiguous();
  const int32_t* experts = int32_data(expert_idx);
  const std::vector<int32_t> token = token_of_assignment(routing);

  std::vector<int32_t> rank_of(static_cast<size_t>(num_assignments));
  for (int64_t a = 0; a < num_assignments; ++a) {
    rank_of[static_cast<size_t>(a)] = placement.rank_of(experts[a]);
  }
  std::vector<int64_t> rank_offsets(static_cast<size_t>(num_ranks) + 1);
  at::Tensor order = empty_int32(num_assignments);
  int32_t* order_data = order.mutable_data_ptr<int32_t>();
  kernels::counting_sort(rank_of.data(), num_assignments, num_ranks, rank_offsets.data(),
                         order_data);

  std::vector<Placed> placed(static_cast<size_t>(num_assignments));
  std::vector<int32_t> token_of_row;
  token_of_row.reserve(static_cast<size_t>(std::min(
      num_assignments, row_per_assignment ? num_assignments : routing.num_tokens * num_ranks)));
  plan.rows.send_rows.assign(static_cast<size_t>(num_ranks), 0);
  plan.assignments.send_rows.assign(static_cast<size_t>(num_ranks), 0);
  for (int p = 0; p < num_ranks; ++p) {
    const int64_t begin = rank_offsets[static_cast<size_t>(p)];
    const int64_t end = rank_offsets[static_cast<size_t>(p) + 1];
    const size_t first_row = token_of_row.size();
    int32_t last_token = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t a = order_data[i];
      const int32_t t = token[static_cast<size_t>(a)];
      if (row_per_assignment || t != last_token) token_of_row.push_back(t);
      last_token = t;
      placed[static_cast<size_t>(i)] = {static_cast<int32_t>(token_of_row.size() - first_row - 1),
                                        placement.slot_of(experts[a])};
    }
    plan.rows.send_rows[static_cast<size_t>(p)] =
        static_cast<int64_t>(token_of_row.size() - first_row);
    plan.assignments.send_rows[static_cast<size_t>(p)] = end - begin;
  }

  const int64_t num_rows = static_cast<int64_t>(token_of_row.size());
  if (num_rows != routing.num_tokens || !is_identity(token_of_row.data(), num_rows)) {
    plan.token_of_row = empty_int32(num_rows);
    std::copy(token_of_row.begin(), token_of_row.end(),
              plan.token_of_row.mutable_data_ptr<int32_t>());

    // Rows of each token: by rank, or with a row per assignment by choice.
    plan.token_row_offsets = empty_int32(routing.num_tokens + 1);
    plan.token_rows = empty_int32(num_rows);
    int32_t* offsets = plan.token_row_offsets.mutable_data_ptr<int32_t>();
    int32_t* rows = plan.token_rows.mutable_data_ptr<int32_t>();
    std::vector<int64_t> wide(static_cast<size_t>(routing.num_tokens) + 1);
    kernels::counting_sort(token_of_row.data(), num_rows, routing.num_tokens, wide.data(), rows);
    std::copy(wide.begin(), wide.end(), offsets);
    if (row_per_assignment) {
      for (int64_t i = 0; i < num_assignments; ++i) rows[order_data[i]] = static_cast<int32_t>(i);
    }
  }
  if (!is_identity(order_data, num_assignments)) plan.assignment_order = order;
  return placed;
}

/// The received assignments: row_offsets over all received rows, and slots.
struct Received {
  std::vector<int32_t> row_offsets;
  std::vector<int32_t> slots;
};

Received read_received(const std::vector<Placed>& placed, const RoutingPlan& plan,
                       int64_t num_local_experts) {
  Received received;
  received.row_offsets.reserve(static_cast<size_t>(plan.local.num_rows) + 1);
  received.slots.reserve(placed.size());
  size_t i = 0;
  for (size_t p = 0; p < plan.rows.recv_rows.size(); ++p) {
    const size_t end = i + static_cast<size_t>(plan.assignments.recv_rows[p]);
    int32_t last = -1;
    for (; i < end; ++i) {
      const Placed& one = placed[i];
      PERSEID_INVARIANT(one.slot >= 0 && one.slot < num_local_experts);
      PERSEID_INVARIANT(one.row == last || one.row == last + 1);
      if (one.row != last) received.row_offsets.push_back(static_cast<int32_t>(i));
      last = one.row;
      received.slots.push_back(one.slot);
    }
    PERSEID_INVARIANT(last + 1 == plan.rows.recv_rows[p]);
  }
  received.row_offsets.push_back(static_cast<int32_t>(i));
  return received;
}

void plan_local(const Received& received, int64_t num_local_experts, LocalPlan& local) {
  const std::vector<int32_t>& offsets = received.row_offsets;
  const int32_t per_row = local.num_rows > 0 ? offsets[1] - offsets[0] : 1;
  bool all_equal = true;
  for (size_t n = 0; n + 1 < offsets.size(); ++n) {
    all_equal = all_equal && offsets[n + 1] - offsets[n] == per_row;
  }
  if (all_equal) {
    local.fixed = per_row;
  } else {
    local.row_offsets = empty_int32(local.num_rows + 1);
    std::copy(offsets.begin(), offsets.end(), local.row_offsets.mutable_data_ptr<int32_t>());
  }
  local.order = empty_int32(local.num_assignments);
  local.expert_offsets.resize(static_cast<size_t>(num_local_experts) + 1);
  kernels::counting_sort(received.slots.data(), local.num_assignments, num_local_experts,
                         local.expert_offsets.data(), local.order.mutable_data_ptr<int32_t>());
}

}  // namespace

namespace {

/// One process: row t is token t, and nothing travels.
std::shared_ptr<const RoutingPlan> plan_of_one(const gates::Routing& routing, int64_t num_experts) {
  if (gates::is_on_device(routing.expert_idx)) {
    gates::validate_row_shapes(routing, num_experts, kMakeRoutingPlan);
  } else {
    gates::validate_rows(routing, num_experts, kMakeRoutingPlan);
  }
  gates::Routing dense = routing;
  dense.expert_idx = routing.expert_idx.contiguous();
  if (dense.token_offsets.defined()) dense.token_offsets = routing.token_offsets.contiguous();
  auto plan = std::make_shared<RoutingPlan>();
  plan->num_tokens = routing.num_tokens;
  plan->num_assignments = routing.num_assignments();
  plan->rows = {{routing.num_tokens}, {routing.num_tokens}};
  plan->assignments = {{plan->num_assignments}, {plan->num_assignments}};
  plan->local = make_local_plan(dense, num_experts);
  return plan;
}

/// A plan made on the host, with its tensors on `device`.
void move_to(at::Device device, RoutingPlan& plan) {
  LocalPlan& local = plan.local;
  for (at::Tensor* tensor : {&plan.token_of_row, &plan.assignment_order, &plan.token_row_offsets,
                             &plan.token_rows, &local.row_offsets, &local.order}) {
    if (tensor->defined()) *tensor = tensor->to(device);
  }
  at::Tensor offsets = at::empty({local.num_local_experts() + 1}, at::kLong);
  std::copy(local.expert_offsets.begin(), local.expert_offsets.end(),
            offsets.mutable_data_ptr<int64_t>());
  local.device_offsets = offsets.to(device);
}

/// The integers of a routing in host memory; its weights are left out.
gates::Routing host_integers(const gates::Routing& routing, const gates::Routing* on_host) {
  gates::Routing host = on_host ? *on_host : routing;
  host.weights = at::Tensor();
  if (on_host) return host;
  const std::vector<at::Tensor> copies =
      gates::to_host({routing.expert_idx, routing.token_offsets});
  host.expert_idx = copies[0];
  host.token_offsets = copies[1];
  return host;
}

}  // namespace

kernels::CombineIndex RoutingPlan::by_token() const {
  if (!token_rows.defined()) return {nullptr, 1, nullptr};
  return {int32_data(token_row_offsets), 0, int32_data(token_rows)};
}

std::shared_ptr<const RoutingPlan> make_routing_plan(const gates::Routing& routing_in,
                                                     const ExpertPlacement& placement,
                                                     const comm::Group& group,
                                                     const PlanOptions& options) {
  use_libtorch_threads();
  const Trace trace("perseid::make_routing_plan");
  const int num_ranks = group.size();
  const auto require_placement = [&] {
    require(placement.num_ranks() == num_ranks, kMakeRoutingPlan, "placement.num_ranks",
            placement.num_ranks(),
            "differs from the " + to_text(num_ranks) + " ranks of the group");
  };
  comm::CallSite site = options.site;
  if (!site.operation) site.operation = kMakeRoutingPlan;
  // On the host tokens without an expert are left out, as with more ranks.
  const bool is_device = gates::is_on_device(routing_in.expert_idx);
  if (num_ranks == 1 && (is_device || routing_in.top_k > 0)) {
    std::shared_ptr<const RoutingPlan> plan;
    comm::before_exchange(comm::NextExchange::kCounts, group, site, [&] {
      require_placement();
      plan = plan_of_one(routing_in, placement.num_experts());
    });
    return plan;
  }
  auto plan = std::make_shared<RoutingPlan>();
  std::vector<Placed> sent;
  gates::Routing routing;
  comm::before_exchange(comm::NextExchange::kCounts, group, site, [&] {
    routing = host_integers(routing_in, options.on_host);
    require_placement();
    gates::validate_rows(routing, placement.num_experts(), kMakeRoutingPlan);
    plan->num_tokens = routing.num_tokens;
    plan->num_assignments = routing.num_assignments();
    // With one rank every sum is formed in choice order already.
    sent = plan_sends(routing, placement, num_ranks, options.strict && num_ranks > 1, *plan);
  });

  const auto ranks = static_cast<size_t>(num_ranks);
  std::vector<int64_t> counts(2 * ranks);
  for (size_t p = 0; p < ranks; ++p) {
    counts[2 * p] = plan->rows.send_rows[p];
    counts[2 * p + 1] = plan->assignments.send_rows[p];
  }
  const std::vector<int64_t> announced = comm::exchange_counts(counts, 2, group, site);
  plan->rows.recv_rows.resize(ranks);
  plan->assignments.recv_rows.resize(ranks);
  for (size_t p = 0; p < ranks; ++p) {
    plan->rows.recv_rows[p] = announced[2 * p];
    plan->assignments.recv_rows[p] = announced[2 * p + 1];
  }
  plan->local.num_rows = plan->rows.num_recv_rows();
  plan->local.num_assignments = plan->assignments.num_recv_rows();

  std::vector<Placed> received(static_cast<size_t>(plan->local.num_assignments));
  comm::exchange_rows(sent.data(), received.data(), {kernels::DType::kInt32, 2}, plan->assignments,
                      group, site);
  const int64_t num_local = placement.num_local_experts(group.rank());
  plan_local(read_received(received, *plan, num_local), num_local, plan->local);
  if (is_device) move_to(routing_in.expert_idx.device(), *plan);
  return plan;
}

}  // namespace perseid
