#pragma once
#include <ATen/ATen.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "gates/top_k_gate.h"
#include "moe/grouped_mlp.h"
#include "moe/module_experts.h"
#include "moe/moe_layer.h"
#include "tests/closed_form.h"

// A small layer of every kind, and the same layer as a dense sum over all experts.

namespace perseid::testing {

enum class ExpertKind { kPlain, kGated, kGatedBias, kLinear, kModule };

struct LayerCase {
  int64_t num_experts = 5;
  int64_t top_k = 2;
  int64_t num_tokens = 37;
  int num_gates = 1;
  ExpertKind kind = ExpertKind::kGated;
  CapacityOptions capacity;
  bool strict = true;
  bool shared = false;
};

/// Of a long list of cases every how manieth runs: PERSEID_CASE_STRIDE, which CMakeLists.txt sets
/// for the emulator, where each costs a hundred times as much. Coprime to all lengths of loops, so
/// that each of their values comes up.
inline bool takes_case(int64_t index) {
  static const char* text = std::getenv("PERSEID_CASE_STRIDE");
  static const int64_t stride = text ? std::max(std::atoll(text), 1LL) : 1;
  return index % stride == 0;
}

constexpr int64_t kDModel = 6, kDFf = 7, kDOut = 4;

/// A user's own expert.
struct TwoLayers : torch::nn::Module {
  TwoLayers() {
    first = register_module("first", torch::nn::Linear(kDModel, kDFf));
    second = register_module("second", torch::nn::Linear(kDFf, kDOut));
  }
  at::Tensor forward(const at::Tensor& x) { return second(at::tanh(first(x))); }
  torch::nn::Linear first{nullptr}, second{nullptr};
};

inline GroupedMLPOptions mlp_options(ExpertKind kind) {
  return GroupedMLPOptions(kDModel, kDFf)
      .d_out(kDOut)
      .gated(kind != ExpertKind::kPlain)
      .bias(kind != ExpertKind::kGated)
      .activation(kind == ExpertKind::kPlain ? kernels::Activation::kGelu
                                             : kernels::Activation::kSilu)
      .seed(3);
}

inline std::shared_ptr<Experts> make_experts(ExpertKind kind, const ExpertPlacement& placement,
                                             int ep_rank, at::ScalarType dtype) {
  std::shared_ptr<Experts> experts;
  if (kind == ExpertKind::kLinear) {
    experts = std::make_shared<GroupedLinear>(GroupedLinearOptions(kDModel, kDOut).seed(3),
                                              placement, ep_rank);
  } else if (kind == ExpertKind::kModule) {
    experts = std::make_shared<ModuleExperts>(
        ModuleExpertsOptions(kDModel, kDOut).seed(3),
        [](int64_t) { return torch::nn::AnyModule(TwoLayers()); }, placement, ep_rank);
  } else {
    experts = std::make_shared<GroupedMLP>(mlp_options(kind), placement, ep_rank);
  }
  experts->to(dtype);
  // Biases start at 0; other values find a bias that is added to the wrong rows.
  const at::NoGradGuard no_grad;
  for (auto& parameter : experts->named_parameters()) {
    if (kind == ExpertKind::kModule || parameter.key().find("bias") == std::string::npos) continue;
    for (size_t slot = 0; slot < experts->expert_ids().size(); ++slot) {
      at::Tensor row = parameter.value().select(0, static_cast<int64_t>(slot));
      row.copy_(
          random_tensor(row.sizes(), static_cast<uint64_t>(experts->expert_ids()[slot]) + 90));
    }
  }
  return experts;
}

inline std::shared_ptr<MoELayer> make_layer(const LayerCase& c, const ParallelGroups& groups,
                                            at::ScalarType dtype = at::kDouble) {
  const comm::Group& ep = groups.expert_parallel;
  const ExpertPlacement placement = ExpertPlacement::contiguous(c.num_experts, ep.size());
  std::vector<std::shared_ptr<gates::Gate>> gates;
  for (int g = 0; g < c.num_gates; ++g) {
    gates.push_back(std::make_shared<gates::TopKGate>(gates::TopKGateOptions(kDModel, c.num_experts)
                                                          .top_k(c.top_k)
                                                          .z_loss_coeff(1e-2)
                                                          .gate_id(g)));
    gates.back()->to(dtype == at::kDouble ? at::kDouble : at::kFloat);
  }
  std::shared_ptr<Experts> shared;
  if (c.shared) {
    shared = make_experts(ExpertKind::kGated, ExpertPlacement::contiguous(1, 1), 0, dtype);
  }
  MoELayerOptions options;
  options.capacity = c.capacity;
  options.strict = c.strict;
  return std::make_shared<MoELayer>(gates, make_experts(c.kind, placement, ep.rank(), dtype),
                                    placement, groups, options, shared);
}

/// f_expert(x) by ordinary LibTorch operations, for experts that are all on this rank.
inline at::Tensor dense_expert(Experts& experts, int64_t e, const at::Tensor& x) {
  if (auto* linear = dynamic_cast<GroupedLinear*>(&experts)) {
    return at::addmm(linear->bias[e], x, linear->weight[e].t());
  }
  if (auto* mlp = dynamic_cast<GroupedMLP*>(&experts)) {
    at::Tensor pre = x.mm(mlp->up_proj[e].t());
    if (mlp->up_bias.defined()) pre = pre + mlp->up_bias[e];
    at::Tensor act;
    if (mlp->options().gated()) {
      const int64_t d_ff = mlp->options().d_ff();
      act = at::silu(pre.narrow(1, 0, d_ff)) * pre.narrow(1, d_ff, d_ff);
    } else {
      act = at::gelu(pre);
    }
    const at::Tensor y = act.mm(mlp->down_proj[e].t());
    return mlp->down_bias.defined() ? y + mlp->down_bias[e] : y;
  }
  const auto p = experts.named_parameters();
  const std::string name = "expert_" + std::to_string(experts.expert_ids()[static_cast<size_t>(e)]);
  const at::Tensor hidden =
      at::tanh(at::linear(x, p[name + ".first.weight"], p[name + ".first.bias"]));
  return at::linear(hidden, p[name + ".second.weight"], p[name + ".second.bias"]);
}

/// The layer's outputs with every expert run on every token. One process.
inline std::vector<at::Tensor> dense_outputs(MoELayer& layer, const LayerCase& c,
                                             const at::Tensor& tokens) {
  gates::GateInput input;
  input.tokens = tokens;
  input.training = layer.is_training();
  std::vector<at::Tensor> outputs;
  for (const auto& gate : layer.gates()) {
    const gates::Routing routing = apply_capacity(gate->forward(input).routing, c.capacity,
                                                  tokens.size(0), c.top_k, c.num_experts)
                                       .routing;
    const at::Tensor weights = gates::dense_weights(routing, c.num_experts);
    at::Tensor y = at::zeros({tokens.size(0), kDOut}, tokens.options());
    for (int64_t e = 0; e < c.num_experts; ++e) {
      y = y + weights.narrow(1, e, 1) * dense_expert(*layer.experts(), e, tokens);
    }
    outputs.push_back(y);
  }
  return outputs;
}

inline at::Tensor case_tokens(int64_t num_tokens, at::ScalarType dtype = at::kDouble) {
  return random_tensor({num_tokens, kDModel}, 11, -1, 1, dtype);
}

/// A loss that treats every output element differently.
inline at::Tensor weighted_loss(const std::vector<at::Tensor>& outputs, int64_t first_token) {
  at::Tensor loss = at::zeros({}, outputs.front().options());
  for (size_t g = 0; g < outputs.size(); ++g) {
    const at::Tensor& y = outputs[g];
    const at::Tensor all = random_tensor({first_token + y.size(0), y.size(1)}, 70 + g, -1, 1);
    loss = loss + (y * all.narrow(0, first_token, y.size(0)).to(y.scalar_type())).sum();
  }
  return loss;
}

}  // namespace perseid::testing
