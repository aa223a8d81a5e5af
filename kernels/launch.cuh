#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "kernels/checks.h"
#include "kernels/cuda_check.h"
#include "kernels/stream.h"

// What a .cu file of this folder needs of CUDA. tests/cuda_emulator has a file of the same name
// that runs the same kernels on the CPU, one fiber for each thread, so kernels use CUDA through
// this file and kernels/prim.cuh alone, and hold no inline PTX.

namespace perseid::kernels {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xFFFFFFFFu;

inline cudaStream_t native(const Stream& stream) {
  return static_cast<cudaStream_t>(stream.handle);
}

/// Queues kernel(args...) on `blocks` blocks of `threads` threads. 0 blocks: nothing to do, and
/// CUDA would call it an error. At most 2^31 - 1 blocks.
template <typename... Parameters, typename... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), int64_t blocks, int threads,
            const Stream& stream, Arguments... arguments) {
  if (blocks == 0) return;
  require(blocks <= std::numeric_limits<int32_t>::max(), operation, "blocks", blocks,
          "exceed 2147483647, the largest grid");
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, native(stream)>>>(
      static_cast<Parameters>(arguments)...);
  cuda_check(cudaGetLastError(), operation, "launch");
}

}  // namespace perseid::kernels
