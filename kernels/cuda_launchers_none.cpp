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
void fill_uniform(void*, int64_t, DType, const UniformRange&, RandomKey, const Stream&) {
  refuse("fill_uniform");
}
void fill_normal(void*, int64_t, DType, RandomKey, uint64_t, const Stream&) {
  refuse("fill_normal");
}

}  // namespace perseid::kernels::cuda
