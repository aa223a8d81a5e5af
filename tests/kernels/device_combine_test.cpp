// combine and combine_backward on a device; outputs were NaN before.
//   EqualsTwin       fixed and ragged entries, 1 to 3 gates, all dtypes, widths that fit 16-byte
//                    accesses and widths that do not, to a few roundings
//   Exact            small integers and powers of two: the same bits as the twin
//   OneGradient      either output of the backward null; null weights and a null row_of
//   Unaligned        rows that begin at an odd element
#include "kernels/combine.h"

#include <numeric>

#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

/// Small integers are exact in every dtype, and so are their sums with weights 1, 2 and 1/2.
template <typename T>
std::vector<T> integers(int64_t count, int64_t modulus) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(make<T>(double(i * 37 % modulus - 3)));
  return values;
}

template <typename T>
class DeviceCombine : public DeviceTest {
 protected:
  using A = Accumulate<T>;
  static constexpr DType kDType = DTypeOf<T>::value;
  struct Case {
    int64_t num_out = 0, fixed = 0, num_gates = 1, width = 0;
    bool is_exact = false, has_row_of = true, has_weights = true, wants_rows = true,
         wants_weights = true;
    int64_t shift = 0;  ///< elements before the first row
  };
  static std::string name_of(const Case& at) {
    return to_text(at.num_out) + " outputs of " + to_text(at.fixed) + ", gates " +
           to_text(at.num_gates) + ", width " + to_text(at.width);
  }
  /// fixed < 0: output n has 3n % 7 entries.
  void compare(const Case& at) {
    std::vector<int32_t> offsets = {0};
    for (int64_t n = 0; n < at.num_out; ++n) {
      offsets.push_back(offsets.back() + static_cast<int32_t>(at.fixed < 0 ? n * 3 % 7 : at.fixed));
    }
    const int64_t entries = offsets.back(), outputs = at.num_out * at.num_gates * at.width;
    std::vector<int32_t> row_of(static_cast<size_t>(entries));
    std::iota(row_of.begin(), row_of.end(), 0);
    std::shuffle(row_of.begin(), row_of.end(), std::mt19937(7));
    const int64_t elements = at.shift + entries * at.width;
    const auto rows = at.is_exact ? integers<T>(elements, 9) : normal_values<T>(elements, 1);
    const auto grad_out =
        at.is_exact ? integers<T>(outputs, 7) : normal_values<T>(outputs + at.shift, 3);
    auto weights = normal_values<A>(entries * at.num_gates, 2);
    for (size_t i = 0; at.is_exact && i < weights.size(); ++i) weights[i] = A(1) / A(1 << i % 3);

    DeviceArray<int32_t> d_offsets(offsets, this->stream()), d_row_of(row_of, this->stream());
    DeviceArray<T> d_rows(rows, this->stream()), d_grad(grad_out, this->stream());
    DeviceArray<A> d_weights(weights, this->stream());
    const auto index = [&](const int32_t* first, const int32_t* second) {
      return CombineIndex{at.fixed < 0 ? first : nullptr, std::max<int64_t>(at.fixed, 0),
                          at.has_row_of ? second : nullptr};
    };
    const CombineIndex on_host = index(offsets.data(), row_of.data());
    const CombineIndex on_device = index(d_offsets.data(), d_row_of.data());
    const A* const weight = at.has_weights ? weights.data() : nullptr;
    const A* const d_weight = at.has_weights ? d_weights.data() : nullptr;

    std::vector<T> out = nans<T>(outputs + at.shift);
    DeviceArray<T> d_out(out, this->stream());
    combine(rows.data() + at.shift, on_host, weight, at.num_gates, out.data() + at.shift,
            at.num_out, at.width, kDType);
    combine(d_rows.data() + at.shift, on_device, d_weight, at.num_gates, d_out.data() + at.shift,
            at.num_out, at.width, kDType, this->stream());
    check(d_out.read(), out, at.is_exact, tolerance<T>(), name_of(at));

    std::vector<T> grad_rows = nans<T>(elements);
    std::vector<A> grad_weights = nans<A>(entries * at.num_gates);
    DeviceArray<T> d_grad_rows(grad_rows, this->stream());
    DeviceArray<A> d_grad_weights(grad_weights, this->stream());
    const int64_t grad_shift = at.is_exact ? 0 : at.shift;
    combine_backward(
        grad_out.data() + grad_shift, at.wants_weights ? rows.data() + at.shift : nullptr, on_host,
        weight, at.num_gates, at.wants_rows ? grad_rows.data() + at.shift : nullptr,
        at.wants_weights ? grad_weights.data() : nullptr, at.num_out, at.width, kDType);
    combine_backward(d_grad.data() + grad_shift,
                     at.wants_weights ? d_rows.data() + at.shift : nullptr, on_device, d_weight,
                     at.num_gates, at.wants_rows ? d_grad_rows.data() + at.shift : nullptr,
                     at.wants_weights ? d_grad_weights.data() : nullptr, at.num_out, at.width,
                     kDType, this->stream());
    check(d_grad_rows.read(), grad_rows, at.is_exact, tolerance<T>(), name_of(at) + " grad_rows");
    check(d_grad_weights.read(), grad_weights, at.is_exact, tolerance<A>() * 10,
          name_of(at) + " grad_weights");
  }

 private:
  template <typename U>
  static void check(const std::vector<U>& actual, const std::vector<U>& expected, bool is_exact,
                    double relative, const std::string& what) {
    if (is_exact) {
      EXPECT_TRUE(same_bits(actual, expected)) << what;
    } else {
      expect_close(actual, expected, relative, what);
    }
  }
};
using Types = ::testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(DeviceCombine, Types);

TYPED_TEST(DeviceCombine, EqualsTwin) {
  for (const int64_t num_out : {0, 1, 9}) {
    for (const int64_t fixed : {-1, 0, 1, 6}) {
      for (const int64_t num_gates : {1, 3}) {
        for (const int64_t width : {0, 1, 17, 40, 264, 1040}) {
          this->compare({num_out, fixed, num_gates, width});
        }
      }
    }
  }
}

TYPED_TEST(DeviceCombine, Exact) {
  for (const int64_t fixed : {-1, 1, 4, 5}) {
    for (const int64_t num_gates : {1, 2}) {
      for (const int64_t width : {1, 8, 31, 72}) {
        this->compare({13, fixed, num_gates, width, true});
      }
    }
  }
}

TYPED_TEST(DeviceCombine, OneGradient) {
  for (const int64_t num_gates : {1, 2}) {
    this->compare({7, -1, num_gates, 48, false, true, true, true, false});
    this->compare({7, -1, num_gates, 48, false, true, true, false, true});
    this->compare({7, 2, num_gates, 33, false, false, true, true, true});
  }
  this->compare({7, 3, 1, 48, false, false, false});
  this->compare({7, -1, 1, 19, false, true, false});
}

TYPED_TEST(DeviceCombine, Unaligned) {
  for (const int64_t width : {1, 8, 16, 129}) {
    this->compare({9, -1, 1, width, false, true, true, true, true, 1});
    this->compare({9, 3, 2, width, false, true, true, true, true, 1});
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
