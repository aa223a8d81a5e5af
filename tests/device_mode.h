#pragma once
#include <ATen/core/Tensor.h>

#include <string>

// Where tests of layers on a device run: on a GPU (tests/gpu_mode.cpp), or on the CPU with our
// kernels run by the emulator (tests/cuda_emulator/stream.cpp).

namespace perseid::testing {

/// Why there is no device here; empty if there is one.
std::string no_device_reason();

/// Where tensors of the device side go.
at::Device test_device();

/// Shall operations on CPU tensors take the path of a GPU? Only the emulator can; it does so from
/// the start.
void set_emulated(bool is_on);

/// Runs on the host's path while it lives.
class OnHost {
 public:
  OnHost() { set_emulated(false); }
  ~OnHost() { set_emulated(true); }
  OnHost(const OnHost&) = delete;
  OnHost& operator=(const OnHost&) = delete;
};

}  // namespace perseid::testing
