#pragma once
#include <ATen/core/Tensor.h>

#include <string>

#include "kernels/error.h"

namespace perseid::gates {

/// Type and shape of a tensor for error texts: "Float[4, 7]".
inline std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) return "undefined";
  return std::string(toString(tensor.scalar_type())) + to_text(tensor.sizes());
}

}  // namespace perseid::gates
