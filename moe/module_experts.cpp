#include "moe/module_experts.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <mutex>
#include <optional>

#include "gates/device.h"
#include "kernels/combine.h"
#include "kernels/error.h"
#include "kernels/permute.h"
#include "kernels/random.h"
#include "moe/row_counts.h"
#include "moe/sparsifier.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kModuleExperts = "module_experts";

/// Assignments of each row as places of the sorted order. The tensors must outlive the result.
kernels::CombineIndex row_index(const at::Tensor& place_of, const at::Tensor& row_offsets,
                                int64_t fixed) {
  kernels::CombineIndex index;
  index.offsets = int32_data(row_offsets);
  index.fixed = fixed;
  index.row_of = int32_data(place_of);
  return index;
}

/// The plan whose rows the backward counts.
struct CountedPlan : torch::CustomClassHolder {
  CountedPlan(std::shared_ptr<const RoutingPlan> plan_, std::shared_ptr<RowCounts> row_counts_)
      : plan(std::move(plan_)), row_counts(std::move(row_counts_)) {}
  std::shared_ptr<const RoutingPlan> plan;
  std::shared_ptr<RowCounts> row_counts;
};

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

/// Rows of each expert that has any, in sorted order: [rows of expert, d_in] each, in own memory,
/// so that a module may work in place. The backward is its transpose, a combine with unit weights.
struct GatherRows : torch::autograd::Function<GatherRows> {
  static variable_list forward(AutogradContext* context, const at::Tensor& rows,
                               const at::Tensor& row_of_sorted, const at::Tensor& place_of,
                               const std::optional<at::Tensor>& row_offsets, int64_t fixed,
                               const std::vector<int64_t>& expert_offsets) {
    const at::Tensor source = rows.contiguous();
    const int64_t d_in = source.size(1);
    const auto* row_of = int32_data(row_of_sorted);
    variable_list parts;
    for (size_t e = 1; e < expert_offsets.size(); ++e) {
      const int64_t begin = expert_offsets[e - 1];
      const int64_t count = expert_offsets[e] - begin;
      if (count == 0) continue;
      parts.push_back(at::empty({count, d_in}, source.options()));
      kernels::permute(data_of(source), row_of + begin, mutable_data_of(parts.back()), count,
                       d_in * source.element_size(), gates::stream_of(source, kModuleExperts));
    }
    context->save_for_backward({place_of, row_offsets.value_or(at::Tensor())});
    context->saved_data["num_rows"] = rows.size(0);
    context->saved_data["fixed"] = fixed;
    return parts;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_parts) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor grad_sorted = at::cat(grad_parts).contiguous();
    const int64_t num_rows = context->saved_data["num_rows"].toInt();
    const int64_t d_in = grad_sorted.size(1);
    const at::Tensor grad_rows = at::empty({num_rows, d_in}, grad_sorted.options());
    kernels::combine(
        data_of(grad_sorted), row_index(saved[0], saved[1], context->saved_data["fixed"].toInt()),
        nullptr, 1, mutable_data_of(grad_rows), num_rows, d_in,
        dtype_of(grad_sorted, kModuleExperts), gates::stream_of(grad_sorted, kModuleExperts));
    return {grad_rows, {}, {}, {}, {}, {}};
  }
};

