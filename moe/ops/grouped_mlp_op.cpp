#include "moe/ops/grouped_mlp_op.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>
#include <vector>

#include "kernels/error.h"
#include "moe/mlp_core.h"
#include "moe/ops/arguments.h"
#include "moe/ops/routing_arguments.h"
#include "moe/tensor_types.h"
#include "moe/threads.h"

namespace perseid::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kName = "grouped_mlp";

/// Arguments that get a gradient, in the order of the backward's list.
enum Wanted : uint8_t { kTokens, kWeights, kUp, kDown, kUpBias, kDownBias, kNumWanted };
using WantedList = std::array<bool, kNumWanted>;

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                           const Tensor&, const Tensor&, const Tensor&,
                                           const OptionalTensor&, const OptionalTensor&,
                                           std::string_view, bool);
using Backward = std::vector<Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                     const Tensor&, const Tensor&, const Tensor&,
                                     const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                     WantedList, std::string_view, bool);

/// What forward and backward read: checked, contiguous, cut to the assignments that there are.
struct Operands {
  Tensor tokens, weights;  // weights [A, 1]
  LocalPlan plan;
  MlpParameters parameters;
  MlpKind kind;
};

Tensor contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->contiguous() : Tensor();
}

void require_parameters(const MlpParameters& parameters, const Tensor& tokens, bool gated) {
  const Tensor &up = parameters.up, &down = parameters.down;
  require(down.dim() == 3 && down.size(0) >= 1, kName, "down_proj", down.sizes(),
          "is not [E, d_out, F]");
  const int64_t E = down.size(0), width = (gated ? 2 : 1) * down.size(2);
  require(tokens.dim() == 2, kName, "tokens", tokens.sizes(), "is not [T, D]");
  require_sizes(kName, "up_proj", up, {E, width, tokens.size(1)});
  require_sizes(kName, "up_bias", parameters.up_bias, {E, width});
  require_sizes(kName, "down_bias", parameters.down_bias, {E, down.size(1)});
  const auto require_type = [&](const char* argument, const Tensor& tensor) {
    require(!tensor.defined() || tensor.scalar_type() == tokens.scalar_type(), kName, argument,
            tensor.defined() ? tensor.scalar_type() : tokens.scalar_type(),
            "differs from tokens=" + to_text(tokens.scalar_type()) + "; convert one of them");
  };
  require_type("up_proj", up);
  require_type("down_proj", down);
  require_type("up_bias", parameters.up_bias);
  require_type("down_bias", parameters.down_bias);
}

Operands read_operands(const Tensor& tokens, const Tensor& token_offsets, const Tensor& expert_idx,
                       const Tensor& weights, const Tensor& up, const Tensor& down,
                       const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                       std::string_view activation, bool gated) {
  use_libtorch_threads();
  Operands operands;
  operands.kind = {choice<kernels::Activation>(kName, "activation", std::string(activation),
                                               {{"silu", kernels::Activation::kSilu},
                                                {"gelu", kernels::Activation::kGelu},
                                                {"relu", kernels::Activation::kRelu},
                                                {"identity", kernels::Activation::kIdentity}}),
                   gated};
  operands.parameters = {up.contiguous(), contiguous(up_bias), down.contiguous(),
                         contiguous(down_bias)};
  require_parameters(operands.parameters, tokens, gated);
  dtype_of(tokens, kName);  // throws for others
  require(weights.scalar_type() == weight_type(tokens), kName, "weights", weights.scalar_type(),
          "is not " + to_text(weight_type(tokens)) + ", which goes with tokens of " +
              to_text(tokens.scalar_type()));
  const gates::Routing routing =
      cut_routing(token_offsets, expert_idx, weights, tokens.size(0), down.size(0), kName);
  operands.tokens = tokens.contiguous();
  operands.weights = routing.weights.unsqueeze(1);
  operands.plan = make_local_plan(routing, down.size(0));
  return operands;
}

