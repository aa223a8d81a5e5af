#pragma once
#include <cstdint>
#include <vector>

#include "kernels/router.h"

// One token of the router by plain loops in double: what route_reference and
// route_backward_reference are made of. The parallel version also comes here for tokens with a NaN
// or an infinite maximum, where the formulas have exceptions. Private to this folder.

namespace perseid::kernels {

/// One token's result; the vectors keep their memory from token to token.
struct TokenRoute {
  std::vector<int32_t> expert_idx;   ///< [K]
  std::vector<double> weights;       ///< [K]
  std::vector<double> score_shares;  ///< [E] what the token adds to score_sum
  double lse = 0;
  bool is_non_finite = false;
};

/// @param logits  [E] of this token
template <typename T>
void route_token(const RouterShape& shape, const RouterOptions& options, const T* logits,
                 const float* expert_bias, TokenRoute& route);

/// The gradients that reach one token; null pointers are zero.
template <typename T>
struct TokenGrad {
  const int32_t* expert_idx = nullptr;     ///< [K]
  const T* grad_weights = nullptr;         ///< [K]
  const T* grad_score_sum = nullptr;       ///< [E] of this token's score shares
  const T* grad_lse_square_sum = nullptr;  ///< [1]
};

/// @param grad_logits  [E] of this token, written whole
template <typename T>
void route_token_backward(const RouterShape& shape, const RouterOptions& options, const T* logits,
                          const TokenGrad<T>& grad, T* grad_logits);

/// Checks shape, options and buffers of both directions; throws ConfigError.
void check_router(const char* operation, const RouterShape& shape, const RouterOptions& options,
                  const RouterInput& input);

}  // namespace perseid::kernels
