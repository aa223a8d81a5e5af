#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "gates/gate.h"

// Losses of routers as pure functions. Each takes local differentiable sums and global constants
// and returns a local loss: the sum over ranks has the right value, and the gradients of all ranks
// together are the right gradient.

namespace perseid::gates {

/// "aux_loss": coeff * E * sum_i f_i * p_i with f = tokens_per_expert / (K * T) (normalize_by_k;
/// else / T) and p = score_sum / T, T = tokens_global (Switch, GShard, Megatron). f is a constant
/// for autograd. At perfect balance the value is coeff (times K without normalize_by_k); 0 if
/// tokens_global is 0.
/// @param global_tokens_per_expert  [E] int64 summed over ranks
NamedLoss load_balance_loss(const BalanceTerms& terms, const at::Tensor& global_tokens_per_expert,
                            int64_t tokens_global);

/// "z_loss": coeff * lse_square_sum / tokens_global (ST-MoE), 0 if tokens_global is 0.
/// @param lse_square_sum  scalar, local sum of logsumexp(logits)^2
NamedLoss z_loss(const at::Tensor& lse_square_sum, double coeff, int64_t tokens_global);

}  // namespace perseid::gates
