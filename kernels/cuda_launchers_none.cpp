// kernels/cuda_launchers.h in a build without CUDA.
#include "kernels/cuda_launchers.h"
#include "kernels/error.h"

namespace perseid::kernels::cuda {
namespace {
[[noreturn]] void refuse(const char* operation) {
  throw ConfigError(ErrorDetail{operation, "device", "cuda",
                                "is not in this build; configure with -DPERSEID_CUDA=ON"});
}
}  // namespace

void activation_forward(const ActivationShape&, DType, const void*, const void*, void*,
                        const Stream&) {
  refuse("activation_forward");
}
void activation_backward(const ActivationShape&, DType, const void*, const void*, const void*,
                         void*, void*, void*, const Stream&) {
  refuse("activation_backward");
}

void combine(const void*, const CombineIndex&, const void*, int64_t, void*, int64_t, int64_t, DType,
             const Stream&) {
  refuse("combine");
}
void combine_backward(const void*, const void*, const CombineIndex&, const void*, int64_t, void*,
                      void*, int64_t, int64_t, DType, const Stream&) {
  refuse("combine_backward");
}

void counting_sort(const int32_t*, int64_t, int64_t, int64_t*, int32_t*, const Stream&) {
  refuse("counting_sort");
}

void permute(const void*, const int32_t*, void*, int64_t, int64_t, const Stream&) {
  refuse("permute");
}
void unpermute(const void*, const int32_t*, void*, int64_t, int64_t, const Stream&) {
  refuse("unpermute");
}
void comet(const CometShape&, const CometOptions&, DType, const CometInput&, const CometOutput&,
           const Stream&) {
  refuse("comet");
}
void comet_backward(const CometShape&, const CometOptions&, DType, const CometInput&,
                    const CometGradInput&, void*, void*, const Stream&) {
  refuse("comet_backward");
}
void doubly_stochastic(const DoublyStochasticShape&, const DoublyStochasticOptions&, DType,
                       const void*, void*, double*, double*, const Stream&) {
  refuse("doubly_stochastic");
}
void doubly_stochastic_backward(const DoublyStochasticShape&, const DoublyStochasticOptions&, DType,
                                const void*, const double*, const double*, const void*, void*,
                                const Stream&) {
  refuse("doubly_stochastic_backward");
}
void dselect_k(const DSelectKShape&, const DSelectKOptions&, DType, const DSelectKInput&,
               const DSelectKOutput&, const Stream&) {
  refuse("dselect_k");
}
void dselect_k_backward(const DSelectKShape&, const DSelectKOptions&, DType, const DSelectKInput&,
                        const DSelectKGradInput&, void*, const Stream&) {
  refuse("dselect_k_backward");
}
void fill_uniform(void*, int64_t, DType, const UniformRange&, RandomKey, const Stream&) {
  refuse("fill_uniform");
}
void fill_normal(void*, int64_t, DType, RandomKey, uint64_t, const Stream&) {
  refuse("fill_normal");
}
void assign(const AssignmentShape&, const double*, const int64_t*, int32_t*, const AssignmentDuals&,
            const Stream&) {
  refuse("assign");
}
void assign_balanced(const AssignmentShape&, DType, const void*, int32_t*, const Stream&) {
  refuse("assign_balanced");
}
AtomCounts select_atoms(const AtomCells&, AtomOrder, const float*, const uint64_t*, const int64_t*,
                        RandomKey, uint64_t*, const Stream&) {
  refuse("select_atoms");
}
int64_t sinkhorn(const SinkhornShape&, const SinkhornOptions&, DType, const void*, double*,
                 const Stream&) {
  refuse("sinkhorn");
}
void statistical_top_k(const StatisticalTopKShape&, const StatisticalTopKOptions&, DType,
                       const void*, const uint8_t*, void*, int64_t*, const Stream&) {
  refuse("statistical_top_k");
}
void statistical_top_k_backward(const StatisticalTopKShape&, const StatisticalTopKOptions&, DType,
                                const void*, const uint8_t*, const void*, const void*, void*,
                                const Stream&) {
  refuse("statistical_top_k_backward");
}

void route(const RouterShape&, const RouterOptions&, DType, const RouterInput&, const RouterOutput&,
           const Stream&) {
  refuse("route");
}
void route_backward(const RouterShape&, const RouterOptions&, DType, const RouterInput&,
                    const RouterGradInput&, void*, const Stream&) {
  refuse("route_backward");
}

void invert_order(const int32_t*, int64_t, int32_t*, const Stream&) { refuse("invert_order"); }
void row_of_sorted(const int32_t*, int64_t, const int32_t*, int64_t, int64_t, int32_t*,
                   const Stream&) {
  refuse("row_of_sorted");
}
void expert_ends(const int64_t*, int64_t, int32_t*, const Stream&) { refuse("expert_ends"); }
void sum_by_expert(const void*, int64_t, int64_t, const int64_t*, int64_t, void*, DType,
                   const Stream&) {
  refuse("sum_by_expert");
}

void hash_buckets(const int64_t*, int64_t, uint64_t, int64_t, int32_t*, const Stream&) {
  refuse("hash_buckets");
}

int64_t ragged_offsets(const RaggedShape&, DType, const void*, int32_t*, const Stream&) {
  refuse("ragged_offsets");
}
void ragged_rows(const RaggedShape&, DType, const void*, const int32_t*, const RaggedOutput&,
                 const Stream&) {
  refuse("ragged_rows");
}
void ragged_to_dense(const RaggedShape&, DType, const int32_t*, const int32_t*, const void*, void*,
                     const Stream&) {
  refuse("ragged_to_dense");
}

void select_k(const void*, int64_t, int64_t, DType, uint8_t*, const Stream&) { refuse("select_k"); }

}  // namespace perseid::kernels::cuda
