#include "gates/gate_parts.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "gates/device.h"
#include "gates/linear_router.h"
#include "kernels/error.h"
#include "kernels/random.h"

namespace perseid::gates {

at::Tensor router_weight(int64_t num_experts, int64_t d_model, uint64_t seed, int64_t layer_id,
                         int64_t gate_id) {
  const at::Tensor weight = at::empty({num_experts, d_model}, at::kFloat);
  const double bound = std::sqrt(6.0 / static_cast<double>(num_experts + d_model));
  const kernels::RandomKey key = kernels::random_key(seed)
                                     .with(static_cast<uint64_t>(layer_id))
                                     .with(static_cast<uint64_t>(gate_id));
  kernels::fill_uniform(weight.mutable_data_ptr(), weight.numel(), kernels::DType::kFloat32, -bound,
                        bound, key);
  return weight;
}

void require_coefficient(const char* operation, const char* argument, double value) {
  require(std::isfinite(value) && value >= 0, operation, argument, value,
          "is not a finite number from 0 on; choose 0 to switch the loss off");
}

void require_d_model(const char* operation, int64_t d_model) {
  require(d_model >= 1, operation, "d_model", d_model, "is below 1; give the width of the tokens");
  require(d_model <= std::numeric_limits<int32_t>::max(), operation, "d_model", d_model,
          "exceeds 2147483647");
}

void require_input(const GateInput& input, const at::Tensor& weight, const char* operation) {
  validate(input, weight.size(1), operation);
  require(input.tokens.device() == weight.device(), operation, "tokens.device",
          input.tokens.device(), "differs from weight.device=" + to_text(weight.device()));
  stream_of(input.tokens, operation);  // throws for devices without kernels
}

at::Tensor valid_tokens(const GateInput& input) {
  if (!input.valid.has_value() || input.valid->all().item<bool>()) return input.tokens;
  return input.tokens.masked_fill(input.valid->logical_not().unsqueeze(1), 0);
}

at::Tensor router_features(const GateInput& input, InputNorm norm, const at::Tensor& weight) {
  if (norm == InputNorm::kNone) return input.tokens;  // no second copy of them is kept
  return gate_features(valid_tokens(input), norm, router_compute_type(weight));
}

int64_t count_valid(const GateInput& input) {
  return input.valid.has_value() ? input.valid->sum().item<int64_t>() : input.tokens.size(0);
}

int64_t tokens_global_of(const GateInput& input, int64_t num_valid) {
  return input.tokens_global > 0 ? input.tokens_global : num_valid;
}

Routing routing_from_kept(const at::Tensor& expert_idx, const at::Tensor& weights,
                          const at::Tensor& kept) {
  Routing routing;
  routing.num_tokens = expert_idx.size(0);
  if (kept.all().item<bool>()) {
    routing.top_k = expert_idx.size(1);
    routing.expert_idx = expert_idx.reshape({-1});
    routing.weights = weights.reshape({-1});
    return routing;
  }
  const at::Tensor ends = kept.sum(1).cumsum(0);
  routing.token_offsets = at::cat({at::zeros({1}, ends.options()), ends}).to(at::kInt);
  const at::Tensor places = at::nonzero(kept.reshape({-1})).squeeze(1).to(at::kInt);
  routing.expert_idx = expert_idx.reshape({-1}).index_select(0, places);
  routing.weights = weights.reshape({-1}).index_select(0, places);
  return routing;
}

}  // namespace perseid::gates
