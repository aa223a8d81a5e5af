#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

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
/// @param counted_tokens  the T of f, where tokens_per_expert counts more tokens than those of
///                        score_sum (earlier micro-batches of the step); < 0: tokens_global
NamedLoss load_balance_loss(const BalanceTerms& terms, const at::Tensor& global_tokens_per_expert,
                            int64_t tokens_global, int64_t counted_tokens = -1);

/// "aux_loss" of each sequence by itself, weighted by its share of the tokens (DeepSeek): the sum
/// over sequences s of T_s / tokens_global * coeff * E * sum_i f_i * p_i, with f and p of the T_s
/// valid tokens of s that are here: of a sequence on several ranks, each part is balanced. 0 if
/// tokens_global is 0.
/// @param score_shares  [T, E] scores that sum to 1, 0 for tokens that are not valid;
/// differentiable
/// @param expert_idx    [T, K] -1 for tokens that are not valid
/// @param sequence      [T] int64, any numbers
NamedLoss sequence_balance_loss(const at::Tensor& score_shares, const at::Tensor& expert_idx,
                                const at::Tensor& sequence, double coeff, bool normalize_by_k,
                                int64_t tokens_global);

/// "z_loss": coeff * lse_square_sum / tokens_global (ST-MoE), 0 if tokens_global is 0.
/// @param lse_square_sum  scalar, local sum of logsumexp(logits)^2
NamedLoss z_loss(const at::Tensor& lse_square_sum, double coeff, int64_t tokens_global);

/// The local part of a loss of global sums: its value is 1/num_ranks of the loss, its gradient that
/// of the loss at the global sum, which is a constant for autograd, times the local sum. So values
/// and gradients of all ranks add up to those of one process.
/// @param global_sum  [N] loss.local_sum summed over ranks, no gradient
NamedLoss finish_global_loss(const GlobalLoss& loss, const at::Tensor& global_sum,
                             int64_t tokens_global, int num_ranks);

/// Sum over tokens of each expert's weight, [E], differentiable: the importance of Shazeer et al.
/// 2017.
at::Tensor weight_per_expert(const Routing& routing, int64_t num_experts);

/// "balance_loss": coeff * sum_m p_m log p_m with p the mean weight of each expert over all tokens,
/// normalised to 1. Its minimum, -log E, is at equal shares; it keeps experts from dying out.
/// @param weight_sum  [E], see weight_per_expert
GlobalLoss balance_entropy_loss(const at::Tensor& weight_sum, double coeff);

/// Squared coefficient of variation of a sum by expert, coeff * Var(v) / (mean(v)^2 + 1e-10) with
/// the population variance (Shazeer et al. 2017: importance and load).
/// @param sum  [E]
GlobalLoss cv_squared_loss(const std::string& name, const at::Tensor& sum, double coeff);

}  // namespace perseid::gates
