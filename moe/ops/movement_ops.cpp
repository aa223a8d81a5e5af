#include "moe/ops/movement_ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "kernels/combine.h"
#include "kernels/error.h"
#include "kernels/permute.h"
#include "moe/ops/routing_arguments.h"
#include "moe/routing_plan.h"
#include "moe/tensor_types.h"
#include "moe/threads.h"

namespace perseid::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Permute = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                   int64_t);
using Combine = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&);
using CombineBackward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                   const Tensor&, const OptionalTensor&);

template <typename Signature>
auto registered(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// ---- permute ------------------------------------------------------------------------------------
std::tuple<Tensor, Tensor, Tensor> permute_on_cpu(const Tensor& tokens, const Tensor& token_offsets,
                                                  const Tensor& expert_idx, int64_t num_experts) {
  constexpr const char* kName = "permute";
  use_libtorch_threads();
  require(tokens.dim() == 2, kName, "tokens", tokens.sizes(), "is not [T, D]");
  require(num_experts >= 1, kName, "num_experts", num_experts, "is below 1");
  const gates::Routing routing =
      cut_routing(token_offsets, expert_idx, {}, tokens.size(0), num_experts, kName);
  const LocalPlan plan = make_local_plan(routing, num_experts);
  const int64_t A = plan.num_assignments, C = expert_idx.size(0);
  const Tensor dense = tokens.contiguous(), row_of = plan.row_of_sorted();
  const Tensor rows = at::empty({C, tokens.size(1)}, tokens.options());
  kernels::permute(data_of(dense), int32_data(row_of), mutable_data_of(rows), A,
                   tokens.size(1) * tokens.element_size());
  rows.narrow(0, A, C - A).zero_();
  const Tensor places = at::full({C}, -1, at::kInt);
  places.narrow(0, 0, A).copy_(plan.place_of_assignment());
  const Tensor offsets = at::empty({num_experts + 1}, at::kLong);
  std::copy(plan.expert_offsets.begin(), plan.expert_offsets.end(),
            offsets.mutable_data_ptr<int64_t>());
  return {rows, places, offsets};
}

std::tuple<Tensor, Tensor, Tensor> permute_on_meta(const Tensor& tokens,
                                                   const Tensor& /*token_offsets*/,
                                                   const Tensor& expert_idx, int64_t num_experts) {
  const c10::SymInt capacity = expert_idx.sym_size(0);
  return {tokens.new_empty_symint({capacity, tokens.sym_size(1)}),
          expert_idx.new_empty_symint({capacity}),
          expert_idx.new_empty({num_experts + 1}, expert_idx.options().dtype(at::kLong))};
}

Tensor call_combine(const Tensor& rows, const Tensor& places, const Tensor& token_offsets,
                    const OptionalTensor& weights) {
  static const auto op = registered<Combine>("perseid::combine");
  return op.call(rows, places, token_offsets, weights);
}

struct PermuteFunction : torch::autograd::Function<PermuteFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& tokens,
                               const Tensor& token_offsets, const Tensor& expert_idx,
                               int64_t num_experts) {
    static const auto op = registered<Permute>("perseid::permute");
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [rows, places, expert_offsets] =
        op.call(tokens, token_offsets, expert_idx, num_experts);
    ctx->save_for_backward({places, token_offsets});
    ctx->mark_non_differentiable({places, expert_offsets});
    return {rows, places, expert_offsets};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    return {call_combine(gradients[0], saved[0], saved[1], {}), {}, {}, {}};
  }
};

std::tuple<Tensor, Tensor, Tensor> permute_autograd(const Tensor& tokens,
                                                    const Tensor& token_offsets,
                                                    const Tensor& expert_idx, int64_t num_experts) {
  const variable_list out = PermuteFunction::apply(tokens, token_offsets, expert_idx, num_experts);
  return {out[0], out[1], out[2]};
}

