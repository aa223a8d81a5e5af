#pragma once
#include "kernels/permute.h"
#include "kernels/random_element.h"

// The CUDA side of the operations of this folder: same arguments and results as the public
// functions, which check them and call these for a stream on a GPU. In kernels/*.cu, or in a build
// without CUDA in cuda_launchers_none.cpp, where each throws.

namespace perseid::kernels::cuda {

void permute(const void* rows, const int32_t* row_of, void* out, int64_t num_out, int64_t row_bytes,
             const Stream& stream);
void unpermute(const void* rows, const int32_t* row_of, void* out, int64_t num_rows,
               int64_t row_bytes, const Stream& stream);

void fill_uniform(void* out, int64_t count, DType dtype, const UniformRange& range, RandomKey key,
                  const Stream& stream);
void fill_normal(void* out, int64_t count, DType dtype, RandomKey key, uint64_t first,
                 const Stream& stream);

}  // namespace perseid::kernels::cuda