std::tuple<Tensor, Tensor> forward_on_cpu(const Tensor& tokens, const Tensor& token_offsets,
                                          const Tensor& expert_idx, const Tensor& weights,
                                          const Tensor& up, const Tensor& down,
                                          const OptionalTensor& up_bias,
                                          const OptionalTensor& down_bias,
                                          std::string_view activation, bool gated) {
  const Operands in = read_operands(tokens, token_offsets, expert_idx, weights, up, down, up_bias,
                                    down_bias, activation, gated);
  const MlpOutput result = mlp_forward(in.tokens, in.weights, in.parameters, in.kind, in.plan);
  const int64_t gap = expert_idx.size(0) - in.plan.num_assignments;
  return {result.out, gap == 0 ? result.pre : at::constant_pad_nd(result.pre, {0, 0, 0, gap})};
}

std::vector<Tensor> backward_on_cpu(const Tensor& grad_output, const Tensor& tokens,
                                    const Tensor& token_offsets, const Tensor& expert_idx,
                                    const Tensor& weights, const Tensor& up, const Tensor& down,
                                    const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                                    const Tensor& pre, WantedList wanted,
                                    std::string_view activation, bool gated) {
  const Operands in = read_operands(tokens, token_offsets, expert_idx, weights, up, down, up_bias,
                                    down_bias, activation, gated);
  require_sizes(kName, "grad_output", grad_output, {tokens.size(0), down.size(1)});
  require_sizes(kName, "pre", pre, {expert_idx.size(0), up.size(1)});
  MlpWanted wants;
  wants.rows = wanted[kTokens];
  wants.weights = wanted[kWeights];
  wants.up = wanted[kUp];
  wants.down = wanted[kDown];
  wants.up_bias = wanted[kUpBias];
  wants.down_bias = wanted[kDownBias];
  const int64_t A = in.plan.num_assignments;
  const MlpGradients gradients =
      mlp_backward(grad_output.contiguous(), in.tokens, in.weights, in.parameters,
                   pre.narrow(0, 0, A).contiguous(), in.kind, in.plan, wants);
  std::vector<Tensor> results;
  if (wants.rows) results.push_back(gradients.rows);
  if (wants.weights) {
    results.push_back(at::constant_pad_nd(gradients.weights.squeeze(1), {0, weights.size(0) - A}));
  }
  for (const Tensor& gradient :
       {gradients.up, gradients.down, gradients.up_bias, gradients.down_bias}) {
    if (gradient.defined()) results.push_back(gradient);
  }
  return results;
}

std::tuple<Tensor, Tensor> forward_on_meta(const Tensor& tokens, const Tensor& /*token_offsets*/,
                                           const Tensor& expert_idx, const Tensor& /*weights*/,
                                           const Tensor& up, const Tensor& down,
                                           const OptionalTensor& /*up_bias*/,
                                           const OptionalTensor& /*down_bias*/,
                                           std::string_view /*activation*/, bool /*gated*/) {
  return {tokens.new_empty_symint({tokens.sym_size(0), down.sym_size(1)}),
          tokens.new_empty_symint({expert_idx.sym_size(0), up.sym_size(1)})};
}

std::vector<Tensor> backward_on_meta(const Tensor& /*grad_output*/, const Tensor& tokens,
                                     const Tensor& /*token_offsets*/, const Tensor& /*expert_idx*/,
                                     const Tensor& weights, const Tensor& up, const Tensor& down,
                                     const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                                     const Tensor& /*pre*/, WantedList wanted,
                                     std::string_view /*activation*/, bool /*gated*/) {
  const Tensor arguments[] = {
      tokens, weights, up, down, up_bias.value_or(Tensor()), down_bias.value_or(Tensor())};
  std::vector<Tensor> results;
  for (size_t i = 0; i < kNumWanted; ++i) {
    if (!wanted[i]) continue;
    results.push_back(at::empty_like(arguments[i], {}, {}, {}, {}, at::MemoryFormat::Contiguous));
  }
  return results;
}

