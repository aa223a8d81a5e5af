// Devices in a build without CUDA.
#include "gates/device.h"
#include "kernels/error.h"

namespace perseid::gates {

kernels::Stream stream_of(const at::Tensor& tensor, const char* operation) {
  if (!tensor.device().is_cpu()) {
    require(
        false, operation, "device", tensor.device(),
        tensor.device().is_cuda()
            ? "has no kernels in this build; configure with -DPERSEID_CUDA=ON, or use CPU tensors"
            : "has no kernels; use CPU tensors");
  }
  return {};
}

bool is_on_device(const at::Tensor&) { return false; }

}  // namespace perseid::gates
