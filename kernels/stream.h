#pragma once
#include <cstdint>

namespace perseid::kernels {

enum class Device : uint8_t { kCpu, kCuda };

/// Where an operation of this folder runs. The default is the host: the operation is complete when
/// the call returns. On kCuda the operation is queued on the stream and pointers are device
/// pointers.
struct Stream {
  Device device = Device::kCpu;
  void* handle = nullptr;  ///< cudaStream_t; borrowed
};

/// Throws ConfigError unless the stream is on the host: for operations that have no CUDA kernel.
/// @param way_out  what to do instead, as the end of the error's sentence
void require_device(const Stream& stream, const char* operation,
                    const char* way_out = "give it CPU memory");

}  // namespace perseid::kernels
