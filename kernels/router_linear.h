#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// The linear map of a router: many tokens, few experts. Tokens are read as they are, sums are
// formed in the type of the logits, and bits do not depend on the number of threads. For the host:
// on kCuda both throw ConfigError, as LibTorch's matrix product (mm of tensors) does it there.

namespace perseid::kernels {

struct RouterLinearShape {
  int64_t num_tokens = 0;   ///< T >= 0
  int64_t num_experts = 0;  ///< E >= 1, any number of outputs
  int64_t d_model = 0;      ///< D >= 1
};

/// logits[t, e] = sum_d tokens[t, d] * weight[e, d] + bias[e]. 2*T*E*D FLOPs.
/// @param dtype         of logits, weight and bias: fp32 or fp64
/// @param tokens_dtype  `dtype`, or bf16 with fp32
/// @param tokens  [T, D]   @param weight  [E, D]   @param bias  [E] or null   @param logits  [T, E]
void router_linear(const RouterLinearShape& shape, DType dtype, DType tokens_dtype,
                   const void* tokens, const void* weight, const void* bias, void* logits,
                   Stream stream = {});
void router_linear_reference(const RouterLinearShape& shape, DType dtype, DType tokens_dtype,
                             const void* tokens, const void* weight, const void* bias,
                             void* logits);

/// Its transpose; null outputs are not written.
/// @param grad_logits  [T, E] of `dtype`
/// @param valid        [T] 1 = a real token, or null. Others may hold NaN and add nothing
/// @param grad_tokens  [T, D] of tokens_dtype: grad_logits weight, rounded once
/// @param grad_weight  [E, D] of `dtype`: grad_logits^T tokens, summed over blocks of 512 tokens
/// @param grad_bias    [E] of `dtype`
void router_linear_backward(const RouterLinearShape& shape, DType dtype, DType tokens_dtype,
                            const void* tokens, const void* weight, const uint8_t* valid,
                            const void* grad_logits, void* grad_tokens, void* grad_weight,
                            void* grad_bias, Stream stream = {});
void router_linear_backward_reference(const RouterLinearShape& shape, DType dtype,
                                      DType tokens_dtype, const void* tokens, const void* weight,
                                      const uint8_t* valid, const void* grad_logits,
                                      void* grad_tokens, void* grad_weight, void* grad_bias);

}  // namespace perseid::kernels
