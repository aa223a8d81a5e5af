#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "comm/exchange.h"
#include "gates/routing.h"
#include "kernels/combine.h"
#include "moe/placement.h"

namespace perseid {

/// The experts' side of a plan: which received row goes to which local expert. Integers only.
struct LocalPlan {
  int64_t num_rows = 0;         ///< N received rows
  int64_t num_assignments = 0;  ///< R pairs (row, local expert), grouped by row
  int64_t fixed = 0;            ///< > 0: every row has exactly this many, row_offsets is undefined
  at::Tensor row_offsets;       ///< [N+1] int32: row n has assignments row_offsets[n] .. [n+1]-1
  at::Tensor order;  ///< [R] int32: sorted place r holds assignment order[r]; by (expert, token)
  std::vector<int64_t> expert_offsets;  ///< [L+1] sorted places of each local expert; empty for a
                                        ///< plan that was made on a GPU
  at::Tensor device_offsets;            ///< [L+1] int64, the same on a GPU; undefined without one

  int64_t num_local_experts() const;
  std::vector<int64_t> host_offsets() const;  ///< on the host; a plan made on a GPU makes it wait
  at::Tensor expert_ends() const;             ///< [L] int32 on a GPU: end of each local expert
  /// [R] int32: sorted place of each assignment, the inverse of `order`.
  at::Tensor place_of_assignment() const;
  /// [R] int32: row of each sorted place.
  at::Tensor row_of_sorted() const;
};

/// The integer schedule of one step, from routing alone: no floats, no gradients. Equal routing
/// gives equal plans, bit for bit.
///
/// A token travels once to each rank that holds any of its experts: rows are (token, rank) pairs
/// and each carries a list of assignments (row, slot). With `strict` a row is one (token, expert)
/// pair instead: more bytes, but then a token's outputs are summed at home in choice order, so
/// results do not depend on the number of ranks, bit for bit.
struct RoutingPlan {
  int64_t num_tokens = 0;          ///< T
  int64_t num_assignments = 0;     ///< A
  comm::ExchangePlan rows;         ///< rows of tokens and of outputs, per rank
  comm::ExchangePlan assignments;  ///< weights of assignments, per rank
  at::Tensor token_of_row;  ///< [S] int32: send row s is token token_of_row[s]; undefined: row t is
                            ///< token t
  at::Tensor assignment_order;   ///< [A] int32: sent weight i is assignment assignment_order[i];
                                 ///< undefined: i
  at::Tensor token_row_offsets;  ///< [T+1] int32 into token_rows; undefined: one row per token
  at::Tensor token_rows;         ///< [S] int32: send rows of each token, in the order of summation
  LocalPlan local;

  /// The outputs of a token are the sum over its rows.
  kernels::CombineIndex by_token() const;
};

struct PlanOptions {
  bool strict = true;  ///< see RoutingPlan
  comm::CallSite site;
  /// The integers of the routing in host memory, where the caller has them: with several ranks the
  /// host then need not wait for a copy of those on a GPU.
  const gates::Routing* on_host = nullptr;
};

/// Collective over `group`, also with T = 0: each rank tells its peers rows, assignments and slots.
/// Throws ConfigError, on every rank, if the routing of one is not legal (gates::validate_rows).
/// For a routing on a GPU the plan lies there, too: with one rank it is made there and the host
/// does not wait; with more it is made on the host, from a copy of the routing.
/// @param placement  of num_ranks() = group.size(), equal on all ranks
std::shared_ptr<const RoutingPlan> make_routing_plan(const gates::Routing& routing,
                                                     const ExpertPlacement& placement,
                                                     const comm::Group& group,
                                                     const PlanOptions& options = {});

/// The plan of one process that holds all experts: row t is token t. Makes no copy of the offsets.
/// On a GPU it is made there, without a host wait.
/// @param routing  contiguous, ids in [0, num_experts); not checked here, see gates::validate. On a
///                 GPU an id outside takes no row.
LocalPlan make_local_plan(const gates::Routing& routing, int64_t num_experts);

/// The plan in which every one of T rows goes to the one expert of this rank: shared experts.
LocalPlan make_dense_plan(int64_t num_tokens, at::Device device = at::kCPU);

}  // namespace perseid
