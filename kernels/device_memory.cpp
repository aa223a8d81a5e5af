// kernels/device_memory.h on CUDA. Allocations are those of the device's stream-ordered pool, which
// a CUDA graph can capture; after the first of a size they cost about a microsecond.
#include "kernels/device_memory.h"

#include <cuda_runtime.h>

#include <array>
#include <utility>

#include "kernels/cuda_check.h"
#include "kernels/error.h"

namespace perseid::kernels {
namespace {

cudaStream_t native(const Stream& stream) { return static_cast<cudaStream_t>(stream.handle); }

/// 0 with a reason, or the number of devices.
struct Found {
  int count = 0;
  std::string problem;
};
Found find_devices() {
  Found found;
  const cudaError_t status = cudaGetDeviceCount(&found.count);
  if (status == cudaSuccess && found.count > 0) return found;
  found.count = 0;
  (void)cudaGetLastError();  // it would be reported by the next call otherwise
  if (status == cudaErrorInsufficientDriver) {
    found.problem = "no NVIDIA driver is loaded, or it is older than CUDA 13 needs (580)";
  } else if (status == cudaErrorNoDevice || status == cudaSuccess) {
    found.problem = "no GPU is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES";
  } else {
    found.problem = std::string("CUDA says: ") + cudaGetErrorString(status);
  }
  return found;
}

}  // namespace

void cuda_check(cudaError_t status, const char* operation, const char* call) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  const ErrorDetail detail{operation, call, cudaGetErrorName(status),
                           std::string("is CUDA's answer: ") + cudaGetErrorString(status)};
  switch (status) {
    case cudaErrorMemoryAllocation:
      throw OutOfMemory(detail);
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorNoKernelImageForDevice:
      throw ConfigError(detail);
    default:
      throw InternalError(detail);
  }
}

int device_count() { return find_devices().count; }
std::string device_problem() { return find_devices().problem; }

int current_device() {
  int device = 0;
  cuda_check(cudaGetDevice(&device), "current_device", "cudaGetDevice");
  return device;
}
void set_device(int device) { cuda_check(cudaSetDevice(device), "set_device", "cudaSetDevice"); }
std::string device_bus_id(int device) {
  std::array<char, 32> text{};
  cuda_check(cudaDeviceGetPCIBusId(text.data(), static_cast<int>(text.size()), device),
             "device_bus_id", "cudaDeviceGetPCIBusId");
  return text.data();
}

void copy_bytes(void* target, const void* source, int64_t bytes, const Stream& stream) {
  if (bytes == 0) return;
  cuda_check(cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), cudaMemcpyDefault,
                             native(stream)),
             "copy_bytes", "cudaMemcpyAsync");
}
void fill_zero(void* target, int64_t bytes, const Stream& stream) {
  if (bytes == 0) return;
  cuda_check(cudaMemsetAsync(target, 0, static_cast<size_t>(bytes), native(stream)), "fill_zero",
             "cudaMemsetAsync");
}
void synchronize(const Stream& stream) {
  cuda_check(cudaStreamSynchronize(native(stream)), "synchronize", "cudaStreamSynchronize");
}
bool is_done(const Stream& stream) {
  const cudaError_t status = cudaStreamQuery(native(stream));
  if (status == cudaErrorNotReady) return false;
  cuda_check(status, "is_done", "cudaStreamQuery");
  return true;
}

DeviceMemory::DeviceMemory(int64_t bytes, const Stream& stream) : bytes_(bytes), stream_(stream) {
  if (bytes == 0) return;
  cuda_check(cudaMallocAsync(&data_, static_cast<size_t>(bytes), native(stream)), "device_memory",
             "cudaMallocAsync");
}
DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) (void)cudaFreeAsync(data_, native(stream_));
}
DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      stream_(other.stream_) {}
DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(stream_, other.stream_);
  return *this;
}

PinnedMemory::PinnedMemory(int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  cuda_check(cudaMallocHost(&data_, static_cast<size_t>(bytes)), "pinned_memory", "cudaMallocHost");
}
PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) (void)cudaFreeHost(data_);
}
PinnedMemory::PinnedMemory(PinnedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

OwnedStream::OwnedStream() {
  cudaStream_t handle = nullptr;
  cuda_check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "owned_stream",
             "cudaStreamCreateWithFlags");
  stream_ = {Device::kCuda, handle};
}
OwnedStream::~OwnedStream() { (void)cudaStreamDestroy(native(stream_)); }

DeviceEvent::DeviceEvent() {
  cudaEvent_t event = nullptr;
  cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "device_event",
             "cudaEventCreateWithFlags");
  handle_ = event;
}
DeviceEvent::~DeviceEvent() { (void)cudaEventDestroy(static_cast<cudaEvent_t>(handle_)); }
void DeviceEvent::record(const Stream& stream) {
  cuda_check(cudaEventRecord(static_cast<cudaEvent_t>(handle_), native(stream)), "device_event",
             "cudaEventRecord");
}
void DeviceEvent::make_wait(const Stream& stream) const {
  cuda_check(cudaStreamWaitEvent(native(stream), static_cast<cudaEvent_t>(handle_), 0),
             "device_event", "cudaStreamWaitEvent");
}
bool DeviceEvent::is_done() const {
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(handle_));
  if (status == cudaErrorNotReady) return false;
  cuda_check(status, "device_event", "cudaEventQuery");
  return true;
}

}  // namespace perseid::kernels
