#pragma once
#include <cstdint>
#include <string>

#include "kernels/stream.h"

// Memory, streams and events of GPUs for callers that know no CUDA header (comm, tests, bench). A
// build without CUDA has 0 devices, and everything else here throws ConfigError.

namespace perseid::kernels {

/// GPUs that this process can use; 0 without a driver, without a GPU or in a build without CUDA.
int device_count();
/// Why device_count() is 0, as a sentence for errors and skipped tests; empty if it is not.
std::string device_problem();
/// The calling thread's device, in [0, device_count()).
int current_device();
void set_device(int device);
/// PCI bus id of a device, which no other device of its host has: "0000:17:00.0".
std::string device_bus_id(int device);

/// Copies `bytes` bytes between any two of host and device memory, queued on the stream. Host
/// memory that is not pinned makes the host wait.
void copy_bytes(void* target, const void* source, int64_t bytes, const Stream& stream);
void fill_zero(void* target, int64_t bytes, const Stream& stream);
/// The host waits until the stream has done what was queued on it.
void synchronize(const Stream& stream);
/// Has the stream done all that was queued on it? Does not wait; throws what went wrong on the way.
bool is_done(const Stream& stream);

/// Device memory that lives on a stream: allocated and freed in its order, so that it may be
/// dropped while work that uses it is still queued.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(int64_t bytes, const Stream& stream);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  Stream stream_;
};

/// Page-locked host memory: copies to and from it are queued without making the host wait.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  explicit PinnedMemory(int64_t bytes);
  ~PinnedMemory();
  PinnedMemory(PinnedMemory&& other) noexcept;
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

/// A stream of its own on the current device.
class OwnedStream {
 public:
  OwnedStream();
  ~OwnedStream();
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;
  const Stream& get() const { return stream_; }

 private:
  Stream stream_;
};

/// A point in the work of a stream that other streams and the host can wait for.
class DeviceEvent {
 public:
  DeviceEvent();
  ~DeviceEvent();
  DeviceEvent(const DeviceEvent&) = delete;
  DeviceEvent& operator=(const DeviceEvent&) = delete;
  void record(const Stream& stream);
  /// What is queued on `stream` from now on runs after the recorded point. The host does not wait.
  void make_wait(const Stream& stream) const;
  bool is_done() const;  ///< does not wait

 private:
  void* handle_ = nullptr;
};

}  // namespace perseid::kernels
