// Error texts and codes, dtype names, and the refusal of a device that this build lacks.
//   Text         [operation] argument=value limit (rank r, layer l, step s); unknown parts left out
//   Refusals     each operation on Device::kCuda: its own name and the option to set
#include "kernels/activation.h"
#include "kernels/combine.h"
#include "kernels/device_memory.h"
#include "kernels/hash.h"
#include "kernels/permute.h"
#include "kernels/plan.h"
#include "kernels/ragged.h"
#include "kernels/router.h"
#include "kernels/select.h"
#include "kernels/sort.h"
#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

TEST(Error, TextOfAllFields) {
  const ConfigError all(ErrorDetail{"dispatch", "rows", "7", "exceeds 6", 2, -1, 3, 41});
  EXPECT_STREQ(all.what(), "[dispatch] rows=7 exceeds 6 (rank 2, layer 3, step 41)");
  EXPECT_EQ(all.detail().argument, "rows");
  EXPECT_EQ(all.exit_code(), 64);
}

TEST(Error, UnknownFieldsAreLeftOut) {
  EXPECT_STREQ(ConfigError(ErrorDetail{"a", "b", "c", "d"}).what(), "[a] b=c d");
  EXPECT_STREQ(ConfigError(ErrorDetail{"a", "", "", "d"}).what(), "[a] d");
  EXPECT_STREQ(ConfigError(ErrorDetail{"a", "b", "", "d"}).what(), "[a] b d");
  EXPECT_STREQ(ConfigError(ErrorDetail{"a", "", "c", "d"}).what(), "[a] c d");
  ErrorDetail detail{"a", "", "", "d"};
  detail.step = 0;
  EXPECT_STREQ(DataError(detail).what(), "[a] d (step 0)");
  detail.rank = 0;
  detail.culprit = 5;
  EXPECT_STREQ(DataError(detail).what(), "[a] d (rank 0, step 0)");
}

TEST(Error, CodesAreThoseOfTheManual) {
  const ErrorDetail detail{"a", "", "", "d"};
  EXPECT_EQ(DataError(detail).exit_code(), 65);
  EXPECT_EQ(InternalError(detail).exit_code(), 70);
  EXPECT_EQ(OutOfMemory(detail).exit_code(), 71);
  EXPECT_EQ(IoError(detail).exit_code(), 74);
  EXPECT_EQ(PeerLost(detail).exit_code(), 75);
  EXPECT_EQ(RanksDisagree(detail).exit_code(), 76);
  EXPECT_EQ(Diverged(detail).exit_code(), 79);
}

TEST(Error, Require) {
  EXPECT_NO_THROW(require(true, "op", "x", 3, "is wrong"));
  EXPECT_EQ(config_error([] { require(false, "op", "x", 3, "is wrong"); }), "[op] x=3 is wrong");
}

TEST(Error, InvariantNamesFileAndLine) {
  try {
    PERSEID_INVARIANT(1 + 1 == 3);
    FAIL() << "no exception";
  } catch (const InternalError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("1 + 1 == 3"), std::string::npos) << text;
    EXPECT_NE(text.find("kernels/error_test.cpp:"), std::string::npos) << text;
    EXPECT_EQ(text.find("/tests/kernels"), std::string::npos) << text;
  }
}

TEST(DType, NamesAndSizes) {
  EXPECT_STREQ(dtype_name(DType::kBytes), "bytes");
  EXPECT_STREQ(dtype_name(DType::kFloat32), "fp32");
  EXPECT_STREQ(dtype_name(DType::kBFloat16), "bf16");
  EXPECT_STREQ(dtype_name(DType::kFloat64), "fp64");
  EXPECT_STREQ(dtype_name(DType::kInt32), "int32");
  EXPECT_STREQ(dtype_name(DType::kInt64), "int64");
  EXPECT_STREQ(dtype_name(DType::kFloat16), "fp16");
  const std::vector<int64_t> bytes = {1, 4, 2, 8, 4, 8, 2};
  for (int i = 0; i < 7; ++i) EXPECT_EQ(dtype_bytes(static_cast<DType>(i)), bytes[i]);
  EXPECT_NE(config_error([] { dtype_bytes(static_cast<DType>(9)); }).find("dtype=9"),
            std::string::npos);
}

