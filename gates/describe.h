#pragma once
#include <ATen/core/Tensor.h>

#include <string>

#include "kernels/error.h"

namespace perseid {

// Texts for checks that mostly hold, in every step, without the streams of to_text for any value.
inline std::string to_text(at::IntArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  }
  return text + "]";
}
inline std::string to_text(at::ScalarType type) { return toString(type); }
inline std::string to_text(const at::Device& device) { return device.str(); }

}  // namespace perseid

namespace perseid::gates {

/// Type and shape of a tensor for error texts: "Float[4, 7]".
inline std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) return "undefined";
  return std::string(toString(tensor.scalar_type())) + to_text(tensor.sizes());
}

}  // namespace perseid::gates
