#pragma once
#include "kernels/permute.h"
#include "kernels/router.h"

// The CUDA side of the operations of this folder: same arguments and results as the public
// functions, which check them and call these for a stream on a GPU. In kernels/*.cu, or in a build
// without CUDA in cuda_launchers_none.cpp, where each throws.

namespace perseid::kernels::cuda {

void permute(const void* rows, const int32_t* row_of, void* out, int64_t num_out, int64_t row_bytes,
             const Stream& stream);
void unpermute(const void* rows, const int32_t* row_of, void* out, int64_t num_rows,
               int64_t row_bytes, const Stream& stream);

void route(const RouterShape& shape, const RouterOptions& options, DType dtype,
           const RouterInput& input, const RouterOutput& output, const Stream& stream);
void route_backward(const RouterShape& shape, const RouterOptions& options, DType dtype,
                    const RouterInput& input, const RouterGradInput& grad, void* grad_logits,
                    const Stream& stream);

}  // namespace perseid::kernels::cuda