// ---- combine ------------------------------------------------------------------------------------
/// What combine and its backward read, checked.
struct Operands {
  Tensor rows, places, offsets, weights;  // weights undefined: all are 1
  int64_t num_tokens = 0;
  kernels::DType dtype = kernels::DType::kFloat32;

  kernels::CombineIndex index() const { return {int32_data(offsets), 0, int32_data(places)}; }
};

/// Each of the first `count` places names a row of its own.
void require_places(const Tensor& places, int64_t count, int64_t num_rows) {
  const int32_t* place = places.const_data_ptr<int32_t>();
  std::vector<bool> is_taken(static_cast<size_t>(num_rows), false);
  for (int64_t a = 0; a < count; ++a) {
    if (place[a] < 0 || place[a] >= num_rows) {
      require(false, "combine", "places", place[a],
              "is outside [0, " + to_text(num_rows) + " rows) at assignment " + to_text(a));
    }
    if (is_taken[static_cast<size_t>(place[a])]) {
      require(false, "combine", "places", place[a], "is there twice; a row has one assignment");
    }
    is_taken[static_cast<size_t>(place[a])] = true;
  }
}

void require_ascending(const Tensor& offsets, int64_t num_tokens) {
  const int32_t* offset = offsets.const_data_ptr<int32_t>();
  bool holds = offset[0] == 0;
  for (int64_t t = 0; t < num_tokens; ++t) holds = holds && offset[t] <= offset[t + 1];
  require(holds, "combine", "token_offsets", offset[num_tokens],
          "is the end of offsets that do not ascend from 0");
}

Operands combine_operands(const Tensor& rows, const Tensor& places, const Tensor& token_offsets,
                          const OptionalTensor& weights) {
  constexpr const char* kName = "combine";
  use_libtorch_threads();
  require(rows.dim() == 2, kName, "rows", rows.sizes(), "is not [R, width]");
  require(places.dim() == 1 && places.scalar_type() == at::kInt, kName, "places", places.sizes(),
          "is not int32 [C]");
  require(token_offsets.dim() == 1 && token_offsets.size(0) >= 1, kName, "token_offsets",
          token_offsets.sizes(), "is not [T+1]");
  Operands operands;
  operands.dtype = dtype_of(rows, kName);
  operands.num_tokens = token_offsets.size(0) - 1;
  const int64_t count = num_assignments(token_offsets, operands.num_tokens, places.size(0), kName);
  operands.rows = rows.contiguous();
  operands.places = places.contiguous();
  operands.offsets = token_offsets.contiguous();
  require_ascending(operands.offsets, operands.num_tokens);
  require_places(operands.places, count, rows.size(0));
  if (weights.has_value()) {
    require(weights->sizes() == places.sizes() && weights->scalar_type() == weight_type(rows),
            kName, "weights", to_text(weights->scalar_type()) + to_text(weights->sizes()),
            "is not " + to_text(weight_type(rows)) + to_text(places.sizes()));
    operands.weights = weights->contiguous();
  }
  return operands;
}

Tensor combine_on_cpu(const Tensor& rows, const Tensor& places, const Tensor& token_offsets,
                      const OptionalTensor& weights) {
  const Operands in = combine_operands(rows, places, token_offsets, weights);
  const int64_t width = rows.size(1);
  Tensor out = at::empty({in.num_tokens, width}, rows.options());
  kernels::combine(data_of(in.rows), in.index(), data_of(in.weights), 1, mutable_data_of(out),
                   in.num_tokens, width, in.dtype);
  return out;
}

Tensor combine_on_meta(const Tensor& rows, const Tensor& /*places*/, const Tensor& token_offsets,
                       const OptionalTensor& /*weights*/) {
  return rows.new_empty_symint({token_offsets.sym_size(0) - 1, rows.sym_size(1)});
}