struct GroupedMlpFunction : torch::autograd::Function<GroupedMlpFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& tokens, const Tensor& weights,
                               const Tensor& up, const Tensor& down, const OptionalTensor& up_bias,
                               const OptionalTensor& down_bias, const Tensor& token_offsets,
                               const Tensor& expert_idx, std::string_view activation, bool gated) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("perseid::grouped_mlp", "").typed<Forward>();
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, pre] = op.call(tokens, token_offsets, expert_idx, weights, up, down,
                                       up_bias, down_bias, activation, gated);
    ctx->save_for_backward({tokens, weights, up, down, up_bias.value_or(Tensor()),
                            down_bias.value_or(Tensor()), token_offsets, expert_idx, pre});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["gated"] = gated;
    ctx->mark_non_differentiable({pre});
    return {output, pre};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("perseid::grouped_mlp_backward", "")
                               .typed<Backward>();
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [&](Wanted argument) {
      return saved[argument].defined() ? OptionalTensor(saved[argument]) : std::nullopt;
    };
    // An edge for each argument that is given.
    WantedList wanted{};
    size_t edge = 0;
    for (size_t i = 0; i < kNumWanted; ++i) {
      wanted[i] = saved[i].defined() && ctx->needs_input_grad(edge);
      edge += saved[i].defined() ? 1 : 0;
    }
    const std::vector<Tensor> computed = op.call(
        gradients[0], saved[kTokens], saved[kNumWanted], saved[kNumWanted + 1], saved[kWeights],
        saved[kUp], saved[kDown], optional(kUpBias), optional(kDownBias), saved[kNumWanted + 2],
        wanted, ctx->saved_data["activation"].toStringView(), ctx->saved_data["gated"].toBool());
    variable_list results(kNumWanted + 4);
    size_t next = 0;
    for (size_t i = 0; i < kNumWanted; ++i) {
      if (wanted[i]) results[i] = computed[next++];
    }
    return results;
  }
};

std::tuple<Tensor, Tensor> autograd(const Tensor& tokens, const Tensor& token_offsets,
                                    const Tensor& expert_idx, const Tensor& weights,
                                    const Tensor& up, const Tensor& down,
                                    const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                                    std::string_view activation, bool gated) {
  const variable_list outputs = GroupedMlpFunction::apply(
      tokens, weights, up, down, up_bias, down_bias, token_offsets, expert_idx, activation, gated);
  return {outputs[0], outputs[1]};
}

}  // namespace

void define_grouped_mlp(torch::Library& library) {
  library.def(
      "grouped_mlp(Tensor tokens, Tensor token_offsets, Tensor expert_idx, Tensor weights, "
      "Tensor up_proj, Tensor down_proj, Tensor? up_bias=None, Tensor? down_bias=None, *, "
      "str activation='silu', bool gated=True) -> (Tensor output, Tensor pre)");
  library.def(
      "grouped_mlp_backward(Tensor grad_output, Tensor tokens, Tensor token_offsets, "
      "Tensor expert_idx, Tensor weights, Tensor up_proj, Tensor down_proj, Tensor? up_bias, "
      "Tensor? down_bias, Tensor pre, bool[6] wanted, *, str activation, bool gated) -> Tensor[]");
}

void implement_grouped_mlp_on_cpu(torch::Library& library) {
  library.impl("grouped_mlp", &forward_on_cpu);
  library.impl("grouped_mlp_backward", &backward_on_cpu);
}

void implement_grouped_mlp_on_meta(torch::Library& library) {
  library.impl("grouped_mlp", &forward_on_meta);
  library.impl("grouped_mlp_backward", &backward_on_meta);
}

void implement_grouped_mlp_autograd(torch::Library& library) {
  library.impl("grouped_mlp", &autograd);
  library.impl("grouped_mlp_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace perseid::ops
