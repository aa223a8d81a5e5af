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

void counting_sort(const int32_t*, int64_t, int64_t, int64_t*, int32_t*, const Stream&) {
  refuse("counting_sort");
}

void permute(const void*, const int32_t*, void*, int64_t, int64_t, const Stream&) {
  refuse("permute");
}
void unpermute(const void*, const int32_t*, void*, int64_t, int64_t, const Stream&) {
  refuse("unpermute");
}

}  // namespace perseid::kernels::cuda
