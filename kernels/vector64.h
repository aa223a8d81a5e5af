#pragma once
#include <cstdint>
#include <cstring>

#include "kernels/simd.h"

// Internal: 64 bytes of numbers that stay in registers; compilers split them where registers are
// shorter.

namespace perseid::kernels {

template <typename T>
struct Vector64 {
  static constexpr int64_t kLanes = static_cast<int64_t>(64 / sizeof(T));
  typedef T Type __attribute__((vector_size(64), aligned(8), may_alias));
};

template <typename T>
PERSEID_INLINE void load_vector(const T* p, typename Vector64<T>::Type& vector) {
  std::memcpy(&vector, p, sizeof(vector));
}
template <typename T>
PERSEID_INLINE void store_vector(const typename Vector64<T>::Type& vector, T* p) {
  std::memcpy(p, &vector, sizeof(vector));
}

}  // namespace perseid::kernels
