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
  const std::vector<int64_t> bytes = {1, 4, 2, 8, 4, 8};
  for (int i = 0; i < 6; ++i) EXPECT_EQ(dtype_bytes(static_cast<DType>(i)), bytes[i]);
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

TEST(Refusals, DTypesWithoutArithmetic) {
  EXPECT_EQ(config_error([] { combine(nullptr, {}, nullptr, 1, nullptr, 0, 0, DType::kInt32); }),
            "[combine] dtype=int32 is not supported; choose bf16, fp32 or fp64");
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
