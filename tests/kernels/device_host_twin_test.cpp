// Operations that the host does for a device: results bit for bit those of the same call on the
// host; every output held NaN or -9 before. Sizes 0, 1 and odd ones, masks, outputs that are null,
// and an error of the host's reaches the caller.
#include "kernels/assignment.h"
#include "kernels/select_atoms.h"
#include "kernels/sinkhorn.h"
#include "kernels/statistical_top_k.h"
#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

class DeviceHostTwin : public DeviceTest {
 protected:
  template <typename T>
  void compare_sinkhorn(int64_t num_tokens, int64_t E) {
    const auto logits = normal_values<T>(num_tokens * E, 1);
    DeviceArray<T> on_device(logits, stream());
    DeviceArray<double> result(nans<double>(E), stream());
    std::vector<double> expected = nans<double>(E);
    const SinkhornShape shape{num_tokens, E};
    EXPECT_EQ(sinkhorn(shape, {}, DTypeOf<T>::value, on_device.data(), result.data(), stream()),
              sinkhorn(shape, {}, DTypeOf<T>::value, logits.data(), expected.data()));
    EXPECT_TRUE(same_bits(result.read(), expected)) << num_tokens << " " << E;
  }

  template <typename T>
  void compare_statistical(int64_t num_tokens, bool has_mask, bool has_count) {
    const int64_t E = 7;
    const StatisticalTopKShape shape{num_tokens, E, 2};
    auto scores = normal_values<T>(num_tokens * E, 2);
    if (num_tokens > 2) scores[2 * E + 1] = std::numeric_limits<T>::quiet_NaN();
    const auto upstream = normal_values<T>(num_tokens * E, 3);
    std::vector<uint8_t> valid;
    for (int64_t t = 0; t < num_tokens; ++t) valid.push_back(t % 4 != 1);
    DeviceArray<T> on_device(scores, stream()), grad(upstream, stream());
    DeviceArray<uint8_t> mask(valid, stream());
    DeviceArray<T> weights(nans<T>(num_tokens * E), stream());
    DeviceArray<T> grad_scores(nans<T>(num_tokens * E), stream());
    DeviceArray<int64_t> count({-9}, stream());
    const uint8_t* const on_host_mask = has_mask ? valid.data() : nullptr;
    const uint8_t* const on_device_mask = has_mask ? mask.data() : nullptr;
    constexpr DType kType = DTypeOf<T>::value;

    statistical_top_k(shape, {}, kType, on_device.data(), on_device_mask, weights.data(),
                      has_count ? count.data() : nullptr, stream());
    auto expected = nans<T>(num_tokens * E), expected_grad = expected;
    int64_t expected_count = -9;
    statistical_top_k(shape, {}, kType, scores.data(), on_host_mask, expected.data(),
                      has_count ? &expected_count : nullptr);
    EXPECT_TRUE(same_bits(weights.read(), expected));
    EXPECT_EQ(count.read()[0], expected_count);

    statistical_top_k_backward(shape, {}, kType, on_device.data(), on_device_mask, weights.data(),
                               grad.data(), grad_scores.data(), stream());
    statistical_top_k_backward(shape, {}, kType, scores.data(), on_host_mask, expected.data(),
                               upstream.data(), expected_grad.data());
    EXPECT_TRUE(same_bits(grad_scores.read(), expected_grad));
  }
};

TEST_F(DeviceHostTwin, Sinkhorn) {
  for (const int64_t num_tokens : {0, 1, 37, 300}) {
    for (const int64_t E : {1, 5, 64}) {
      compare_sinkhorn<float>(num_tokens, E);
      compare_sinkhorn<double>(num_tokens, E);
    }
  }
}

TEST_F(DeviceHostTwin, StatisticalTopK) {
  for (const int64_t num_tokens : {0, 1, 37, 300}) {
    for (const bool has_mask : {false, true}) {
      compare_statistical<float>(num_tokens, has_mask, true);
      compare_statistical<double>(num_tokens, has_mask, !has_mask);
    }
  }
}