/// out[n, g, :] = sum over the assignments of row n of weights * output. `rows` and the parameters
/// of idle experts take part in the graph without any arithmetic: a backward that is collective
/// then runs on a rank without assignments too, and idle parameters get zeros.
struct CombineOutputs : torch::autograd::Function<CombineOutputs> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& outputs,
                            const at::Tensor& weights, const at::Tensor& rows,
                            at::TensorList idle_parameters, const at::Tensor& place_of,
                            const std::optional<at::Tensor>& row_offsets, int64_t fixed,
                            const c10::intrusive_ptr<CountedPlan>& counted) {
    const at::Tensor sorted = outputs.contiguous();
    const at::Tensor row_weights = weights.contiguous();
    const int64_t num_rows = rows.size(0);
    const int64_t num_gates = weights.size(1);
    const int64_t d_out = sorted.size(1);
    const at::Tensor offsets = row_offsets.value_or(at::Tensor());
    at::Tensor out;
    if (sorted.size(0) == 0) {
      out = at::zeros({num_rows, num_gates * d_out}, sorted.options());
    } else {
      out = at::empty({num_rows, num_gates * d_out}, sorted.options());
      kernels::combine(data_of(sorted), row_index(place_of, offsets, fixed), data_of(row_weights),
                       num_gates, mutable_data_of(out), num_rows, d_out,
                       dtype_of(sorted, kModuleExperts), gates::stream_of(sorted, kModuleExperts));
    }
    context->save_for_backward({sorted, row_weights, place_of, offsets});
    context->saved_data["fixed"] = fixed;
    context->saved_data["d_in"] = rows.size(1);
    context->saved_data["counted"] = c10::IValue::make_capsule(counted);
    // Not save_for_backward: only the shapes are used, so an update in between is no error.
    context->saved_data["idle"] = idle_parameters.vec();
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const auto counted =
        c10::static_intrusive_pointer_cast<CountedPlan>(context->saved_data["counted"].toCapsule());
    counted->row_counts->add(counted->plan->local);
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& sorted = saved[0];
    const at::Tensor& weights = saved[1];
    const at::Tensor grad_out = grad_outputs[0].contiguous();
    const int64_t num_rows = grad_out.size(0);
    at::Tensor grad_sorted, grad_weights, grad_rows;
    if (sorted.size(0) == 0) {
      grad_sorted = at::zeros_like(sorted);
      grad_weights = at::zeros_like(weights);
      grad_rows = at::zeros({num_rows, context->saved_data["d_in"].toInt()}, grad_out.options());
    } else {
      if (context->needs_input_grad(0)) grad_sorted = at::empty_like(sorted);
      if (context->needs_input_grad(1)) grad_weights = at::empty_like(weights);
      kernels::combine_backward(data_of(grad_out), data_of(sorted),
                                row_index(saved[2], saved[3], context->saved_data["fixed"].toInt()),
                                data_of(weights), weights.size(1), mutable_data_of(grad_sorted),
                                mutable_data_of(grad_weights), num_rows, sorted.size(1),
                                dtype_of(sorted, kModuleExperts),
                                gates::stream_of(sorted, kModuleExperts));
    }
    variable_list gradients = {grad_sorted, grad_weights, grad_rows};
    for (const at::Tensor& parameter : context->saved_data["idle"].toTensorVector()) {
      gradients.push_back(at::zeros_like(parameter));
    }
    gradients.resize(gradients.size() + 4);  // place_of, row_offsets, fixed, counted
    return gradients;
  }
};

/// Seeds LibTorch's default generator and puts its state back at the end. The generator's own mutex
/// is free while a factory draws, so constructors on several threads take turns here.
class SeededGenerator {
 public:
  SeededGenerator() : turn_(mutex()), generator_(at::detail::getDefaultCPUGenerator()) {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    state_ = generator_.get_state();
  }
  ~SeededGenerator() {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    generator_.set_state(state_);
  }
  SeededGenerator(const SeededGenerator&) = delete;
  SeededGenerator& operator=(const SeededGenerator&) = delete;

  void seed(uint64_t seed) {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    generator_.set_current_seed(seed);
  }

 private:
  static std::recursive_mutex& mutex() {  // recursive: an expert may hold experts
    static std::recursive_mutex mutex;
    return mutex;
  }
  std::unique_lock<std::recursive_mutex> turn_;
  at::Generator generator_;
  at::Tensor state_;
};
}  // namespace

