#include "moe/grouped_mlp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <limits>

#include "gates/device.h"
#include "gates/gate.h"
#include "kernels/error.h"
#include "kernels/random.h"
#include "moe/autocast.h"
#include "moe/device_experts.h"
#include "moe/grouped_rows.h"
#include "moe/mlp_core.h"
#include "moe/products.h"
#include "moe/row_counts.h"
#include "moe/segments.h"
#include "moe/sparsifier.h"
#include "moe/tensor_types.h"
#include "moe/threads.h"

namespace perseid {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using PlanPtr = std::shared_ptr<const RoutingPlan>;
using RowCountsPtr = std::shared_ptr<RowCounts>;

struct PlanHolder : torch::CustomClassHolder {
  PlanHolder(PlanPtr plan_, RowCountsPtr row_counts_)
      : plan(std::move(plan_)), row_counts(std::move(row_counts_)) {}
  PlanPtr plan;
  RowCountsPtr row_counts;
};

void keep(AutogradContext* ctx, const PlanPtr& plan, const RowCountsPtr& row_counts) {
  ctx->saved_data["plan"] =
      c10::IValue::make_capsule(c10::make_intrusive<PlanHolder>(plan, row_counts));
}
/// For the backward, which counts its rows.
PlanPtr kept_plan(AutogradContext* ctx) {
  const auto kept =
      c10::static_intrusive_pointer_cast<PlanHolder>(ctx->saved_data["plan"].toCapsule());
  kept->row_counts->add(kept->plan->local);
  return kept->plan;
}

/// Autograd functions take no undefined tensor; a missing bias travels as one of no dimension 2.
at::Tensor or_missing(const at::Tensor& bias) {
  return bias.defined() ? bias : at::empty({0}, at::kFloat);
}
at::Tensor or_undefined(const at::Tensor& bias) { return bias.dim() == 2 ? bias : at::Tensor(); }

/// Autograd of mlp_forward and mlp_backward.
struct MlpFunction : torch::autograd::Function<MlpFunction> {
  enum Input { kRows, kWeights, kUp, kUpBias, kDown, kDownBias };

  static Variable forward(AutogradContext* ctx, const Variable& rows_in, const Variable& weights_in,
                          const Variable& up, const Variable& up_bias, const Variable& down,
                          const Variable& down_bias, MlpKind kind, const PlanPtr& plan,
                          const RowCountsPtr& row_counts) {
    at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor rows = rows_in.contiguous();
    const at::Tensor weights = weights_in.contiguous();
    const MlpOutput output =
        mlp_forward(rows, weights, {up, or_undefined(up_bias), down, or_undefined(down_bias)}, kind,
                    plan->local);
    ctx->save_for_backward({rows, weights, up, up_bias, down, down_bias, output.pre});
    ctx->saved_data["activation"] = static_cast<int64_t>(kind.activation);
    ctx->saved_data["gated"] = kind.gated;
    if (kind.sparsity.kind != ActivationSparsityKind::kNone) {
      ctx->saved_data["sparsity"] =
          std::vector<int64_t>{static_cast<int64_t>(kind.sparsity.kind), kind.sparsity.k,
                               static_cast<int64_t>(kind.sparsity.unbiased),
                               static_cast<int64_t>(kind.sparsity.detach_threshold)};
    }
    keep(ctx, plan, row_counts);
    return output.out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView below;
    const variable_list saved = ctx->get_saved_variables();
    MlpKind kind{static_cast<kernels::Activation>(ctx->saved_data["activation"].toInt()),
                 ctx->saved_data["gated"].toBool()};
    if (const auto found = ctx->saved_data.find("sparsity"); found != ctx->saved_data.end()) {
      const std::vector<int64_t> fields = found->second.toIntVector();
      kind.sparsity = {static_cast<ActivationSparsityKind>(fields[0]), fields[1], fields[2] != 0,
                       fields[3] != 0};
    }
    MlpWanted wanted;
    wanted.rows = ctx->needs_input_grad(kRows);
    wanted.weights = ctx->needs_input_grad(kWeights);
    wanted.up = ctx->needs_input_grad(kUp);
    wanted.up_bias = ctx->needs_input_grad(kUpBias);
    wanted.down = ctx->needs_input_grad(kDown);
    wanted.down_bias = ctx->needs_input_grad(kDownBias);
    const MlpGradients gradients = mlp_backward(
        grads[0].contiguous(), saved[kRows], saved[kWeights],
        {saved[kUp], or_undefined(saved[kUpBias]), saved[kDown], or_undefined(saved[kDownBias])},
        saved[kDownBias + 1], kind, kept_plan(ctx)->local, wanted);
    return {gradients.rows,
            gradients.weights,
            gradients.up,
            gradients.up_bias,
            gradients.down,
            gradients.down_bias,
            {},
            {},
            {}};
  }
};

/// The linear experts: y = W x + b, weighted in the reduction. The backward forms y once more.
struct LinearFunction : torch::autograd::Function<LinearFunction> {
  enum Input { kRows, kWeights, kMatrix, kBias };

