// Devices for the emulator: every tensor counts as one on a GPU, so that gates and layers take
// that path, with LibTorch's CPU operations between our kernels.
#include <atomic>

#include "gates/device.h"
#include "tests/device_mode.h"

namespace perseid {
namespace {
std::atomic<bool> is_emulated{true};
}

namespace gates {
kernels::Stream stream_of(const at::Tensor&, const char*) {
  return {is_emulated ? kernels::Device::kCuda : kernels::Device::kCpu, nullptr};
}
bool is_on_device(const at::Tensor& tensor) { return tensor.defined() && is_emulated; }
}  // namespace gates

namespace testing {
std::string no_device_reason() { return {}; }
at::Device test_device() { return at::kCPU; }
void set_emulated(bool is_on) { is_emulated = is_on; }
}  // namespace testing

}  // namespace perseid
