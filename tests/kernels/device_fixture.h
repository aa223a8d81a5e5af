#pragma once
#include <optional>

#include "kernels/device_memory.h"
#include "tests/kernels/kernels_test.h"

// Tests of kernels on a device: the GPU or, linked with tests/cuda_emulator, the emulator. They
// compare with the CPU twins, which have tests of their own.

namespace perseid::kernels::testing {

class DeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (device_count() == 0) GTEST_SKIP() << "needs a GPU: " << device_problem();
    stream_.emplace();
  }
  const Stream& stream() const { return stream_->get(); }

 private:
  std::optional<OwnedStream> stream_;
};

/// An array on the device, with a guard behind it that nobody may write.
template <typename T>
class DeviceArray {
 public:
  DeviceArray(const std::vector<T>& values, const Stream& stream)
      : count_(values.size()),
        memory_(static_cast<int64_t>(count_ * sizeof(T)) + kGuardBytes, stream),
        stream_(stream) {
    const std::vector<uint8_t> guard(kGuardBytes, kGuard);
    copy_bytes(data(), values.data(), static_cast<int64_t>(count_ * sizeof(T)), stream_);
    copy_bytes(data() + count_, guard.data(), kGuardBytes, stream_);
    synchronize(stream_);
  }
  T* data() { return memory_.as<T>(); }
  /// What the array holds once the stream has done its work.
  std::vector<T> read() {
    std::vector<T> values(count_);
    std::vector<uint8_t> guard(kGuardBytes);
    copy_bytes(values.data(), data(), static_cast<int64_t>(count_ * sizeof(T)), stream_);
    copy_bytes(guard.data(), data() + count_, kGuardBytes, stream_);
    synchronize(stream_);
    EXPECT_EQ(guard, std::vector<uint8_t>(kGuardBytes, kGuard)) << "written past the end";
    return values;
  }

 private:
  static constexpr int64_t kGuardBytes = 64;
  static constexpr uint8_t kGuard = 0xA5;
  size_t count_;
  DeviceMemory memory_;
  Stream stream_;
};

}  // namespace perseid::kernels::testing
