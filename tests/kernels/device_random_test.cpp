// fill_uniform and fill_normal on a device against the CPU; every cell held NaN before.
//   Uniform  bit for bit: all types, ranges whose sums round, 0, 1 and more elements than a block
//   Normal   to a few units in the last place of the type; even and odd first numbers, and parts of
//            a stream are equal to the whole
#include "kernels/random.h"
#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

class DeviceRandom : public DeviceTest {
 protected:
  template <typename T>
  std::vector<T> normal(int64_t count, uint64_t first) {
    DeviceArray<T> out(nans<T>(count), stream());
    fill_normal(out.data(), count, DTypeOf<T>::value, key_, first, stream());
    return out.read();
  }
  template <typename T>
  void compare_uniform(int64_t count, double low, double high) {
    DeviceArray<T> out(nans<T>(count), stream());
    fill_uniform(out.data(), count, DTypeOf<T>::value, low, high, key_, stream());
    std::vector<T> expected = nans<T>(count);
    fill_uniform(expected.data(), count, DTypeOf<T>::value, low, high, key_);
    ASSERT_TRUE(same_bits(out.read(), expected)) << count << " " << low << " " << high;
  }
  template <typename T>
  void compare_normal(int64_t count, uint64_t first) {
    std::vector<T> expected = nans<T>(count);
    fill_normal(expected.data(), count, DTypeOf<T>::value, key_, first);
    const std::vector<T> actual = normal<T>(count, first);
    // The double differs by 4 units at most, the type it is rounded to by one.
    const double unit = std::is_same_v<T, double>  ? 0x1p-50
                        : std::is_same_v<T, float> ? 0x1p-23
                                                   : 0x1p-7;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double a = load(&actual[i]), e = load(&expected[i]);
      ASSERT_LE(std::abs(a - e), unit * std::abs(e)) << count << " " << first << " [" << i << "]";
    }
  }

  RandomKey key_ = random_key(9).with(4);
};

TEST_F(DeviceRandom, Uniform) {
  for (const int64_t count : {0, 1, 255, 256, 257, 3001}) {
    for (const double high : {1.0, 0.3, 1e-30}) {
      compare_uniform<float>(count, -high / 3, high);
      compare_uniform<double>(count, -high / 3, high);
      compare_uniform<BFloat16>(count, -high / 3, high);
      compare_uniform<Float16>(count, -high / 3, high);
    }
  }
}

TEST_F(DeviceRandom, Normal) {
  for (const int64_t count : {0, 1, 2, 3, 511, 512, 513, 1501}) {
    for (const uint64_t first : {uint64_t{0}, uint64_t{1}, uint64_t{6}, ~uint64_t{0} - 700}) {
      compare_normal<float>(count, first);
      compare_normal<double>(count, first);
      compare_normal<BFloat16>(count, first);
      compare_normal<Float16>(count, first);
    }
  }
  const std::vector<double> whole = normal<double>(100, 0), part = normal<double>(60, 37);
  for (size_t i = 0; i < part.size(); ++i) ASSERT_EQ(part[i], whole[37 + i]) << i;
}

}  // namespace
}  // namespace perseid::kernels::testing