  static at::Tensor outputs(const at::Tensor& rows, const at::Tensor& matrix,
                            const at::Tensor& bias, const LocalPlan& local) {
    if (gates::is_on_device(rows)) return device_linear_outputs(rows, matrix, bias, local);
    const at::Tensor row_of = local.row_of_sorted();
    at::Tensor out = at::empty({local.num_assignments, matrix.size(1)}, rows.options());
    for_each_segment(make_segments(local), [&](const Segment& segment, Scratch& scratch) {
      multiply(out.narrow(0, segment.begin, segment.num_rows()),
               SegmentRows(rows, row_of, segment, scratch, 0), matrix.select(0, segment.expert).t(),
               expert_part(bias, segment.expert), scratch);
    });
    return out;
  }

  static Variable forward(AutogradContext* ctx, const Variable& rows_in, const Variable& weights_in,
                          const Variable& matrix, const Variable& bias, const PlanPtr& plan,
                          const RowCountsPtr& row_counts) {
    at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor rows = rows_in.contiguous();
    const at::Tensor weights = weights_in.contiguous();
    ctx->save_for_backward({rows, weights, matrix, bias});
    keep(ctx, plan, row_counts);
    return RowSums(plan->local, dtype_of(rows, "grouped_linear"))
        .reduced(outputs(rows, matrix, or_undefined(bias), plan->local), weights);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView below;
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &rows = saved[kRows], &weights = saved[kWeights], &matrix = saved[kMatrix];
    const at::Tensor bias = or_undefined(saved[kBias]);
    const PlanPtr plan = kept_plan(ctx);
    const LocalPlan& local = plan->local;
    const bool wants_rows = ctx->needs_input_grad(kRows);
    const at::Tensor grad_out = grads[0].contiguous();
    const RowSums sums(local, dtype_of(rows, "grouped_linear"));
    const at::Tensor grad_y = sums.expanded(grad_out, weights, matrix.size(1));
    at::Tensor grad_weights;
    if (ctx->needs_input_grad(kWeights)) {
      grad_weights = sums.weight_gradient(grad_out, outputs(rows, matrix, bias, local), weights);
    }
    if (gates::is_on_device(rows)) {
      const LinearExpertGradients grads_of = device_linear_backward(
          grad_y, rows, matrix, local, wants_rows, ctx->needs_input_grad(kMatrix),
          bias.defined() && ctx->needs_input_grad(kBias));
      return {grads_of.rows, grad_weights, grads_of.matrix, grads_of.bias, {}, {}};
    }
    const at::Tensor row_of = local.row_of_sorted();
    at::Tensor grad_x = wants_rows
                            ? at::empty({local.num_assignments, rows.size(1)}, rows.options())
                            : at::Tensor();
    const std::vector<Segment> segments = make_segments(local);
    StackedGradient grad_matrix = wanted_gradient(ctx->needs_input_grad(kMatrix), matrix, segments);
    StackedGradient grad_bias = wanted_gradient(ctx->needs_input_grad(kBias), bias, segments);
    for_each_segment(segments, [&](const Segment& segment, Scratch& scratch) {
      const at::Tensor g = grad_y.narrow(0, segment.begin, segment.num_rows());
      if (grad_matrix.wanted()) {
        multiply_transposed(grad_matrix.part(segment), SegmentRows(g),
                            SegmentRows(rows, row_of, segment, scratch, 0), scratch);
      }
      if (grad_bias.wanted()) grad_bias.part(segment).copy_(g.sum(0));
      if (wants_rows) {
        multiply(grad_x.narrow(0, segment.begin, segment.num_rows()), SegmentRows(g),
                 matrix.select(0, segment.expert), {}, scratch);
      }
    });
    return {wants_rows ? sums.reduced(grad_x) : at::Tensor(),
            grad_weights,
            grad_matrix.finish(),
            grad_bias.finish(),
            {},
            {}};
  }
};

/// A stacked parameter [L, ...] of which each expert's part is drawn by its global id.
at::Tensor stacked_uniform(const std::vector<int64_t>& expert_ids, std::vector<int64_t> shape,
                           double bound, uint64_t seed, int64_t layer_id, uint64_t parameter) {
  shape.insert(shape.begin(), static_cast<int64_t>(expert_ids.size()));
  at::Tensor stacked = at::empty(shape, at::kFloat);
  for (size_t slot = 0; slot < expert_ids.size(); ++slot) {
    at::Tensor one = stacked.select(0, static_cast<int64_t>(slot));
    const kernels::RandomKey key = kernels::random_key(seed)
                                       .with(static_cast<uint64_t>(layer_id))
                                       .with(static_cast<uint64_t>(expert_ids[slot]))
                                       .with(parameter);
    kernels::fill_uniform(mutable_data_of(one), one.numel(), kernels::DType::kFloat32, -bound,
                          bound, key);
  }
  return stacked;
}

at::Tensor stacked_zeros(const std::vector<int64_t>& expert_ids, int64_t width) {
  return at::empty({static_cast<int64_t>(expert_ids.size()), width}, at::kFloat).zero_();
}

double bound_or_fan_in(double bound, int64_t fan_in) {
  return bound > 0 ? bound : 1.0 / std::sqrt(static_cast<double>(fan_in));
}

/// Rows [first, first + count) of the matrix of an expert.
SparseUnit stacked_unit(const char* name, const UnitKey& key, const at::Tensor& stacked,
                        int64_t slot, int64_t first, int64_t count,
                        const std::shared_ptr<EffectiveParts>& parts) {
  SparseUnit unit;
  unit.name = name;
  unit.key = key;
  unit.parameter = stacked;
  unit.slot = slot;
  unit.first_out = first;
  unit.num_out = count;
  unit.effective_parts = parts;
  return unit;
}

void require_type(const at::Tensor& rows, const at::Tensor& parameter, const char* operation) {
  require(rows.scalar_type() == parameter.scalar_type(), operation, "rows.dtype",
          c10::toString(rows.scalar_type()),
          std::string("differs from the experts' ") + c10::toString(parameter.scalar_type()) +
              "; convert the module or the tokens");
}

void check_options(const GroupedMLPOptions& options) {
  require(options.d_ff() >= 1, "grouped_mlp", "d_ff", options.d_ff(), "is below 1");
  require(options.d_ff() <= std::numeric_limits<int32_t>::max(), "grouped_mlp", "d_ff",
          options.d_ff(), "exceeds 2147483647");
  require(options.init_bound() >= 0 && std::isfinite(options.init_bound()), "grouped_mlp",
          "init_bound", options.init_bound(), "is not a finite number >= 0");
  validate(options.activation_sparsity(), options.d_ff(), "grouped_mlp");
}

}  // namespace