TEST(DType, BFloat16RoundsToNearestEven) {
  EXPECT_EQ(to_bfloat16(1.0f).bits, 0x3F80);
  EXPECT_EQ(to_bfloat16(1.0f + 0x1p-8f).bits, 0x3F80);  // a tie, to even
  EXPECT_EQ(to_bfloat16(1.0f + 0x3p-8f).bits, 0x3F82);  // a tie, to even
  EXPECT_EQ(to_bfloat16(1.0f + 0x1p-8f + 0x1p-20f).bits, 0x3F81);
  EXPECT_EQ(to_bfloat16(std::numeric_limits<float>::max()).bits, 0x7F80);
  EXPECT_TRUE(std::isnan(to_float(to_bfloat16(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_TRUE(std::isnan(to_float(to_bfloat16(std::bit_cast<float>(0x7F800001u)))));
}

TEST(DType, Float16IsBinary16) {
  const auto value = [](uint16_t bits) { return to_float(Float16{bits}); };
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const int exponent = half >> 10 & 31, mantissa = half & 0x3FF;
    const double sign = half >= 0x8000 ? -1.0 : 1.0;
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(value(half))) << bits;
      EXPECT_TRUE(std::isnan(value(to_float16(value(half)).bits))) << bits;
      continue;
    }
    const double expected = exponent == 31  ? std::numeric_limits<double>::infinity()
                            : exponent == 0 ? std::ldexp(mantissa, -24)
                                            : std::ldexp(1024 + mantissa, exponent - 25);
    EXPECT_EQ(value(half), sign * expected) << bits;
    EXPECT_EQ(to_float16(value(half)).bits, half);
  }
}

TEST(DType, Float16RoundsToNearestEven) {
  // From each value to the next: around the middle, which goes to the even one.
  for (uint16_t low = 0; low < 0x7C00; ++low) {
    const auto high = static_cast<uint16_t>(low + 1);
    const float below = to_float(Float16{low});
    const float above = high == 0x7C00 ? 65536.0f : to_float(Float16{high});
    const float middle = below + (above - below) / 2;
    for (const float sign : {1.0f, -1.0f}) {
      const uint16_t bit = sign < 0 ? 0x8000 : 0;
      ASSERT_EQ(to_float16(sign * middle).bits, bit | (low % 2 == 0 ? low : high)) << low;
      ASSERT_EQ(to_float16(sign * std::nextafter(middle, 0.0f)).bits, bit | low) << low;
      ASSERT_EQ(to_float16(sign * std::nextafter(middle, 1e9f)).bits, bit | high) << low;
    }
  }
  EXPECT_EQ(to_float16(std::numeric_limits<float>::denorm_min()).bits, 0);
  EXPECT_EQ(to_float16(std::numeric_limits<float>::max()).bits, 0x7C00);
  EXPECT_TRUE(std::isnan(to_float(to_float16(std::bit_cast<float>(0xFF800001u)))));
}

TEST(Refusals, DTypesWithoutArithmetic) {
  EXPECT_EQ(config_error([] { combine(nullptr, {}, nullptr, 1, nullptr, 0, 0, DType::kInt32); }),
            "[combine] dtype=int32 is not supported; choose bf16, fp16, fp32 or fp64");
  EXPECT_EQ(config_error([] { select_k(nullptr, 0, 0, DType::kBFloat16, nullptr); }),
            "[select_k] dtype=bf16 is not supported; choose fp32 or fp64");
}

TEST(Refusals, DeviceOfAnotherBuild) {
  if (device_problem().find("no CUDA part") == std::string::npos) {
    GTEST_SKIP() << "needs a build without CUDA";
  }
  const Stream cuda{Device::kCuda, nullptr};
  int32_t number = 0;
  int64_t offset = 0;
  const auto expected = [](const std::string& operation) {
    return "[" + operation + "] device=cuda is not in this build; configure with -DPERSEID_CUDA=ON";
  };
  const DType fp32 = DType::kFloat32;
  EXPECT_EQ(config_error([&] { permute(&number, nullptr, &number, 1, 4, cuda); }),
            expected("permute"));
  EXPECT_EQ(config_error([&] { unpermute(&number, nullptr, &number, 1, 4, cuda); }),
            expected("unpermute"));
  EXPECT_EQ(config_error([&] { combine(nullptr, {}, nullptr, 1, nullptr, 0, 0, fp32, cuda); }),
            expected("combine"));
  EXPECT_EQ(config_error([&] {
              combine_backward(nullptr, nullptr, {}, nullptr, 1, nullptr, nullptr, 0, 0, fp32,
                               cuda);
            }),
            expected("combine_backward"));
  EXPECT_EQ(config_error([&] { activation_forward({}, fp32, nullptr, nullptr, nullptr, cuda); }),
            expected("activation_forward"));
  EXPECT_EQ(config_error([&] {
              activation_backward({}, fp32, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                  cuda);
            }),
            expected("activation_backward"));
  EXPECT_EQ(config_error([&] { counting_sort(nullptr, 0, 0, &offset, nullptr, cuda); }),
            expected("counting_sort"));
  EXPECT_EQ(config_error([&] { select_k(nullptr, 0, 0, fp32, nullptr, cuda); }),
            expected("select_k"));
  EXPECT_EQ(config_error([&] { hash_buckets(nullptr, 0, 0, 1, nullptr, cuda); }),
            expected("hash_buckets"));
  EXPECT_EQ(config_error([&] {
              ragged_offsets({0, 1}, fp32, nullptr, &number, cuda);
            }),
            expected("ragged_offsets"));
  EXPECT_EQ(config_error([&] {
              ragged_rows({0, 1}, fp32, nullptr, &number, {}, cuda);
            }),
            expected("ragged_rows"));
  EXPECT_EQ(config_error([&] {
              ragged_to_dense({0, 1}, fp32, &number, nullptr, nullptr, nullptr, cuda);
            }),
            expected("ragged_to_dense"));
  EXPECT_EQ(config_error([&] { invert_order(nullptr, 0, nullptr, cuda); }),
            expected("invert_order"));
  EXPECT_EQ(config_error([&] { row_of_sorted(&number, 1, &number, 1, 0, &number, cuda); }),
            expected("row_of_sorted"));
  EXPECT_EQ(config_error([&] { expert_ends(nullptr, 0, nullptr, cuda); }), expected("expert_ends"));
  EXPECT_EQ(config_error([&] { sum_by_expert(nullptr, 0, 1, &offset, 1, &number, fp32, cuda); }),
            expected("sum_by_expert"));
  EXPECT_EQ(config_error([&] { route({0, 1, 1}, {}, fp32, {}, {}, cuda); }), expected("route"));
  EXPECT_EQ(config_error([&] {
              route_backward({0, 1, 1}, {}, fp32, {}, {}, nullptr, cuda);
            }),
            expected("route_backward"));
}

}  // namespace
}  // namespace perseid::kernels::testing
