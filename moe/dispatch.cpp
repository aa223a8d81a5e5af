// Movement of rows between ranks as differentiable operations; the only autograd for data movement.
// Everything here is a pure function of (data, plan): forward and backward share it.
#include "moe/dispatch.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "comm/exchange.h"
#include "gates/device.h"
#include "kernels/combine.h"
#include "kernels/permute.h"
#include "moe/tensor_types.h"
#include "moe/trace.h"

namespace perseid {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// What a backward needs besides gradients.
struct Pipe : torch::CustomClassHolder {
  Pipe(PlanPtr plan_, comm::Group group_, comm::CallSite site_)
      : plan(std::move(plan_)), group(std::move(group_)), site(site_) {}
  PlanPtr plan;
  comm::Group group;
  comm::CallSite site;
};

void keep(AutogradContext* ctx, const c10::intrusive_ptr<Pipe>& pipe) {
  ctx->saved_data["pipe"] = c10::IValue::make_capsule(pipe);
}
c10::intrusive_ptr<Pipe> kept(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Pipe>(ctx->saved_data["pipe"].toCapsule());
}

int64_t row_bytes(const at::Tensor& rows) { return rows.size(1) * rows.element_size(); }

at::Tensor permuted(const at::Tensor& rows, const at::Tensor& row_of) {
  at::Tensor out = at::empty({row_of.size(0), rows.size(1)}, rows.options());
  kernels::permute(data_of(rows), int32_data(row_of), mutable_data_of(out), row_of.size(0),
                   row_bytes(rows), gates::stream_of(rows, "dispatch"));
  return out;
}

/// Rows at their destination. A group of one keeps them where they are, without a copy.
at::Tensor exchanged(const at::Tensor& rows, const comm::ExchangePlan& plan, const Pipe& pipe) {
  if (pipe.group.size() == 1) return rows;
  at::Tensor received = at::empty({plan.num_recv_rows(), rows.size(1)}, rows.options());
  comm::exchange_rows(data_of(rows), mutable_data_of(received),
                      {dtype_of(rows, "dispatch"), rows.size(1)}, plan, pipe.group, pipe.site,
                      gates::stream_of(rows, "dispatch"));
  return received;
}

at::Tensor dispatch_rows(const at::Tensor& tokens, const Pipe& pipe) {
  const Trace trace("perseid::dispatch");
  const at::Tensor dense = tokens.contiguous();
  const at::Tensor& row_of = pipe.plan->token_of_row;
  return exchanged(row_of.defined() ? permuted(dense, row_of) : dense, pipe.plan->rows, pipe);
}

at::Tensor combine_rows(const at::Tensor& rows, const Pipe& pipe) {
  const Trace trace("perseid::combine");
  const RoutingPlan& plan = *pipe.plan;
  const at::Tensor home = exchanged(rows.contiguous(), comm::reversed(plan.rows), pipe);
  if (!plan.token_rows.defined()) return home;
  at::Tensor out = at::empty({plan.num_tokens, home.size(1)}, home.options());
  kernels::combine(data_of(home), plan.by_token(), nullptr, 1, mutable_data_of(out),
                   plan.num_tokens, home.size(1), dtype_of(home, "combine"),
                   gates::stream_of(home, "combine"));
  return out;
}

at::Tensor send_weights(const at::Tensor& weights, const Pipe& pipe) {
  const at::Tensor dense = weights.contiguous();
  const at::Tensor& order = pipe.plan->assignment_order;
  return exchanged(order.defined() ? permuted(dense, order) : dense, pipe.plan->assignments, pipe);
}

at::Tensor return_weights(const at::Tensor& weights, const Pipe& pipe) {
  const at::Tensor home =
      exchanged(weights.contiguous(), comm::reversed(pipe.plan->assignments), pipe);
  const at::Tensor& order = pipe.plan->assignment_order;
  if (!order.defined()) return home;
  at::Tensor out = at::empty_like(home);
  kernels::unpermute(data_of(home), int32_data(order), mutable_data_of(out), order.size(0),
                     row_bytes(home), gates::stream_of(home, "dispatch_weights"));
  return out;
}

/// A linear operator and its transpose, as an autograd function.
template <auto Forward, auto Transpose>
struct Linear : torch::autograd::Function<Linear<Forward, Transpose>> {
  static Variable forward(AutogradContext* ctx, const Variable& input,
                          const c10::intrusive_ptr<Pipe>& pipe) {
    keep(ctx, pipe);
    at::AutoDispatchBelowADInplaceOrView below;
    return Forward(input, *pipe);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView below;
    return {Transpose(grads[0], *kept(ctx)), Variable()};
  }
};

using Dispatch = Linear<&dispatch_rows, &combine_rows>;
using Combine = Linear<&combine_rows, &dispatch_rows>;
using DispatchWeights = Linear<&send_weights, &return_weights>;

/// What one of the three operations works with.
struct Operation {
  const char* name;
  int64_t (*num_rows)(const RoutingPlan&);  ///< that it takes
  at::Tensor RoutingPlan::*order;           ///< of the rows; undefined: they keep their places
};

/// Checks the arguments, of which what is wrong reaches the peers as well, and applies Function.
/// With one rank rows that keep their places stay where they are, without a node of the graph.
template <typename Function>
at::Tensor run(const Operation& operation, const at::Tensor& rows, const PlanPtr& plan,
               const comm::Group& group, comm::CallSite site) {
  const char* const name = operation.name;
  if (!site.operation) site.operation = name;
  comm::before_exchange(comm::NextExchange::kRows, group, site, [&] {
    require(plan != nullptr, name, "plan", "null", "is none; make_routing_plan makes it");
    require(plan->rows.send_rows.size() == static_cast<size_t>(group.size()), name, "plan.ranks",
            plan->rows.send_rows.size(),
            "differs from the " + to_text(group.size()) + " ranks of the group");
    require(rows.defined() && rows.dim() == 2, name, "dim", rows.defined() ? rows.dim() : -1,
            "is not 2; pass rows of one width");
    const int64_t expected = operation.num_rows(*plan);
    require(rows.size(0) == expected, name, "rows", rows.size(0),
            "differs from " + to_text(expected) + " rows of the plan");
    gates::stream_of(rows, name);  // throws for devices without kernels
    dtype_of(rows, name);
  });
  if (group.size() == 1 && !((*plan).*operation.order).defined()) return rows.contiguous();
  return Function::apply(rows, c10::make_intrusive<Pipe>(plan, group, site));
}

}  // namespace

at::Tensor dispatch(const at::Tensor& tokens, const PlanPtr& plan, const comm::Group& group,
                    comm::CallSite site) {
  const auto num_rows = [](const RoutingPlan& p) { return p.num_tokens; };
  return run<Dispatch>({"dispatch", num_rows, &RoutingPlan::token_of_row}, tokens, plan, group,
                       site);
}

at::Tensor combine(const at::Tensor& rows, const PlanPtr& plan, const comm::Group& group,
                   comm::CallSite site) {
  const auto num_rows = [](const RoutingPlan& p) { return p.local.num_rows; };
  return run<Combine>({"combine", num_rows, &RoutingPlan::token_rows}, rows, plan, group, site);
}

at::Tensor dispatch_weights(const at::Tensor& weights, const PlanPtr& plan,
                            const comm::Group& group, comm::CallSite site) {
  const auto num_rows = [](const RoutingPlan& p) { return p.num_assignments; };
  return run<DispatchWeights>({"dispatch_weights", num_rows, &RoutingPlan::assignment_order},
                              weights, plan, group, site);
}

}  // namespace perseid
