#include "examples/common/device.h"

#include "comm/launcher.h"
#include "kernels/device_memory.h"
#include "kernels/error.h"

namespace perseid::examples {

kernels::Device find_device(const std::string& word, const char* operation) {
  const bool has_gpu = word != "cpu" && kernels::device_count() > 0;
  require(has_gpu || word != "cuda", operation, "device", word,
          "cannot be used: " + kernels::device_problem() + "; or choose --device cpu");
  return has_gpu ? kernels::Device::kCuda : kernels::Device::kCpu;
}

void use_device(kernels::Device device, const comm::Group& world, const std::string& launcher) {
  if (device == kernels::Device::kCpu || std::string(world.backend_name()) == "nccl") return;
  const comm::LaunchInfo launch = comm::detect_launcher(comm::process_environment(), launcher);
  kernels::set_device(comm::device_of(launch, kernels::device_count()));
}

std::string device_text(kernels::Device device) {
  if (device == kernels::Device::kCpu) return "cpu";
  const int number = kernels::current_device();
  return "cuda " + std::to_string(number) + " (" + kernels::device_bus_id(number) + ")";
}

}  // namespace perseid::examples
