#include "kernels/dtype.h"

namespace perseid::kernels {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kBytes:
      return "bytes";
    case DType::kFloat32:
      return "fp32";
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat64:
      return "fp64";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFloat16:
      return "fp16";
  }
  return "unknown";
}

int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kBytes:
      return 1;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
      return 2;
    case DType::kFloat64:
      return 8;
    case DType::kInt32:
      return 4;
    case DType::kInt64:
      return 8;
    case DType::kFloat16:
      return 2;
  }
  throw ConfigError(ErrorDetail{"dtype_bytes", "dtype", to_text(static_cast<int>(dtype)),
                                "is no element type; choose 0 to 6"});
}

}  // namespace perseid::kernels
