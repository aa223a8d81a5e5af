#pragma once
#include <ATen/core/Tensor.h>

#include <memory>

#include "comm/group.h"
#include "moe/routing_plan.h"

namespace perseid {

using PlanPtr = std::shared_ptr<const RoutingPlan>;

// All three are collective over `group` (with 0 rows too), differentiable, and keep only the plan
// for the backward. combine is the transpose of dispatch: the backward of each is the other. With
// one rank, rows that need not change their places are returned as they are, if contiguous. For
// arguments that do not fit, also on one rank alone, every rank throws ConfigError.

/// Rows of tokens at the ranks of their experts. @param tokens [T, D] @return [N, D]
at::Tensor dispatch(const at::Tensor& tokens, const PlanPtr& plan, const comm::Group& group,
                    comm::CallSite site = {});

/// Outputs home, summed per token over its rows, in a fixed order, unweighted; a token without rows
/// gets 0. @param rows [N, W] @return [T, W]
at::Tensor combine(const at::Tensor& rows, const PlanPtr& plan, const comm::Group& group,
                   comm::CallSite site = {});

/// Weights of assignments to the ranks of their experts. @param weights [A, G] @return [R, G]
at::Tensor dispatch_weights(const at::Tensor& weights, const PlanPtr& plan,
                            const comm::Group& group, comm::CallSite site = {});

}  // namespace perseid
