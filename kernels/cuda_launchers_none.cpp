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

void route(const RouterShape&, const RouterOptions&, DType, const RouterInput&, const RouterOutput&,
           const Stream&) {
  refuse("route");
}
void route_backward(const RouterShape&, const RouterOptions&, DType, const RouterInput&,
                    const RouterGradInput&, void*, const Stream&) {
  refuse("route_backward");
}

}  // namespace perseid::kernels::cuda
