// kernels/device_memory.h for the emulator: one device whose memory is the host's and whose streams
// have always done their work.
#include "kernels/device_memory.h"

#include <cstdlib>
#include <cstring>
#include <utility>

namespace perseid::kernels {

int device_count() { return 1; }
std::string device_problem() { return {}; }
int current_device() { return 0; }
void set_device(int) {}
std::string device_bus_id(int) { return "0000:00:00.0"; }

void copy_bytes(void* target, const void* source, int64_t bytes, const Stream&) {
  if (bytes > 0) std::memcpy(target, source, static_cast<size_t>(bytes));
}
void fill_zero(void* target, int64_t bytes, const Stream&) {
  if (bytes > 0) std::memset(target, 0, static_cast<size_t>(bytes));
}
void synchronize(const Stream&) {}
bool is_done(const Stream&) { return true; }

DeviceMemory::DeviceMemory(int64_t bytes, const Stream& stream) : bytes_(bytes), stream_(stream) {
  // What is fresh on a GPU may hold anything: not zeros, so that nobody counts on them.
  if (bytes > 0)
    data_ = std::memset(std::malloc(static_cast<size_t>(bytes)), 0xEE, static_cast<size_t>(bytes));
}
DeviceMemory::~DeviceMemory() { std::free(data_); }
DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_), stream_(other.stream_) {}
DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(stream_, other.stream_);
  return *this;
}

PinnedMemory::PinnedMemory(int64_t bytes) : bytes_(bytes) {
  if (bytes > 0) data_ = std::malloc(static_cast<size_t>(bytes));
}
PinnedMemory::~PinnedMemory() { std::free(data_); }
PinnedMemory::PinnedMemory(PinnedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

OwnedStream::OwnedStream() { stream_.device = Device::kCuda; }
OwnedStream::~OwnedStream() = default;
DeviceEvent::DeviceEvent() = default;
DeviceEvent::~DeviceEvent() = default;
void DeviceEvent::record(const Stream&) {}
void DeviceEvent::make_wait(const Stream&) const {}
bool DeviceEvent::is_done() const { return true; }

}  // namespace perseid::kernels
