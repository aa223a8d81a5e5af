#include "gates/gate.h"

#include <ATen/ops/layer_norm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "gates/describe.h"
#include "gates/device.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

void validate_per_token(const std::optional<at::Tensor>& tensor, at::ScalarType type,
                        const at::Tensor& tokens, const char* operation, const char* argument) {
  if (!tensor.has_value()) return;
  const int64_t num_tokens = tokens.size(0);
  const bool holds = tensor->defined() && tensor->dim() == 1 && tensor->size(0) == num_tokens &&
                     tensor->scalar_type() == type;
  if (!holds) {
    require(false, operation, argument, describe(*tensor),
            "is not " + std::string(toString(type)) + "[" + to_text(num_tokens) +
                "], one entry for each token");
  }
  if (tensor->device() != tokens.device()) {
    const std::string name = std::string(argument) + ".device";
    require(false, operation, name.c_str(), tensor->device(),
            "differs from tokens.device=" + to_text(tokens.device()));
  }
}

}  // namespace

Gate::Gate(std::string name, int64_t num_experts, int64_t top_k)
    : Module(std::move(name)), num_experts_(num_experts), top_k_(top_k) {
  const char* operation = this->name().c_str();
  require(num_experts >= 1, operation, "num_experts", num_experts,
          "is below 1; a gate needs an expert");
  require(num_experts <= std::numeric_limits<int32_t>::max(), operation, "num_experts", num_experts,
          "exceeds 2147483647");
  const std::string choice = "choose top_k in [1, " + to_text(num_experts) + "]";
  require(top_k >= 1, operation, "top_k", top_k, "is below 1; " + choice);
  require(top_k <= num_experts, operation, "top_k", top_k,
          "exceeds num_experts=" + to_text(num_experts) + "; " + choice);
}

void Gate::after_step(const GateStats& /*global_stats*/) {}

at::Tensor gate_features(const at::Tensor& tokens, InputNorm norm, at::ScalarType compute_type) {
  const at::Tensor features = tokens.to(compute_type);
  if (norm == InputNorm::kNone) return features;
  const int64_t D = features.size(1);
  return at::layer_norm(features, {D}, {}, {}, 1e-5).mul(1 / std::sqrt(static_cast<double>(D)));
}

void validate(const GateInput& input, int64_t d_model, const char* operation) {
  const at::Tensor& tokens = input.tokens;
  if (!tokens.defined() || tokens.dim() != 2 || !tokens.is_floating_point()) {
    require(false, operation, "tokens", describe(tokens), "is not a floating [T, D] tensor");
  }
  if (d_model >= 0 && tokens.size(1) != d_model) {
    require(false, operation, "tokens", describe(tokens),
            "has another width than d_model=" + to_text(d_model));
  }
  require(tokens.layout() == at::kStrided, operation, "tokens.layout", tokens.layout(),
          "is not Strided; call to_dense()");
  require(tokens.size(0) <= std::numeric_limits<int32_t>::max(), operation, "num_tokens",
          tokens.size(0), "exceeds 2147483647; split the batch");
  validate_per_token(input.keys, at::kLong, tokens, operation, "keys");
  validate_per_token(input.valid, at::kBool, tokens, operation, "valid");
  validate_per_token(input.sequence, at::kLong, tokens, operation, "sequence");
  // Products with num_experts or d_model, the places of random numbers, then fit int64.
  require(input.first_token >= 0 && input.first_token <= std::numeric_limits<uint32_t>::max(),
          operation, "first_token", input.first_token,
          "is outside [0, 4294967295]; give the tokens of the ranks before this one");
  require(input.tokens_global >= 0, operation, "tokens_global", input.tokens_global,
          "is negative; give the valid tokens of all ranks, or 0 for those of this call");
  require(!std::isnan(input.progress), operation, "progress", input.progress,
          "is not a number; give the finished share of the training, in [0, 1]");
}

void require_shape(const at::Tensor& tensor, at::IntArrayRef sizes, const char* operation,
                   const char* argument) {
  if (tensor.defined() && tensor.sizes() == sizes) return;
  require(false, operation, argument, describe(tensor),
          "is not " + to_text(sizes) + ", the shape that the options give");
}

void require_product(at::IntArrayRef sizes, const char* operation, const char* argument) {
  constexpr int64_t kElementsMax = int64_t{1} << 40;
  int64_t left = kElementsMax;
  for (const int64_t size : sizes) left = size > 0 ? left / size : left;
  require(left >= 1, operation, argument, sizes, "is more than 2^40 elements in one parameter");
}

void read_counts(const std::vector<GateStats*>& stats) {
  std::vector<at::Tensor> tensors;
  for (const GateStats* one : stats) {
    if (one->unread.defined()) tensors.insert(tensors.end(), {one->unread, one->tokens_per_expert});
  }
  const std::vector<at::Tensor> host = to_host(tensors);
  auto next = host.begin();
  for (GateStats* one : stats) {
    if (!one->unread.defined()) continue;
    const double* counts = (next++)->const_data_ptr<double>();
    one->non_finite_tokens = static_cast<int64_t>(counts[0]);
    one->entropy_sum = counts[1];
    one->tokens_per_expert = *next++;
    one->unread = at::Tensor();
  }
}

GateStats count_assignments(const Routing& routing, int64_t num_experts, int64_t num_valid_tokens) {
  constexpr const char* kOperation = "count_assignments";
  validate_shapes(routing, num_experts, kOperation);
  GateStats stats;
  stats.tokens_per_expert = at::zeros({num_experts}, at::kLong);
  stats.num_tokens = num_valid_tokens;
  stats.num_assignments = routing.num_assignments();
  const std::vector<at::Tensor> host =
      to_host({explicit_offsets(routing).contiguous(), routing.expert_idx.contiguous(),
               routing.weights.detach().to(at::kFloat).contiguous()});
  const at::Tensor &offsets = host[0], &experts = host[1], &weights = host[2];
  const int32_t* offset = offsets.const_data_ptr<int32_t>();
  const int32_t* expert = experts.const_data_ptr<int32_t>();
  const float* weight = weights.const_data_ptr<float>();
  int64_t* count = stats.tokens_per_expert.mutable_data_ptr<int64_t>();
  int64_t tokens_with_expert = 0;
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    const int64_t length = offset[t + 1] - offset[t];
    if (length < 0 || offset[t] < 0 || offset[t + 1] > stats.num_assignments) {
      require(false, kOperation, "token_offsets", offset[t + 1],
              "does not follow " + to_text(offset[t]) + " within " +
                  to_text(stats.num_assignments) + " assignments at token " + to_text(t));
    }
    tokens_with_expert += length > 0 ? 1 : 0;
    stats.tokens_with_one_expert += length == 1 ? 1 : 0;
    stats.max_experts_per_token = std::max(stats.max_experts_per_token, length);
  }
  for (int64_t a = 0; a < stats.num_assignments; ++a) {
    if (expert[a] < 0 || expert[a] >= num_experts) {
      require(false, kOperation, "expert_idx", expert[a],
              "is outside [0, num_experts=" + to_text(num_experts) + ")");
    }
    ++count[expert[a]];
    const float g = weight[a];
    if (g > 0) stats.entropy_sum -= static_cast<double>(g * std::log(g));
  }
  stats.tokens_without_expert = num_valid_tokens - tokens_with_expert;
  return stats;
}

}  // namespace perseid::gates
