// stream_of in a build with CUDA.
#include <c10/cuda/CUDAStream.h>

#include "gates/device.h"
#include "kernels/error.h"

namespace perseid::gates {

kernels::Stream stream_of(const at::Tensor& tensor, const char* operation) {
  if (tensor.device().is_cpu()) return {};
  require(tensor.device().is_cuda(), operation, "device", tensor.device(),
          "has no kernels; use the CPU or a CUDA device");
  return {kernels::Device::kCuda,
          c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream()};
}

}  // namespace perseid::gates
