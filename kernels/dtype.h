#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

#include "kernels/error.h"
#include "kernels/simd.h"

namespace perseid::kernels {

/// Element types. The numbers travel in the exchange header, so they never change.
enum class DType : uint8_t {
  kBytes = 0,
  kFloat32 = 1,
  kBFloat16 = 2,
  kFloat64 = 3,
  kInt32 = 4,
  kInt64 = 5
};

/// bfloat16 storage. Arithmetic is done in float; rounding is to nearest even, NaN stays NaN.
struct BFloat16 {
  uint16_t bits;
};

PERSEID_INLINE float to_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
PERSEID_INLINE BFloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return BFloat16{static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded)};
}

/// Accumulate<T>: the type in which sums over elements of T are formed.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

PERSEID_INLINE float load(const float* p) { return *p; }
PERSEID_INLINE double load(const double* p) { return *p; }
PERSEID_INLINE float load(const BFloat16* p) { return to_float(*p); }
PERSEID_INLINE void store(float* p, float x) { *p = x; }
PERSEID_INLINE void store(double* p, double x) { *p = x; }
PERSEID_INLINE void store(BFloat16* p, float x) { *p = to_bfloat16(x); }

const char* dtype_name(DType dtype);  ///< "fp32", "bf16", ...
int64_t dtype_bytes(DType dtype);     ///< bytes of one element

/// Calls body(T{}) with T = float, BFloat16 or double. Throws ConfigError that lists them.
template <typename Body>
decltype(auto) dispatch_dtype(DType dtype, const char* operation, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat64:
      return body(double{});
    default:
      throw ConfigError(ErrorDetail{operation, "dtype", dtype_name(dtype),
                                    "is not supported; choose bf16, fp32 or fp64"});
  }
}

}  // namespace perseid::kernels
