#include "examples/bench/place.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <algorithm>
#include <cmath>

#include "examples/bench/timing.h"
#include "gates/device.h"
#include "kernels/device_memory.h"
#include "moe/threads.h"

namespace perseid::bench {
namespace {

constexpr double kTimingMs = 5;  // of the calls of one timing on a GPU, about
constexpr int64_t kMaxCalls = 1000;

at::Device tensors_of(kernels::Device device) {
  if (device == kernels::Device::kCpu) return at::kCPU;
  return {at::kCUDA, static_cast<at::DeviceIndex>(kernels::current_device())};
}

/// How many calls take kTimingMs, after those that warm up.
int64_t calls_for_timing(const Place& place, const std::function<void()>& run) {
  constexpr int kProbes = 3;
  run();
  place.finish();
  const double start = now_ms();
  for (int i = 0; i < kProbes; ++i) run();
  place.finish();
  const double calls = std::ceil(kTimingMs * kProbes / std::max(now_ms() - start, 1e-3));
  return std::min(static_cast<int64_t>(calls), kMaxCalls);
}

}  // namespace

void use_threads(int threads) {
  at::set_num_threads(threads);
  use_libtorch_threads();
}

Place::Place(kernels::Device device) : tensors_(tensors_of(device)) {
  if (device == kernels::Device::kCpu) return;
  stream_ = gates::stream_of(at::empty({0}, at::TensorOptions().device(tensors_)), "perseid-bench");
}

void Place::finish() const {
  if (is_gpu()) kernels::synchronize(stream_);
}

void Place::release_memory() const {
  if (is_gpu()) c10::getDeviceAllocator(tensors_.type())->emptyCache();
}

std::vector<std::vector<double>> time_calls(const Place& place,
                                            const std::vector<std::function<void()>>& contenders,
                                            int64_t warmup_rounds, int64_t rounds) {
  if (!place.is_gpu()) return time_in_turns(contenders, warmup_rounds, rounds);
  std::vector<int64_t> calls;
  std::vector<std::function<void()>> timings;
  for (const auto& run : contenders) {
    const int64_t count = calls_for_timing(place, run);
    calls.push_back(count);
    timings.emplace_back([&place, &run, count] {
      for (int64_t i = 0; i < count; ++i) run();
      place.finish();
    });
  }
  std::vector<std::vector<double>> ms = time_in_turns(timings, warmup_rounds, rounds);
  for (size_t i = 0; i < ms.size(); ++i) {
    for (double& value : ms[i]) value /= static_cast<double>(calls[i]);
  }
  return ms;
}

}  // namespace perseid::bench
