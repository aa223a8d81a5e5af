#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/error.h"
#include "kernels/simd.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace perseid::kernels {

/// Element types. The numbers travel in the exchange header, so they never change.
enum class DType : uint8_t {
  kBytes = 0,
  kFloat32 = 1,
  kBFloat16 = 2,
  kFloat64 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kFloat16 = 6
};
inline constexpr DType kLastDType = DType::kFloat16;

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

/// float16 storage, IEEE 754 binary16. As BFloat16: arithmetic in float, one rounding to nearest
/// even; what is 65520 or more becomes infinite, NaN stays NaN. Subnormal values are kept. GPUs
/// have instructions for it.
struct Float16 {
  uint16_t bits;
};

PERSEID_INLINE float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  // Exponents of 5 bits are biased by 15, those of 8 by 127; infinity and NaN have the largest.
  const uint32_t offset = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + offset;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  return std::bit_cast<float>(sign |
                              (magnitude < 0x0400u ? std::bit_cast<uint32_t>(subnormal) : normal));
#endif
}
PERSEID_INLINE Float16 to_float16(float x) {
#if defined(__CUDA_ARCH__)
  return Float16{__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // In 0.5 + |x| the last bit is worth 2^-24, a step of the subnormal values: the sum rounds.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) -
                             std::bit_cast<uint32_t>(0.5f);
  const uint32_t large = magnitude > 0x7F800000u ? 0x7FFFu : 0x7C00u;
  const uint32_t small = magnitude < (113u << 23) ? subnormal : normal;
  return Float16{static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? large : small))};
#endif
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
/// Is arithmetic done in another type than T?
template <typename T>
inline constexpr bool kIsConverted = !std::is_same_v<T, Accumulate<T>>;

PERSEID_INLINE float load(const float* p) { return *p; }
PERSEID_INLINE double load(const double* p) { return *p; }
PERSEID_INLINE float load(const BFloat16* p) { return to_float(*p); }
PERSEID_INLINE float load(const Float16* p) { return to_float(*p); }
PERSEID_INLINE void store(float* p, float x) { *p = x; }
PERSEID_INLINE void store(double* p, double x) { *p = x; }
PERSEID_INLINE void store(BFloat16* p, float x) { *p = to_bfloat16(x); }
PERSEID_INLINE void store(Float16* p, float x) { *p = to_float16(x); }

const char* dtype_name(DType dtype);  ///< "fp32", "bf16", ...
int64_t dtype_bytes(DType dtype);     ///< bytes of one element

/// Calls body(T{}) with T = float, BFloat16, Float16 or double. Throws ConfigError that lists them.
template <typename Body>
decltype(auto) dispatch_dtype(DType dtype, const char* operation, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      return body(double{});
    default:
      throw ConfigError(ErrorDetail{operation, "dtype", dtype_name(dtype),
                                    "is not supported; choose bf16, fp16, fp32 or fp64"});
  }
}

}  // namespace perseid::kernels