GroupedMLP::GroupedMLP(const GroupedMLPOptions& options, const ExpertPlacement& placement,
                       int ep_rank)
    : Experts("grouped_mlp", placement.experts_of(ep_rank), options.d_model(),
              options.d_out() != 0 ? options.d_out() : options.d_model()),
      options_(options) {
  check_options(options);
  use_libtorch_threads();
  const int64_t up_rows = options.gated() ? 2 * options.d_ff() : options.d_ff();
  const int64_t L = num_local_experts();
  gates::require_product({L, up_rows, d_in()}, "grouped_mlp", "num_local_experts*d_ff*d_model");
  gates::require_product({L, d_out(), options.d_ff()}, "grouped_mlp",
                         "num_local_experts*d_out*d_ff");
  const auto random = [&](std::vector<int64_t> shape, int64_t fan_in, uint64_t parameter) {
    return stacked_uniform(expert_ids(), std::move(shape),
                           bound_or_fan_in(options.init_bound(), fan_in), options.seed(),
                           options.layer_id(), parameter);
  };
  const std::string up_name = options.gated() ? "gate_up" : "up";
  up_proj = register_parameter(up_name + "_proj", random({up_rows, d_in()}, d_in(), 0));
  down_proj = register_parameter("down_proj", random({d_out(), options.d_ff()}, options.d_ff(), 1));
  if (options.bias()) {
    up_bias = register_parameter(up_name + "_bias", stacked_zeros(expert_ids(), up_rows));
    down_bias = register_parameter("down_bias", stacked_zeros(expert_ids(), d_out()));
  }
}

at::Tensor GroupedMLP::forward(const at::Tensor& rows, const at::Tensor& weights,
                               const PlanPtr& plan) {
  require_inputs(rows, weights, plan);
  require_type(rows, up_proj, "grouped_mlp");
  require_parameters();
  const Autocast autocast(rows);
  return autocast.back(MlpFunction::apply(
      autocast.cast(rows), weights, autocast.cast(up_parts_->of(up_proj)),
      or_missing(autocast.cast(up_bias)), autocast.cast(down_parts_->of(down_proj)),
      or_missing(autocast.cast(down_bias)),
      MlpKind{options_.activation(), options_.gated(), options_.activation_sparsity()}, plan,
      row_counts()));
}

