#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Scores of a top-k router, the selection of K experts per token, their weights, and sums for the
// losses. Formulas: softmax after top-k (Shazeer 2017), softmax before (Switch 2021), sigmoid with
// a selection bias and groups of experts (DeepSeek-V3 2024), z-loss (ST-MoE 2022).

namespace perseid::kernels {

enum class ScoreFunction : uint8_t {
  kSoftmax,
  kSigmoid,
  kSqrtSoftplus,  ///< sqrt(log(1 + e^z)), unbounded above; otherwise treated as the sigmoid
};

struct RouterShape {
  int64_t num_tokens = 0;   ///< T >= 0
  int64_t num_experts = 0;  ///< E >= 1
  int64_t top_k = 0;        ///< 1 <= K <= E
};

struct RouterOptions {
  ScoreFunction score_function = ScoreFunction::kSoftmax;
  /// true: weights are divided by their sum over the selection (softmax: equals the softmax over
  /// the K selected logits). false: weights are the scores themselves.
  bool normalize = true;
  double route_scale = 1.0;  ///< every weight is multiplied by it
  /// Groups of E / num_groups experts with consecutive ids, of which a token uses the best
  /// topk_groups. The score of a group is its largest logit for softmax scores without a bias, else
  /// the sum of its two largest score + bias. Equal groups: the smaller id first.
  int64_t num_groups = 1;   ///< divides E
  int64_t topk_groups = 1;  ///< at most num_groups, and with room for K experts
};

/// Inputs. `logits` [T, E] is float32 or float64; so are all floating outputs.
struct RouterInput {
  const void* logits = nullptr;
  const float* expert_bias =
      nullptr;                     ///< [E] added to the score for the selection only; may be null
  const uint8_t* valid = nullptr;  ///< [T] 1 = a real token; null = all are. Others select nothing
};

/// Outputs; a null pointer is not written.
struct RouterOutput {
  int32_t* expert_idx =
      nullptr;              ///< [T, K] weight descending, equal scores by smaller id; -1 if invalid
  void* weights = nullptr;  ///< [T, K] 0 where expert_idx is -1
  void* score_sum = nullptr;       ///< [E] sum over valid tokens of softmax(logits) or, for other
                                   ///< scores s, of softmax(log s) = s / (sum of s)
  void* lse_square_sum = nullptr;  ///< [1] sum over valid tokens of logsumexp(logits)^2
  int64_t* tokens_per_expert = nullptr;  ///< [E] assignments
  int64_t* non_finite_tokens =
      nullptr;                   ///< [1] valid tokens with a NaN or an infinity in their logits
  void* score_shares = nullptr;  ///< [T, E] what each token adds to score_sum; 0 if invalid
  double* entropy_sum =
      nullptr;  ///< [1] sum over valid tokens of -sum of w log w, w > 0; needs weights
};

/// Selection is on the logit, with a bias on score + bias, in the type of the logits: larger first,
/// then smaller id; -0 equals +0. NaN counts as -inf, and experts at -inf are taken last, by
/// smaller id and whatever their bias. Choices are ordered by their logit, so by weight, then by
/// smaller id. Weights follow the formula, so a NaN stays visible: all K weights are NaN if a
/// chosen logit is NaN or, for softmax without `normalize`, if any logit is; other scores without
/// `normalize` keep it to the choice itself. Several +inf share equally and leave 0 to the others,
/// but for the sigmoid, which is finite there; a row of -inf gives 1/K each for softmax, else
/// s / (sum + 1e-20) as everywhere. A NaN makes the sums NaN; the entropy leaves it out. Experts
/// outside the chosen groups are never selected. Sums over tokens are formed in double over fixed
/// blocks of tokens: same bits for any thread count. Reads T*E, writes T*K*2 elements.
void route(const RouterShape& shape, const RouterOptions& options, DType dtype,
           const RouterInput& input, const RouterOutput& output, Stream stream = {});
void route_reference(const RouterShape& shape, const RouterOptions& options, DType dtype,
                     const RouterInput& input, const RouterOutput& output);

/// Gradients that reach the router; a null pointer means zero.
struct RouterGradInput {
  const int32_t* expert_idx = nullptr;        ///< [T, K] of the forward
  const void* grad_weights = nullptr;         ///< [T, K]
  const void* grad_score_sum = nullptr;       ///< [E]
  const void* grad_lse_square_sum = nullptr;  ///< [1]
  const void* grad_score_shares = nullptr;    ///< [T, E]
};

/// grad_logits [T, E] is written whole: rows of invalid tokens and, without terms that reach all
/// experts, entries outside the selection are 0. Needs the same logits as the forward. The bias has
/// no gradient. K = 1 with `normalize` has weight route_scale and gradient 0. Where the maximum of
/// a softmax is infinite, or that of scores which are normalized, its values are a convention, and
/// their gradient is 0. Reads and writes T*E
/// elements. Deterministic.
void route_backward(const RouterShape& shape, const RouterOptions& options, DType dtype,
                    const RouterInput& input, const RouterGradInput& grad, void* grad_logits,
                    Stream stream = {});
void route_backward_reference(const RouterShape& shape, const RouterOptions& options, DType dtype,
                              const RouterInput& input, const RouterGradInput& grad,
                              void* grad_logits);

}  // namespace perseid::kernels
