#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace perseid::gates {

/// Runs a cast of a module, after which these buffers have their type and bits again, on the device
/// of the cast: state that moves in small steps would be lost in bfloat16.
template <typename Cast>
void keep_types(std::vector<at::Tensor> buffers, Cast&& cast) {
  std::vector<at::Tensor> kept;
  for (const at::Tensor& buffer : buffers) {
    kept.push_back(buffer.defined() ? buffer.detach() : at::Tensor());
  }
  cast();
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (buffers[i].defined()) buffers[i].set_data(kept[i].to(buffers[i].device()));
  }
}

}  // namespace perseid::gates
