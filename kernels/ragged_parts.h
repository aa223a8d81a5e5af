#pragma once
#include "kernels/ordered_key.h"
#include "kernels/ragged.h"

// Which weights of a table are pairs, and their order, for CPU and GPU. Private to this folder.

namespace perseid::kernels {

template <typename T>
PERSEID_INLINE bool is_kept(T weight) {
  return !(weight <= T{0});  // true for a NaN
}

/// Order of a kept weight: 0 for a NaN, else above 0.
template <typename T>
PERSEID_INLINE SignedKey<T> kept_key(T weight) {
  const SignedKey<T> key = signed_key(weight);
  return key > 0 ? key : 0;  // only a NaN has a negative key and is kept
}

/// Throws ConfigError for a sum of row lengths that offsets cannot hold.
void require_assignments(int64_t num_assignments);

}  // namespace perseid::kernels
