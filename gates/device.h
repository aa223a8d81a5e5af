#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "kernels/stream.h"

// Where tensors are, and what it costs to look at them: for gates and experts that read data.

namespace perseid::gates {

/// Where operations on this tensor run: the host, or LibTorch's current stream of the tensor's GPU.
/// Throws ConfigError that names `operation` for devices without kernels.
kernels::Stream stream_of(const at::Tensor& tensor, const char* operation);

/// Do operations on this tensor run on a GPU? False for an undefined one.
bool is_on_device(const at::Tensor& tensor);

/// The same tensors in host memory; undefined ones stay undefined. All copies are queued, then the
/// host waits once, unless nothing is on a device. Where a layer of a top-k gate waits, it waits
/// here.
std::vector<at::Tensor> to_host(const std::vector<at::Tensor>& tensors);

}  // namespace perseid::gates
