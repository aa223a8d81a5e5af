#include "moe/tensor_types.h"

#include <c10/core/ScalarType.h>

#include <optional>

#include "kernels/error.h"

namespace perseid {
namespace {

std::optional<kernels::DType> known_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return kernels::DType::kFloat32;
    case at::kBFloat16:
      return kernels::DType::kBFloat16;
    case at::kHalf:
      return kernels::DType::kFloat16;
    case at::kDouble:
      return kernels::DType::kFloat64;
    default:
      return std::nullopt;
  }
}

}  // namespace

kernels::DType dtype_of(const at::Tensor& tensor, const char* operation) {
  const std::optional<kernels::DType> dtype = known_dtype(tensor.scalar_type());
  require(dtype.has_value(), operation, "dtype", c10::toString(tensor.scalar_type()),
          "is not supported; choose bf16, fp16, fp32 or fp64");
  return *dtype;
}

bool has_dtype(const at::Tensor& tensor) { return known_dtype(tensor.scalar_type()).has_value(); }

at::ScalarType weight_type(const at::Tensor& activations) {
  return activations.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

const void* data_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

void* mutable_data_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

const int32_t* int32_data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<int32_t>() : nullptr;
}

}  // namespace perseid
