#include "moe/layer_checks.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <string>

#include "gates/describe.h"
#include "gates/device.h"
#include "kernels/error.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

bool is_table(const at::Tensor& tensor, at::IntArrayRef sizes, at::ScalarType type,
              at::Device device) {
  return tensor.defined() && tensor.sizes() == sizes && tensor.scalar_type() == type &&
         tensor.device() == device;
}

at::Device device_of_counts(const gates::GateStats& stats) {
  return stats.unread.defined() ? stats.unread.device() : at::Device(at::kCPU);
}

void check_tokens(const at::Tensor& tokens, const Experts& experts) {
  require(tokens.defined() && tokens.dim() == 2, kMoELayer, "tokens.dim",
          tokens.defined() ? tokens.dim() : -1, "is not 2; pass [tokens, d_model]");
  require(tokens.size(1) == experts.d_in(), kMoELayer, "tokens.width", tokens.size(1),
          "differs from d_in=" + to_text(experts.d_in()) + " of the experts");
  gates::stream_of(tokens, kMoELayer);  // throws for devices without kernels
  require(tokens.layout() == at::kStrided, kMoELayer, "tokens.layout", tokens.layout(),
          "is not Strided; call to_dense()");
  dtype_of(tokens, kMoELayer);
  auto parameters = experts.parameters(/*recurse=*/false);  // modules as experts have none here
  if (parameters.empty()) parameters = experts.parameters();
  if (parameters.empty()) return;
  require(parameters.front().scalar_type() == tokens.scalar_type(), kMoELayer, "tokens.dtype",
          c10::toString(tokens.scalar_type()),
          std::string("differs from the experts' ") +
              c10::toString(parameters.front().scalar_type()) +
              "; convert the module or the tokens");
}

}  // namespace

void check_layer_input(const MoEInput& input, const Experts& experts, int64_t num_experts,
                       size_t num_gates) {
  check_tokens(input.tokens, experts);
  if (input.features) {
    const at::Tensor& features = *input.features;
    require(features.defined() && features.dim() == 2, kMoELayer, "features.dim",
            features.defined() ? features.dim() : -1, "is not 2; pass [tokens, width]");
    require(features.size(0) == input.tokens.size(0), kMoELayer, "features.rows", features.size(0),
            "differs from " + to_text(input.tokens.size(0)) + " tokens");
  }
  if (input.earlier) check_stats(*input.earlier, num_experts, num_gates, "earlier");
}

void check_gate_output(const gates::GateOutput& output, int64_t num_tokens, const Experts& experts,
                       int64_t num_experts, const char* name) {
  gates::validate_without_wait(output.routing, num_experts, name);
  require(output.routing.num_tokens == num_tokens, name, "routing.num_tokens",
          output.routing.num_tokens, "differs from the " + to_text(num_tokens) + " tokens given");
  const at::Tensor& counts = output.stats.tokens_per_expert;
  require(is_table(counts, {num_experts}, at::kLong, device_of_counts(output.stats)), name,
          "stats.tokens_per_expert", gates::describe(counts),
          "is not Long" + to_text(at::IntArrayRef({num_experts})) +
              "; gates::count_assignments makes it");
  const at::Tensor& sums = output.balance.score_sum;
  require(!sums.defined() || sums.sizes() == at::IntArrayRef({num_experts}), name,
          "balance.score_sum", gates::describe(sums),
          "is not [num_experts=" + to_text(num_experts) + "]");
  require(output.balance.top_k >= 1, name, "balance.top_k", output.balance.top_k, "is below 1");
  require(std::isfinite(output.balance.aux_loss_coeff), name, "balance.aux_loss_coeff",
          output.balance.aux_loss_coeff, "is not a finite number");
  for (const gates::NamedLoss& loss : output.losses) {
    const std::string argument = "losses." + loss.name;
    require(loss.value.defined() && loss.value.numel() == 1, name, argument.c_str(),
            gates::describe(loss.value), "is not a scalar");
  }
  for (const gates::GlobalLoss& loss : output.global_losses) {
    const std::string argument = "global_losses." + loss.name;
    require(loss.local_sum.defined() && loss.local_sum.is_floating_point(), name, argument.c_str(),
            gates::describe(loss.local_sum), "has no floating local_sum");
    require(loss.loss != nullptr, name, argument.c_str(), "empty",
            "must be a function of the global sum");
  }
  const at::Tensor& residual = output.residual_weight;
  if (!residual.defined()) return;
  require(residual.sizes() == at::IntArrayRef({num_tokens}), name, "residual_weight",
          gates::describe(residual), "is not [num_tokens=" + to_text(num_tokens) + "]");
  require(experts.d_in() == experts.d_out(), kMoELayer, "d_out", experts.d_out(),
          "differs from d_in=" + to_text(experts.d_in()) +
              ", but this gate adds the token to the output");
}

void warn_of_capacity(const gates::Gate& gate, const gates::GateStats& stats,
                      const CapacityOptions& capacity) {
  if (capacity.capacity_factor <= 0 || stats.num_assignments <= gate.top_k() * stats.num_tokens) {
    return;
  }
  TORCH_WARN_ONCE(
      "[moe_layer] capacity_factor=", capacity.capacity_factor, " goes by top_k=", gate.top_k(),
      ", but ", gate.name(), " selected ",
      static_cast<double>(stats.num_assignments) / static_cast<double>(stats.num_tokens),
      " experts per token, as gates that start dense do: most of it is dropped; use no "
      "capacity with such a gate");
}

void check_expert_output(const at::Tensor& output, int64_t num_rows, int64_t width,
                         const at::Tensor& tokens, const char* argument) {
  require(is_table(output, {num_rows, width}, tokens.scalar_type(), tokens.device()), kMoELayer,
          argument, gates::describe(output),
          std::string("is not ") + c10::toString(tokens.scalar_type()) +
              to_text(at::IntArrayRef({num_rows, width})));
}

void check_stats(const MoEStats& stats, int64_t num_experts, size_t num_gates,
                 const char* argument) {
  const std::string prefix = std::string(argument) + ".";
  require(stats.gates.size() == num_gates, kMoELayer, (prefix + "gates").c_str(),
          stats.gates.size(), "differs from " + to_text(num_gates) + " gates of the layer");
  for (const gates::GateStats& gate : stats.gates) {
    require(is_table(gate.tokens_per_expert, {num_experts}, at::kLong, device_of_counts(gate)),
            kMoELayer, (prefix + "tokens_per_expert").c_str(),
            gates::describe(gate.tokens_per_expert),
            "is not Long" + to_text(at::IntArrayRef({num_experts})) +
                "; pass statistics of this layer");
    require(gate.num_tokens >= 0, kMoELayer, (prefix + "num_tokens").c_str(), gate.num_tokens,
            "is negative; pass statistics of this layer");
  }
}

}  // namespace perseid