/// Gradients of rows and weights, the latter [0] without weights.
std::tuple<Tensor, Tensor> combine_backward_on_cpu(const Tensor& grad_out, const Tensor& rows,
                                                   const Tensor& places,
                                                   const Tensor& token_offsets,
                                                   const OptionalTensor& weights) {
  const Operands in = combine_operands(rows, places, token_offsets, weights);
  const int64_t width = rows.size(1);
  require(grad_out.dim() == 2 && grad_out.size(0) == in.num_tokens && grad_out.size(1) == width &&
              grad_out.scalar_type() == rows.scalar_type(),
          "combine", "grad_out", grad_out.sizes(),
          "is not [" + to_text(in.num_tokens) + ", " + to_text(width) + "] in the type of rows");
  const Tensor dense = grad_out.contiguous();
  Tensor grad_rows = at::zeros_like(in.rows);
  Tensor grad_weights = in.weights.defined()
                            ? at::zeros_like(in.weights)
                            : at::empty({0}, rows.options().dtype(weight_type(rows)));
  kernels::combine_backward(data_of(dense), data_of(in.rows), in.index(), data_of(in.weights), 1,
                            mutable_data_of(grad_rows),
                            in.weights.defined() ? mutable_data_of(grad_weights) : nullptr,
                            in.num_tokens, width, in.dtype);
  return {grad_rows, grad_weights};
}

std::tuple<Tensor, Tensor> combine_backward_on_meta(const Tensor& /*grad_out*/, const Tensor& rows,
                                                    const Tensor& /*places*/,
                                                    const Tensor& /*token_offsets*/,
                                                    const OptionalTensor& weights) {
  return {at::empty_like(rows, {}, {}, {}, {}, at::MemoryFormat::Contiguous),
          weights.has_value()
              ? at::empty_like(*weights, {}, {}, {}, {}, at::MemoryFormat::Contiguous)
              : rows.new_empty({0}, rows.options().dtype(weight_type(rows)))};
}

struct CombineFunction : torch::autograd::Function<CombineFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& places,
                        const Tensor& token_offsets, const OptionalTensor& weights) {
    ctx->save_for_backward({rows, places, token_offsets, weights.value_or(Tensor())});
    at::AutoDispatchBelowADInplaceOrView below;
    return call_combine(rows, places, token_offsets, weights);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    static const auto op = registered<CombineBackward>("perseid::combine_backward");
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor weights = saved[3].defined() ? OptionalTensor(saved[3]) : std::nullopt;
    const auto [grad_rows, grad_weights] =
        op.call(gradients[0], saved[0], saved[1], saved[2], weights);
    return {grad_rows, {}, {}, weights.has_value() ? grad_weights : Tensor()};
  }
};

Tensor combine_autograd(const Tensor& rows, const Tensor& places, const Tensor& token_offsets,
                        const OptionalTensor& weights) {
  return CombineFunction::apply(rows, places, token_offsets, weights);
}

}  // namespace

void define_movement(torch::Library& library) {
  library.def(
      "permute(Tensor tokens, Tensor token_offsets, Tensor expert_idx, *, int num_experts)"
      " -> (Tensor rows, Tensor places, Tensor expert_offsets)");
  library.def(
      "combine(Tensor rows, Tensor places, Tensor token_offsets, Tensor? weights=None) -> Tensor");
  library.def(
      "combine_backward(Tensor grad_out, Tensor rows, Tensor places, Tensor token_offsets, "
      "Tensor? weights=None) -> (Tensor grad_rows, Tensor grad_weights)");
}

void implement_movement_on_cpu(torch::Library& library) {
  library.impl("permute", &permute_on_cpu);
  library.impl("combine", &combine_on_cpu);
  library.impl("combine_backward", &combine_backward_on_cpu);
}

void implement_movement_on_meta(torch::Library& library) {
  library.impl("permute", &permute_on_meta);
  library.impl("combine", &combine_on_meta);
  library.impl("combine_backward", &combine_backward_on_meta);
}

void implement_movement_autograd(torch::Library& library) {
  library.impl("permute", &permute_autograd);
  library.impl("combine", &combine_autograd);
  library.impl("combine_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace perseid::ops
