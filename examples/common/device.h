#pragma once
#include <string>

#include "comm/group.h"
#include "kernels/stream.h"

namespace perseid::examples {

/// What --device asks for: auto is cuda if this process sees a GPU, else cpu. Throws ConfigError of
/// `operation` for cuda without a GPU, with the reason.
kernels::Device find_device(const std::string& word, const char* operation);

/// Makes this rank's GPU the current device of the calling thread, unless the group has done so
/// (nccl): that of its local rank. Threads as ranks share device 0. Nothing to do on the CPU.
/// @param launcher  --launcher
void use_device(kernels::Device device, const comm::Group& world, const std::string& launcher);

/// "cpu" or "cuda 0 (0000:17:00.0)": the current device of the calling thread.
std::string device_text(kernels::Device device);

}  // namespace perseid::examples
