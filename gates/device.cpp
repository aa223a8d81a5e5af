#include "gates/device.h"

#include <ATen/ops/empty.h>

#include <utility>

#include "kernels/device_memory.h"

namespace perseid::gates {

std::vector<at::Tensor> to_host(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  kernels::Stream stream;
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined() || tensor.is_cpu()) {
      result.push_back(tensor);
      continue;
    }
    stream = stream_of(tensor, "to_host");
    const at::Tensor copy =
        at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(true));
    copy.copy_(tensor, /*non_blocking=*/true);
    result.push_back(copy);
  }
  if (stream.device != kernels::Device::kCpu) kernels::synchronize(stream);
  return result;
}

}  // namespace perseid::gates