at::Tensor GroupedMLP::active_hidden(const at::Tensor& rows, const PlanPtr& plan) {
  require(plan != nullptr, "active_hidden", "plan", "null", "is none; make_routing_plan makes it");
  require(rows.defined(), "active_hidden", "rows", "undefined", "is no tensor");
  require_inputs(
      rows, at::empty({plan->local.num_assignments, 1}, rows.options().dtype(weight_type(rows))),
      plan);
  require_type(rows, up_proj, "grouped_mlp");
  require_parameters();
  const c10::NoGradGuard no_grad;
  return mlp_active_hidden(
      rows.contiguous(), {up_parts_->of(up_proj), up_bias, down_parts_->of(down_proj), down_bias},
      MlpKind{options_.activation(), options_.gated(), options_.activation_sparsity()},
      plan->local);
}

void GroupedMLP::require_parameters() const {
  const int64_t L = num_local_experts(), F = options_.d_ff();
  const int64_t up_rows = options_.gated() ? 2 * F : F;
  gates::require_shape(up_proj, {L, up_rows, d_in()}, "grouped_mlp", "up_proj");
  gates::require_shape(down_proj, {L, d_out(), F}, "grouped_mlp", "down_proj");
  if (options_.bias()) {
    gates::require_shape(up_bias, {L, up_rows}, "grouped_mlp", "up_bias");
    gates::require_shape(down_bias, {L, d_out()}, "grouped_mlp", "down_bias");
  }
}

std::vector<std::string> GroupedMLP::matrix_names() const {
  if (options_.gated()) return {"w1", "w3", "w2"};
  return {"w1", "w2"};
}

std::vector<SparseUnit> GroupedMLP::matrices() const {
  std::vector<SparseUnit> units;
  const int64_t F = options_.d_ff();
  for (int64_t slot = 0; slot < num_local_experts(); ++slot) {
    const int64_t id = expert_ids()[static_cast<size_t>(slot)];
    units.push_back(stacked_unit("w1", {0, id, Matrix::kW1}, up_proj, slot, 0, F, up_parts_));
    if (options_.gated()) {
      units.push_back(stacked_unit("w3", {0, id, Matrix::kW3}, up_proj, slot, F, F, up_parts_));
    }
    units.push_back(
        stacked_unit("w2", {0, id, Matrix::kW2}, down_proj, slot, 0, d_out(), down_parts_));
  }
  for (SparseUnit& unit : units) unit.has_bias = options_.bias();
  return units;
}

GroupedLinear::GroupedLinear(const GroupedLinearOptions& options, const ExpertPlacement& placement,
                             int ep_rank)
    : Experts("grouped_linear", placement.experts_of(ep_rank), options.d_in(), options.d_out()),
      options_(options) {
  require(options.init_bound() >= 0 && std::isfinite(options.init_bound()), "grouped_linear",
          "init_bound", options.init_bound(), "is not a finite number >= 0");
  gates::require_product({num_local_experts(), d_out(), d_in()}, "grouped_linear",
                         "num_local_experts*d_out*d_in");
  use_libtorch_threads();
  weight =
      register_parameter("weight", stacked_uniform(expert_ids(), {d_out(), d_in()},
                                                   bound_or_fan_in(options.init_bound(), d_in()),
                                                   options.seed(), options.layer_id(), 0));
  if (options.bias()) bias = register_parameter("bias", stacked_zeros(expert_ids(), d_out()));
}

at::Tensor GroupedLinear::forward(const at::Tensor& rows, const at::Tensor& weights,
                                  const PlanPtr& plan) {
  require_inputs(rows, weights, plan);
  require_type(rows, weight, "grouped_linear");
  const int64_t L = num_local_experts();
  gates::require_shape(weight, {L, d_out(), d_in()}, "grouped_linear", "weight");
  if (options_.bias()) gates::require_shape(bias, {L, d_out()}, "grouped_linear", "bias");
  const Autocast autocast(rows);
  return autocast.back(LinearFunction::apply(autocast.cast(rows), weights,
                                             autocast.cast(parts_->of(weight)),
                                             or_missing(autocast.cast(bias)), plan, row_counts()));
}

std::vector<std::string> GroupedLinear::matrix_names() const { return {"w1"}; }

std::vector<SparseUnit> GroupedLinear::matrices() const {
  std::vector<SparseUnit> units;
  for (int64_t slot = 0; slot < num_local_experts(); ++slot) {
    const int64_t id = expert_ids()[static_cast<size_t>(slot)];
    units.push_back(stacked_unit("w1", {0, id, Matrix::kW1}, weight, slot, 0, d_out(), parts_));
  }
  return units;
}

}  // namespace perseid
