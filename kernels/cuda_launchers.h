#pragma once
#include "kernels/activation.h"
#include "kernels/assignment.h"
#include "kernels/combine.h"
#include "kernels/comet.h"
#include "kernels/doubly_stochastic.h"
#include "kernels/dselect_k.h"
#include "kernels/hash.h"
#include "kernels/permute.h"
#include "kernels/plan.h"
#include "kernels/ragged.h"
#include "kernels/random_element.h"
#include "kernels/router.h"
#include "kernels/select.h"
#include "kernels/select_atoms.h"
#include "kernels/sinkhorn.h"
#include "kernels/sort.h"
#include "kernels/statistical_top_k.h"

// The CUDA side of the operations of this folder: same arguments and results as the public
// functions, which check them and call these for a stream on a GPU. In kernels/*.cu and, where the
// host does the work, kernels/host_twin.cpp; or in a build without CUDA in
// cuda_launchers_none.cpp, where each throws.

namespace perseid::kernels::cuda {

void activation_forward(const ActivationShape& shape, DType dtype, const void* pre,
                        const void* weights, void* out, const Stream& stream);
void activation_backward(const ActivationShape& shape, DType dtype, const void* pre,
                         const void* weights, const void* grad_act, void* grad_pre,
                         void* weighted_act, void* grad_weights, const Stream& stream);

void combine(const void* rows, const CombineIndex& index, const void* weights, int64_t num_gates,
             void* out, int64_t num_out, int64_t width, DType dtype, const Stream& stream);
void combine_backward(const void* grad_out, const void* rows, const CombineIndex& index,
                      const void* weights, int64_t num_gates, void* grad_rows, void* grad_weights,
                      int64_t num_out, int64_t width, DType dtype, const Stream& stream);

void counting_sort(const int32_t* keys, int64_t num_keys, int64_t num_buckets, int64_t* offsets,
                   int32_t* order, const Stream& stream);

void permute(const void* rows, const int32_t* row_of, void* out, int64_t num_out, int64_t row_bytes,
             const Stream& stream);
void unpermute(const void* rows, const int32_t* row_of, void* out, int64_t num_rows,
               int64_t row_bytes, const Stream& stream);

void route(const RouterShape& shape, const RouterOptions& options, DType dtype,
           const RouterInput& input, const RouterOutput& output, const Stream& stream);
void route_backward(const RouterShape& shape, const RouterOptions& options, DType dtype,
                    const RouterInput& input, const RouterGradInput& grad, void* grad_logits,
                    const Stream& stream);

void comet(const CometShape& shape, const CometOptions& options, DType dtype,
           const CometInput& input, const CometOutput& output, const Stream& stream);
void comet_backward(const CometShape& shape, const CometOptions& options, DType dtype,
                    const CometInput& input, const CometGradInput& grad, void* grad_split_logits,
                    void* grad_leaf_logits, const Stream& stream);

void doubly_stochastic(const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
                       DType dtype, const void* scores, void* pi, double* rows, double* columns,
                       const Stream& stream);
void doubly_stochastic_backward(const DoublyStochasticShape& shape,
                                const DoublyStochasticOptions& options, DType dtype,
                                const void* scores, const double* rows, const double* columns,
                                const void* grad_pi, void* grad_scores, const Stream& stream);

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
AtomCounts select_atoms(const AtomCells& cells, AtomOrder order, const float* scores,
                        const uint64_t* candidates, const int64_t* k, RandomKey key,
                        uint64_t* selected, const Stream& stream);
int64_t sinkhorn(const SinkhornShape& shape, const SinkhornOptions& options, DType dtype,
                 const void* logits, double* log_d1, const Stream& stream);
void statistical_top_k(const StatisticalTopKShape& shape, const StatisticalTopKOptions& options,
                       DType dtype, const void* scores, const uint8_t* valid, void* weights,
                       int64_t* non_finite_tokens, const Stream& stream);
void statistical_top_k_backward(const StatisticalTopKShape& shape,
                                const StatisticalTopKOptions& options, DType dtype,
                                const void* scores, const uint8_t* valid, const void* weights,
                                const void* grad_weights, void* grad_scores, const Stream& stream);

void invert_order(const int32_t* order, int64_t num_rows, int32_t* place_of, const Stream& stream);
void row_of_sorted(const int32_t* order, int64_t num_places, const int32_t* row_offsets,
                   int64_t num_rows, int64_t fixed, int32_t* row_of, const Stream& stream);
void expert_ends(const int64_t* offsets, int64_t num_experts, int32_t* ends, const Stream& stream);
void sum_by_expert(const void* rows, int64_t num_rows, int64_t width, const int64_t* offsets,
                   int64_t num_experts, void* out, DType dtype, const Stream& stream);

void hash_buckets(const int64_t* keys, int64_t count, uint64_t seed, int64_t num_buckets,
                  int32_t* buckets, const Stream& stream);

int64_t ragged_offsets(const RaggedShape& shape, DType dtype, const void* weights,
                       int32_t* token_offsets, const Stream& stream);
void ragged_rows(const RaggedShape& shape, DType dtype, const void* weights,
                 const int32_t* token_offsets, const RaggedOutput& output, const Stream& stream);
void ragged_to_dense(const RaggedShape& shape, DType dtype, const int32_t* token_offsets,
                     const int32_t* expert_idx, const void* values, void* table,
                     const Stream& stream);

void select_k(const void* values, int64_t count, int64_t k, DType dtype, uint8_t* is_kept,
              const Stream& stream);

}  // namespace perseid::kernels::cuda
