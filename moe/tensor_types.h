#pragma once
#include <ATen/core/Tensor.h>

#include "kernels/dtype.h"

// The one place where tensors become raw pointers and element types for kernels and comm.

namespace perseid {

/// Element type of a floating tensor; throws ConfigError for others, naming `operation`.
kernels::DType dtype_of(const at::Tensor& tensor, const char* operation);

/// Whether dtype_of takes it.
bool has_dtype(const at::Tensor& tensor);

/// Type of routing weights that go with activations of this type: float64 for float64, else
/// float32.
at::ScalarType weight_type(const at::Tensor& activations);

/// Data of a contiguous tensor, or null for an undefined one.
const void* data_of(const at::Tensor& tensor);
void* mutable_data_of(const at::Tensor& tensor);
const int32_t* int32_data(const at::Tensor& tensor);

}  // namespace perseid
