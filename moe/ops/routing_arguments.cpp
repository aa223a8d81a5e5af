#include "moe/ops/routing_arguments.h"

#include <ATen/ops/ones.h>

#include "kernels/error.h"

namespace perseid::ops {

int64_t num_assignments(const at::Tensor& token_offsets, int64_t num_tokens, int64_t capacity,
                        const char* operation) {
  require(token_offsets.dim() == 1 && token_offsets.scalar_type() == at::kInt &&
              token_offsets.size(0) == num_tokens + 1,
          operation, "token_offsets",
          to_text(token_offsets.scalar_type()) + to_text(token_offsets.sizes()),
          "is not int32 [num_tokens + 1 = " + to_text(num_tokens + 1) + "]");
  const int64_t count = token_offsets[num_tokens].item<int32_t>();
  require(count >= 0 && count <= capacity, operation, "token_offsets", count,
          "is not between 0 and the " + to_text(capacity) + " entries of the table");
  return count;
}

gates::Routing cut_routing(const at::Tensor& token_offsets, const at::Tensor& expert_idx,
                           const at::Tensor& weights, int64_t num_tokens, int64_t num_experts,
                           const char* operation) {
  require(expert_idx.dim() == 1, operation, "expert_idx", expert_idx.sizes(), "is not [C]");
  const int64_t capacity = expert_idx.size(0);
  require(!weights.defined() || weights.sizes() == expert_idx.sizes(), operation, "weights",
          weights.defined() ? weights.sizes() : at::IntArrayRef(),
          "differs from expert_idx=" + to_text(expert_idx.sizes()));
  const int64_t count = num_assignments(token_offsets, num_tokens, capacity, operation);
  gates::Routing routing;
  routing.num_tokens = num_tokens;
  routing.token_offsets = token_offsets.contiguous();
  routing.expert_idx = expert_idx.narrow(0, 0, count).contiguous();
  routing.weights =
      weights.defined() ? weights.narrow(0, 0, count).contiguous() : at::ones({count}, at::kFloat);
  gates::validate(routing, num_experts, operation);
  return routing;
}

}  // namespace perseid::ops
