#include "examples/train_fashion/model.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <utility>

#include "comm/collectives.h"
#include "examples/train_fashion/search.h"
#include "gates/baseline_gates.h"
#include "gates/comet_gate.h"
#include "gates/dselect_k_gate.h"
#include "gates/hash_gate.h"
#include "gates/top_k_gate.h"
#include "kernels/device_memory.h"
#include "moe/grouped_mlp.h"

namespace perseid::examples {
namespace {

gates::InputNorm input_norm(const TrainOptions& options) {
  return options.input_norm ? gates::InputNorm::kLayerNorm : gates::InputNorm::kNone;
}

gates::TopKGateOptions router_options(const TrainOptions& options, int64_t d_model,
                                      int64_t gate_id) {
  return gates::TopKGateOptions(d_model, options.num_experts)
      .top_k(options.top_k)
      .aux_loss_coeff(options.aux_loss_coeff)
      .z_loss_coeff(options.z_loss_coeff)
      .balance_coeff(options.balance_coeff)
      .input_norm(input_norm(options))
      .bias(true)
      .seed(options.seed)
      .gate_id(gate_id);
}

/// Options of the gates of smooth-step switches.
template <typename GateOptions>
GateOptions switch_options(const TrainOptions& options, int64_t d_model, int64_t gate_id) {
  return GateOptions(d_model, options.num_experts)
      .top_k(options.top_k)
      .gamma(options.gamma)
      .entropy_coeff(options.entropy_coeff)
      .entropy_schedule({options.entropy_ramp})
      .balance_coeff(options.balance_coeff)
      .input_norm(input_norm(options))
      .hard_eval(options.hard_eval)
      .seed(options.seed)
      .gate_id(gate_id);
}

std::shared_ptr<Experts> make_experts(const TrainOptions& options, const ExpertPlacement& placement,
                                      int ep_rank) {
  const int64_t pixels = options.image_pixels();
  if (options.d_ff == 0) {
    return std::make_shared<GroupedLinear>(
        GroupedLinearOptions(pixels, kNumClasses).init_bound(.03).seed(options.seed), placement,
        ep_rank);
  }
  return std::make_shared<GroupedMLP>(GroupedMLPOptions(pixels, options.d_ff)
                                          .d_out(kNumClasses)
                                          .activation(kernels::Activation::kRelu)
                                          .gated(false)
                                          .bias(true)
                                          .seed(options.seed),
                                      placement, ep_rank);
}

}  // namespace

std::shared_ptr<gates::Gate> make_gate(const TrainOptions& options, int64_t d_model,
                                       int64_t gate_id) {
  switch (options.gate) {
    case GateKind::kSingle:
      return std::make_shared<gates::SingleGate>(options.num_experts);
    case GateKind::kHash:
    case GateKind::kOracle:
      return std::make_shared<gates::HashGate>(
          gates::HashGateOptions(options.num_experts)
              .mode(gates::HashMode::kTable)
              .table(at::arange(options.num_experts, at::kLong)));
    case GateKind::kDense:
      return std::make_shared<gates::DenseGate>(
          router_options(options, d_model, gate_id).aux_loss_coeff(0));
    case GateKind::kDSelectK:
      return std::make_shared<gates::DSelectKGate>(
          switch_options<gates::DSelectKGateOptions>(options, d_model, gate_id));
    case GateKind::kComet:
      return std::make_shared<gates::CometGate>(
          switch_options<gates::CometGateOptions>(options, d_model, gate_id));
    case GateKind::kTopK:
      break;
  }
  return std::make_shared<gates::TopKGate>(router_options(options, d_model, gate_id));
}

void convert_parameters(const torch::nn::Module& module, at::ScalarType dtype) {
  for (at::Tensor parameter : module.parameters()) parameter.set_data(parameter.detach().to(dtype));
}

void convert_permutations(const MoELayer& layer) {
  for (const auto& permutation : layer.permutations())
    convert_parameters(*permutation, at::kDouble);
}

WeightDump dump_of(const std::string& name, const at::Tensor& tensor) {
  const at::Tensor values = tensor.detach().to(at::kCPU, at::kDouble).contiguous();
  const double* first = values.const_data_ptr<double>();
  return WeightDump{name, values.sizes().vec(), std::vector<double>(first, first + values.numel())};
}

at::ScalarType tensor_type(kernels::DType dtype) {
  switch (dtype) {
    case kernels::DType::kFloat64:
      return at::kDouble;
    case kernels::DType::kBFloat16:
      return at::kBFloat16;
    default:
      return at::kFloat;
  }
}

at::Device tensor_device(const TrainOptions& options) {
  if (options.device == kernels::Device::kCpu) return at::kCPU;
  return {at::kCUDA, static_cast<at::DeviceIndex>(kernels::current_device())};
}

std::shared_ptr<MoELayer> make_model(const comm::Group& world, const TrainOptions& options) {
  const ParallelGroups groups = make_parallel_groups(world, options.ep_size);
  const auto placement =
      ExpertPlacement::contiguous(options.num_experts, groups.expert_parallel.size());
  auto gate = make_gate(options, options.image_pixels());
  std::shared_ptr<Experts> experts =
      make_experts(options, placement, groups.expert_parallel.rank());

  const at::ScalarType dtype = tensor_type(options.dtype);
  convert_parameters(*experts, dtype);
  // Gates compute in float32 whatever the experts do, and in float64 if their parameters say so.
  convert_parameters(*gate, dtype == at::kDouble ? at::kDouble : at::kFloat);

  MoELayerOptions layer_options;
  layer_options.capacity.capacity_factor = options.capacity_factor;
  layer_options.permutation = permutation_options(options);
  auto layer =
      std::make_shared<MoELayer>(std::vector<std::shared_ptr<gates::Gate>>{std::move(gate)},
                                 std::move(experts), placement, groups, layer_options);
  if (dtype == at::kDouble) convert_permutations(*layer);
  layer->to(tensor_device(options));
  return layer;
}

MoEInput model_input(const at::Tensor& pixels, const at::Tensor& keys,
                     const TrainOptions& options) {
  const at::Device device = tensor_device(options);
  at::Tensor tokens = pixels.to(device).to(tensor_type(options.dtype)).div_(255);
  if (options.pad_images) {
    tokens = at::constant_pad_nd(tokens.view({-1, kImageSide, kImageSide}),
                                 {kImageFrame, kImageFrame, kImageFrame, kImageFrame})
                 .flatten(1);
  }
  MoEInput input(std::move(tokens));
  if (options.gate == GateKind::kHash || options.gate == GateKind::kOracle) {
    input.keys = keys.to(device).remainder(options.num_experts);
  }
  return input;
}

void add_permutations(const MoELayer& layer, std::vector<WeightDump>& dumps) {
  for (size_t i = 0; i < layer.permutations().size(); ++i) {
    const gates::ExpertPermutation& permutation = *layer.permutations()[i];
    const std::string name = "permutation_" + std::to_string(i) + ".";
    dumps.push_back(dump_of(name + "expert_map", permutation.expert_map));
    if (permutation.phi.defined()) dumps.push_back(dump_of(name + "phi", permutation.phi));
  }
}

std::vector<WeightDump> collect_weights(const MoELayer& layer, int64_t num_experts) {
  std::vector<WeightDump> dumps;
  for (const auto& parameter : layer.gates().front()->named_parameters()) {
    dumps.push_back(dump_of("gate." + parameter.key(), parameter.value()));
  }
  add_permutations(layer, dumps);
  const std::vector<int64_t>& ids = layer.experts()->expert_ids();
  for (const auto& parameter : layer.experts()->named_parameters()) {
    const WeightDump mine = dump_of("experts." + parameter.key(), parameter.value());
    WeightDump all = mine;
    all.shape[0] = num_experts;
    size_t per_expert = 1;
    for (size_t d = 1; d < all.shape.size(); ++d) per_expert *= static_cast<size_t>(all.shape[d]);
    all.values.assign(static_cast<size_t>(num_experts) * per_expert, 0);
    for (size_t slot = 0; slot < ids.size(); ++slot) {
      std::copy_n(mine.values.data() + slot * per_expert, per_expert,
                  all.values.data() + static_cast<size_t>(ids[slot]) * per_expert);
    }
    // Each expert is non-zero on one rank of the group, so the sum collects them.
    comm::all_reduce(all.values.data(), static_cast<int64_t>(all.values.size()),
                     comm::ReduceOp::kSum, layer.groups().expert_parallel, {"collect_weights"});
    dumps.push_back(std::move(all));
  }
  return dumps;
}

}  // namespace perseid::examples
