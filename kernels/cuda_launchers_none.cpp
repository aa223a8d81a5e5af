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

}  // namespace perseid::kernels::cuda
