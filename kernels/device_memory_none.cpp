// kernels/device_memory.h in a build without CUDA.
#include <utility>

#include "kernels/device_memory.h"
#include "kernels/error.h"

namespace perseid::kernels {
namespace {
[[noreturn]] void refuse(const char* operation) {
  throw ConfigError(ErrorDetail{operation, "device", "cuda",
                                "is not in this build; configure with -DPERSEID_CUDA=ON"});
}
}  // namespace

int device_count() { return 0; }
std::string device_problem() { return "this build has no CUDA part (-DPERSEID_CUDA=ON adds it)"; }
int current_device() { refuse("current_device"); }
void set_device(int) { refuse("set_device"); }
std::string device_bus_id(int) { refuse("device_bus_id"); }

void copy_bytes(void*, const void*, int64_t, const Stream&) { refuse("copy_bytes"); }
void fill_zero(void*, int64_t, const Stream&) { refuse("fill_zero"); }
void synchronize(const Stream&) { refuse("synchronize"); }
bool is_done(const Stream&) { refuse("is_done"); }

DeviceMemory::DeviceMemory(int64_t, const Stream&) { refuse("device_memory"); }
DeviceMemory::~DeviceMemory() = default;
DeviceMemory::DeviceMemory(DeviceMemory&&) noexcept = default;
DeviceMemory& DeviceMemory::operator=(DeviceMemory&&) noexcept = default;
PinnedMemory::PinnedMemory(int64_t) { refuse("pinned_memory"); }
PinnedMemory::~PinnedMemory() = default;
PinnedMemory::PinnedMemory(PinnedMemory&&) noexcept = default;
PinnedMemory& PinnedMemory::operator=(PinnedMemory&&) noexcept = default;
OwnedStream::OwnedStream() { refuse("owned_stream"); }
OwnedStream::~OwnedStream() = default;
DeviceEvent::DeviceEvent() { refuse("device_event"); }
DeviceEvent::~DeviceEvent() = default;
void DeviceEvent::record(const Stream&) { refuse("device_event"); }
void DeviceEvent::make_wait(const Stream&) const { refuse("device_event"); }
bool DeviceEvent::is_done() const { refuse("device_event"); }

}  // namespace perseid::kernels
