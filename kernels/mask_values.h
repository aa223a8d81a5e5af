#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Values where a mask of bits is set: position p is bit p % 64 of word p / 64. For the host: on
// kCuda both throw ConfigError.

namespace perseid::kernels {

/// values[p] = 0 where p is not set, NaN or not. Its time does not depend on the pattern.
/// @param values  [count] any type of dispatch_dtype
void zero_inactive(const uint64_t* is_active, int64_t count, DType dtype, void* values,
                   Stream stream = {});
void zero_inactive_reference(const uint64_t* is_active, int64_t count, DType dtype, void* values);

/// flags[p] = 1 where p is set, else 0: the bytes of a bool tensor.
void expand_mask(const uint64_t* is_active, int64_t count, uint8_t* flags, Stream stream = {});
void expand_mask_reference(const uint64_t* is_active, int64_t count, uint8_t* flags);

}  // namespace perseid::kernels
