#pragma once
#include <cstdint>

#include "kernels/stream.h"

namespace perseid::kernels {

/// out[i] = rows[row_of[i]] for i in [0, num_out): a copy of whole rows, no arithmetic. Rows may be
/// read more than once. Reads and writes num_out * row_bytes bytes.
/// @param row_of  [num_out] entries in [0, rows of `rows`); null is the identity
void permute(const void* rows, const int32_t* row_of, void* out, int64_t num_out, int64_t row_bytes,
             Stream stream = {});
void permute_reference(const void* rows, const int32_t* row_of, void* out, int64_t num_out,
                       int64_t row_bytes);

/// out[row_of[i]] = rows[i]: the transpose of permute when row_of has no entry twice. Rows of `out`
/// that no entry names are left as they are.
void unpermute(const void* rows, const int32_t* row_of, void* out, int64_t num_rows,
               int64_t row_bytes, Stream stream = {});
void unpermute_reference(const void* rows, const int32_t* row_of, void* out, int64_t num_rows,
                         int64_t row_bytes);

}  // namespace perseid::kernels
