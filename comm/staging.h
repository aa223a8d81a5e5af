#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/device_memory.h"

namespace perseid::comm {

/// Page-locked host memory between a device and a transport of host memory; kept between calls.
class Staging {
 public:
  /// Makes room. Throws OutOfMemory. No copy from or to it may be under way.
  void reserve(int64_t send_bytes, int64_t recv_bytes);
  std::byte* send() const { return static_cast<std::byte*>(send_.data()); }
  std::byte* recv() const { return static_cast<std::byte*>(recv_.data()); }

 private:
  kernels::PinnedMemory send_;
  kernels::PinnedMemory recv_;
};

}  // namespace perseid::comm