TEST_F(DeviceHostTwin, Assign) {
  const AssignmentShape shape{9, 4};
  const auto cost = normal_values<double>(36, 4);
  const std::vector<int64_t> capacity = {3, 1, 3, 5};
  DeviceArray<double> costs(cost, stream()), of_rows(nans<double>(9), stream());
  DeviceArray<double> of_columns(nans<double>(4), stream());
  DeviceArray<int64_t> capacities(capacity, stream());
  std::vector<int32_t> expected(9, -9);
  auto expected_rows = nans<double>(9), expected_columns = nans<double>(4);
  DeviceArray<int32_t> columns(expected, stream());
  assign(shape, costs.data(), capacities.data(), columns.data(),
         {of_rows.data(), of_columns.data()}, stream());
  assign(shape, cost.data(), capacity.data(), expected.data(),
         {expected_rows.data(), expected_columns.data()});
  EXPECT_EQ(columns.read(), expected);
  EXPECT_EQ(of_rows.read(), expected_rows);
  EXPECT_EQ(of_columns.read(), expected_columns);

  DeviceArray<int64_t> none({1, 1, 1, 1}, stream());
  EXPECT_THROW(assign(shape, costs.data(), none.data(), columns.data(), {}, stream()), ConfigError);
  EXPECT_EQ(columns.read(), expected);
  assign({0, 4}, nullptr, capacities.data(), nullptr, {}, stream());
}

TEST_F(DeviceHostTwin, AssignBalanced) {
  for (const int64_t rows : {0, 1, 7, 12}) {
    const AssignmentShape shape{rows, 4};
    const auto scores = normal_values<float>(rows * 4, 5);
    DeviceArray<float> on_device(scores, stream());
    std::vector<int32_t> expected(static_cast<size_t>(rows), -9);
    DeviceArray<int32_t> columns(expected, stream());
    assign_balanced(shape, DType::kFloat32, on_device.data(), columns.data(), stream());
    assign_balanced(shape, DType::kFloat32, scores.data(), expected.data());
    EXPECT_EQ(columns.read(), expected) << rows;
  }
}

TEST_F(DeviceHostTwin, SelectAtoms) {
  for (const AtomCells& cells : std::vector<AtomCells>{{1, 0}, {1, 1}, {5, 37}, {1, 5000}}) {
    const int64_t count = cells.num_atoms();
    auto scores = normal_values<float>(count, 6);
    if (count > 2) scores[2] = std::numeric_limits<float>::quiet_NaN();
    std::vector<uint64_t> candidates(static_cast<size_t>(num_mask_words(count)), 0);
    for (int64_t a = 0; a < count; ++a) {
      if (a % 4 != 1) candidates[static_cast<size_t>(a / 64)] |= uint64_t{1} << (a % 64);
    }
    const std::vector<int64_t> k(static_cast<size_t>(cells.num_cells), cells.atoms_per_cell / 3);
    std::vector<uint64_t> expected(candidates.size(), 9);
    DeviceArray<float> values(scores, stream());
    DeviceArray<uint64_t> allowed(candidates, stream()), selected(expected, stream());
    DeviceArray<int64_t> wanted(k, stream());
    for (const bool has_scores : {true, false}) {
      const AtomCounts found =
          select_atoms(cells, AtomOrder::kSmallest, has_scores ? values.data() : nullptr,
                       allowed.data(), wanted.data(), random_key(1), selected.data(), stream());
      const AtomCounts counts =
          select_atoms(cells, AtomOrder::kSmallest, has_scores ? scores.data() : nullptr,
                       candidates.data(), k.data(), random_key(1), expected.data());
      EXPECT_EQ(selected.read(), expected) << count;
      EXPECT_EQ(found.num_selected, counts.num_selected);
      EXPECT_EQ(found.num_nan, counts.num_nan);
    }
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
