#pragma once
#include <string>

#include "kernels/dtype.h"
#include "kernels/error.h"

// Private: the pairs of types that router_linear and its reference take.

namespace perseid::kernels {

/// Calls body(T{}, A{}) with the element types of tokens and of the arithmetic.
template <typename Body>
void dispatch_types(DType dtype, DType tokens_dtype, Body body) {
  if (dtype == DType::kFloat64 && tokens_dtype == DType::kFloat64) return body(double{}, double{});
  if (dtype == DType::kFloat32 && tokens_dtype == DType::kFloat32) return body(float{}, float{});
  if (dtype == DType::kFloat32 && tokens_dtype == DType::kBFloat16) {
    return body(BFloat16{}, float{});
  }
  throw ConfigError(ErrorDetail{"router_linear", "tokens_dtype", dtype_name(tokens_dtype),
                                std::string("does not go with logits in ") + dtype_name(dtype)});
}

}  // namespace perseid::kernels