ModuleExperts::ModuleExperts(const ModuleExpertsOptions& options, const ExpertFactory& factory,
                             const ExpertPlacement& placement, int ep_rank)
    : Experts(kModuleExperts, placement.experts_of(ep_rank), options.d_in(), options.d_out()) {
  require(factory != nullptr, kModuleExperts, "factory", "empty",
          "must make the module of an expert");
  const kernels::RandomKey key =
      kernels::random_key(options.seed()).with(static_cast<uint64_t>(options.layer_id()));
  SeededGenerator generator;
  for (const int64_t expert : expert_ids()) {
    generator.seed(key.with(static_cast<uint64_t>(expert)).value);
    modules_.push_back(factory(expert));
    require(!modules_.back().is_empty(), kModuleExperts, "factory", "an empty module",
            "for expert " + to_text(expert) + "; return a module with forward(rows)");
    register_module("expert_" + to_text(expert), modules_.back().ptr());
  }
  if (!modules_.empty()) return;
  generator.seed(key.with(0).value);
  const torch::nn::AnyModule sample = factory(0);
  if (sample.is_empty()) return;
  for (const SparseUnit& unit : module_matrices(*sample.ptr())) matrix_names_.push_back(unit.name);
}

at::Tensor ModuleExperts::forward(const at::Tensor& rows, const at::Tensor& weights,
                                  const std::shared_ptr<const RoutingPlan>& plan) {
  require_inputs(rows, weights, plan);
  const LocalPlan& local = plan->local;

  const at::Tensor place_of = local.place_of_assignment();
  const std::vector<int64_t> expert_offsets = local.host_offsets();
  variable_list inputs;
  if (local.num_assignments > 0) {
    inputs = GatherRows::apply(rows, local.row_of_sorted(), place_of, if_defined(local.row_offsets),
                               local.fixed, expert_offsets);
  }

  variable_list outputs, idle_parameters;
  for (size_t slot = 0; slot < modules_.size(); ++slot) {
    const int64_t count = expert_offsets[slot + 1] - expert_offsets[slot];
    if (count == 0) {
      for (const at::Tensor& parameter : modules_[slot].ptr()->parameters()) {
        if (parameter.requires_grad()) idle_parameters.push_back(parameter);
      }
      continue;
    }
    at::Tensor output = modules_[slot].forward(std::move(inputs[outputs.size()]));
    const std::string of_expert = " for expert " + to_text(expert_ids()[slot]);
    require(
        output.defined(), kModuleExperts, "output", "undefined",
        "must be [" + to_text(count) + ", " + to_text(d_out()) + "], [rows, d_out]," + of_expert);
    require(
        output.dim() == 2 && output.size(0) == count && output.size(1) == d_out(), kModuleExperts,
        "output", output.sizes(),
        "must be [" + to_text(count) + ", " + to_text(d_out()) + "], [rows, d_out]," + of_expert);
    require(output.scalar_type() == rows.scalar_type(), kModuleExperts, "output.dtype",
            output.scalar_type(),
            "must be " + to_text(rows.scalar_type()) + " as that of its rows," + of_expert);
    outputs.push_back(std::move(output));
  }
  if (outputs.empty()) outputs.push_back(at::empty({0, d_out()}, rows.options()));
  const at::Tensor sorted = outputs.size() == 1 ? outputs.front() : at::cat(outputs);
  return CombineOutputs::apply(sorted, weights, rows, at::TensorList(idle_parameters), place_of,
                               if_defined(local.row_offsets), local.fixed,
                               c10::make_intrusive<CountedPlan>(plan, row_counts()));
}

std::vector<std::string> ModuleExperts::matrix_names() const {
  return modules_.empty() ? matrix_names_ : Experts::matrix_names();
}

std::vector<SparseUnit> ModuleExperts::matrices() const {
  std::vector<SparseUnit> units;
  for (size_t slot = 0; slot < modules_.size(); ++slot) {
    for (SparseUnit& unit : module_matrices(*modules_[slot].ptr())) {
      unit.key.expert = expert_ids()[slot];
      units.push_back(std::move(unit));
    }
  }
  return units;
}

}  // namespace perseid
