// Devices in a build with CUDA.
#include <c10/cuda/CUDAStream.h>

#include "gates/device.h"
#include "kernels/error.h"

namespace perseid::gates {

kernels::Stream stream_of(const at::Tensor& tensor, const char* operation) {
  if (tensor.device().is_cpu()) return {};
  require(tensor.device().is_cuda(), operation, "device", tensor.device(),
          "has no kernels; use CPU or CUDA tensors");
  return {kernels::Device::kCuda,
          c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream()};
}

bool is_on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().is_cuda();
}

}  // namespace perseid::gates
