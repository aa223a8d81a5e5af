// stream_of in a build without CUDA.
#include "gates/device.h"
#include "kernels/error.h"

namespace perseid::gates {

kernels::Stream stream_of(const at::Tensor& tensor, const char* operation) {
  if (!tensor.device().is_cpu()) {
    require(false, operation, "device", tensor.device(),
            "is not in this build; configure with -DPERSEID_CUDA=ON, or use the CPU");
  }
  return {};
}

}  // namespace perseid::gates
