#pragma once
#include "kernels/assignment.h"
#include "kernels/comet.h"
#include "kernels/dselect_k.h"
#include "kernels/permute.h"
#include "kernels/random_element.h"
#include "kernels/sinkhorn.h"
#include "kernels/statistical_top_k.h"

// The CUDA side of the operations of this folder: same arguments and results as the public
// functions, which check them and call these for a stream on a GPU. In kernels/*.cu and, where the
// host does the work, kernels/host_twin.cpp; or in a build without CUDA in
// cuda_launchers_none.cpp, where each throws.

namespace perseid::kernels::cuda {

void permute(const void* rows, const int32_t* row_of, void* out, int64_t num_out, int64_t row_bytes,
             const Stream& stream);
void unpermute(const void* rows, const int32_t* row_of, void* out, int64_t num_rows,
               int64_t row_bytes, const Stream& stream);

void comet(const CometShape& shape, const CometOptions& options, DType dtype,
           const CometInput& input, const CometOutput& output, const Stream& stream);
void comet_backward(const CometShape& shape, const CometOptions& options, DType dtype,
                    const CometInput& input, const CometGradInput& grad, void* grad_split_logits,
                    void* grad_leaf_logits, const Stream& stream);

void dselect_k(const DSelectKShape& shape, const DSelectKOptions& options, DType dtype,
               const DSelectKInput& input, const DSelectKOutput& output, const Stream& stream);
void dselect_k_backward(const DSelectKShape& shape, const DSelectKOptions& options, DType dtype,
                        const DSelectKInput& input, const DSelectKGradInput& grad,
                        void* grad_logits, const Stream& stream);

void fill_uniform(void* out, int64_t count, DType dtype, const UniformRange& range, RandomKey key,
                  const Stream& stream);
void fill_normal(void* out, int64_t count, DType dtype, RandomKey key, uint64_t first,
                 const Stream& stream);

// In host_twin.cpp.
void assign(const AssignmentShape& shape, const double* cost, const int64_t* capacity,
            int32_t* column_of_row, const AssignmentDuals& duals, const Stream& stream);
void assign_balanced(const AssignmentShape& shape, DType dtype, const void* scores,
                     int32_t* column_of_row, const Stream& stream);
int64_t sinkhorn(const SinkhornShape& shape, const SinkhornOptions& options, DType dtype,
                 const void* logits, double* log_d1, const Stream& stream);
void statistical_top_k(const StatisticalTopKShape& shape, const StatisticalTopKOptions& options,
                       DType dtype, const void* scores, const uint8_t* valid, void* weights,
                       int64_t* non_finite_tokens, const Stream& stream);
void statistical_top_k_backward(const StatisticalTopKShape& shape,
                                const StatisticalTopKOptions& options, DType dtype,
                                const void* scores, const uint8_t* valid, const void* weights,
                                const void* grad_weights, void* grad_scores, const Stream& stream);

}  // namespace perseid::kernels::cuda
