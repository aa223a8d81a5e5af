// kernels/device_memory.h with streams that lag behind: each is a thread that does what was queued
// on it after a pause, and events are real. What is not ordered by a stream or an event comes out
// wrong here, as it would on a GPU; ThreadSanitizer reports it, too.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "kernels/device_memory.h"

namespace perseid::kernels {
namespace {

class Worker {
 public:
  Worker() : thread_([this] { work(); }) {}
  ~Worker() {
    push({});
    thread_.join();
  }
  void push(std::function<void()> task) {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    changed_.notify_all();
  }
  bool is_idle() {
    const std::lock_guard lock(mutex_);
    return tasks_.empty();
  }
  void drain() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return tasks_.empty(); });
  }

 private:
  void work() {
    while (true) {
      std::function<void()> task;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return !tasks_.empty(); });
        task = tasks_.front();
      }
      if (!task) return;
      std::this_thread::sleep_for(std::chrono::microseconds(200 + 300 * (++num_done_ % 3)));
      task();
      const std::lock_guard lock(mutex_);
      tasks_.pop_front();
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;  // the first one is under way
  int num_done_ = 0;
  std::thread thread_;
};

Worker& worker(const Stream& stream) { return *static_cast<Worker*>(stream.handle); }

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  int64_t recorded = 0;
  int64_t passed = 0;
};
using SharedEvent = std::shared_ptr<Event>;

}  // namespace

int device_count() { return 1; }
std::string device_problem() { return {}; }
int current_device() { return 0; }
void set_device(int) {}
std::string device_bus_id(int) { return "0000:00:00.0"; }

void copy_bytes(void* target, const void* source, int64_t bytes, const Stream& stream) {
  if (bytes == 0) return;
  worker(stream).push([=] { std::memcpy(target, source, static_cast<size_t>(bytes)); });
}
void fill_zero(void* target, int64_t bytes, const Stream& stream) {
  if (bytes == 0) return;
  worker(stream).push([=] { std::memset(target, 0, static_cast<size_t>(bytes)); });
}
void synchronize(const Stream& stream) { worker(stream).drain(); }
bool is_done(const Stream& stream) { return worker(stream).is_idle(); }

DeviceMemory::DeviceMemory(int64_t bytes, const Stream& stream) : bytes_(bytes), stream_(stream) {
  if (bytes > 0) data_ = std::malloc(static_cast<size_t>(bytes));
}
DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) worker(stream_).push([data = data_] { std::free(data); });
}
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
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

OwnedStream::OwnedStream() : stream_{Device::kCuda, new Worker} {}
OwnedStream::~OwnedStream() { delete &worker(stream_); }

DeviceEvent::DeviceEvent() : handle_(new SharedEvent(std::make_shared<Event>())) {}
DeviceEvent::~DeviceEvent() { delete static_cast<SharedEvent*>(handle_); }
void DeviceEvent::record(const Stream& stream) {
  const SharedEvent event = *static_cast<SharedEvent*>(handle_);
  const std::lock_guard lock(event->mutex);
  const int64_t number = ++event->recorded;
  worker(stream).push([event, number] {
    const std::lock_guard inner(event->mutex);
    event->passed = number;
    event->changed.notify_all();
  });
}
void DeviceEvent::make_wait(const Stream& stream) const {
  const SharedEvent event = *static_cast<SharedEvent*>(handle_);
  const std::lock_guard lock(event->mutex);
  worker(stream).push([event, number = event->recorded] {
    std::unique_lock inner(event->mutex);
    event->changed.wait(inner, [&] { return event->passed >= number; });
  });
}
bool DeviceEvent::is_done() const {
  const SharedEvent event = *static_cast<SharedEvent*>(handle_);
  const std::lock_guard lock(event->mutex);
  return event->passed >= event->recorded;
}

}  // namespace perseid::kernels
