#include "kernels/router_linear.h"
#include "kernels/router_linear_types.h"

namespace perseid::kernels {

void router_linear_reference(const RouterLinearShape& shape, DType dtype, DType tokens_dtype,
                             const void* tokens, const void* weight, const void* bias,
                             void* logits) {
  dispatch_types(dtype, tokens_dtype, [&](auto t_tag, auto a_tag) {
    using T = decltype(t_tag);
    using A = decltype(a_tag);
    const auto* x = static_cast<const T*>(tokens);
    const auto* w = static_cast<const A*>(weight);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t e = 0; e < shape.num_experts; ++e) {
        double sum = bias ? static_cast<double>(static_cast<const A*>(bias)[e]) : 0.0;
        for (int64_t d = 0; d < shape.d_model; ++d) {
          sum += static_cast<double>(load(x + t * shape.d_model + d)) *
                 static_cast<double>(w[e * shape.d_model + d]);
        }
        static_cast<A*>(logits)[t * shape.num_experts + e] = static_cast<A>(sum);
      }
    }
  });
}

void router_linear_backward_reference(const RouterLinearShape& shape, DType dtype,
                                      DType tokens_dtype, const void* tokens, const void* weight,
                                      const uint8_t* valid, const void* grad_logits,
                                      void* grad_tokens, void* grad_weight, void* grad_bias) {
  dispatch_types(dtype, tokens_dtype, [&](auto t_tag, auto a_tag) {
    using T = decltype(t_tag);
    using A = decltype(a_tag);
    const int64_t num_tokens = shape.num_tokens, E = shape.num_experts, D = shape.d_model;
    const auto grad = [&](int64_t t, int64_t e) {
      return static_cast<double>(static_cast<const A*>(grad_logits)[t * E + e]);
    };
    for (int64_t t = 0; grad_tokens && t < num_tokens; ++t) {
      for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t e = 0; e < E; ++e) {
          sum += grad(t, e) * static_cast<double>(static_cast<const A*>(weight)[e * D + d]);
        }
        store(static_cast<T*>(grad_tokens) + t * D + d, static_cast<A>(sum));
      }
    }
    for (int64_t e = 0; e < E; ++e) {
      double bias_sum = 0;
      for (int64_t d = 0; d < (grad_weight ? D : 0); ++d) {
        double sum = 0;
        for (int64_t t = 0; t < num_tokens; ++t) {
          if (valid && !valid[t]) continue;
          sum += grad(t, e) * static_cast<double>(load(static_cast<const T*>(tokens) + t * D + d));
        }
        static_cast<A*>(grad_weight)[e * D + d] = static_cast<A>(sum);
      }
      for (int64_t t = 0; t < num_tokens; ++t) {
        if (!valid || valid[t]) bias_sum += grad(t, e);
      }
      if (grad_bias) static_cast<A*>(grad_bias)[e] = static_cast<A>(bias_sum);
    }
  });
}

}  // namespace perseid::kernels
