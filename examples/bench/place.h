#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/stream.h"

namespace perseid::bench {

/// Where a benchmark runs: the host, or LibTorch's current stream of the current GPU.
class Place {
 public:
  explicit Place(kernels::Device device);

  kernels::Device kind() const { return stream_.device; }
  bool is_gpu() const { return stream_.device != kernels::Device::kCpu; }
  const char* name() const { return is_gpu() ? "cuda" : "cpu"; }
  const at::Device& tensors() const { return tensors_; }
  const kernels::Stream& stream() const { return stream_; }
  /// The host waits until everything is done that was queued.
  void finish() const;
  /// Gives memory back that LibTorch keeps for later: our kernels allocate from another pool.
  void release_memory() const;

 private:
  at::Device tensors_;
  kernels::Stream stream_;
};

/// All that is timed on the CPU runs on so many threads, LibTorch's operations and our kernels.
void use_threads(int threads);

/// Milliseconds of one call of each contender in each of `rounds` rounds, as time_in_turns. On a
/// GPU the clock of the host runs around so many calls that they take some milliseconds, until the
/// GPU has done them; caches are not flushed.
std::vector<std::vector<double>> time_calls(const Place& place,
                                            const std::vector<std::function<void()>>& contenders,
                                            int64_t warmup_rounds, int64_t rounds);

}  // namespace perseid::bench
