#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/error.h"

// Argument checks that all operations of this folder share; private to it. They look at sizes and
// pointers, never at data.

namespace perseid::kernels {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// A count or a size: 0 is normal.
inline void require_count(const char* operation, const char* argument, int64_t value) {
  if (value < 0) {
    require(false, operation, argument, value, "is negative; choose 0 or more");
  }
}

/// A buffer of `count` elements may be null only if the count is 0.
inline void require_buffer(const char* operation, const char* argument, const void* buffer,
                           int64_t count) {
  if (buffer == nullptr && count > 0) {
    throw ConfigError(ErrorDetail{operation, argument, "null",
                                  "but " + to_text(count) + " elements are needed; pass a buffer"});
  }
}

/// Calls body(T{}) with T = float or double.
template <typename Body>
decltype(auto) dispatch_float_dtype(DType dtype, const char* operation, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    default:
      throw ConfigError(ErrorDetail{operation, "dtype", dtype_name(dtype),
                                    "is not supported; choose fp32 or fp64"});
  }
}

}  // namespace perseid::kernels
