#pragma once
#include <ATen/core/Tensor.h>

#include "gates/device.h"
#include "kernels/dtype.h"

// Internal: tensors as arguments of kernels.

namespace perseid::gates {

/// Of a float32 or float64 tensor.
inline kernels::DType kernel_type(at::ScalarType type) {
  return type == at::kDouble ? kernels::DType::kFloat64 : kernels::DType::kFloat32;
}

inline const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

/// A gradient in the compute type and without gaps; undefined stays undefined.
inline at::Tensor dense_gradient(const at::Tensor& gradient, at::ScalarType type) {
  return gradient.defined() ? gradient.to(type).contiguous() : gradient;
}

}  // namespace perseid::gates
