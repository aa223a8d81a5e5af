#pragma once
#include <cstdint>

#include "kernels/simd.h"

// Internal: loops over rows of numbers that vectorise where they are inlined.

namespace perseid::kernels {

template <typename T>
PERSEID_INLINE void add_scaled(T scale, const T* source, int64_t count, T* target) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) target[d] += scale * source[d];
}

template <typename T>
PERSEID_INLINE T dot(const T* a, const T* b, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < count; ++d) sum += a[d] * b[d];
  return sum;
}

}  // namespace perseid::kernels
