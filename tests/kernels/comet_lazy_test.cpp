// Logits of COMET along active paths, and products that skip zeros.
//   SameAsAll      comet and comet_backward on them = on all logits: 1e-12 (float64)
//   Reference      the walk by plain recursion, both types, E = 1 .. 33
//   OnlyReached    saturated: at most depth split nodes and one leaf for each tree; NaN in the
//                  weights of the others changes nothing
//   ReachesFew     true for saturated trees, false for open ones, false near the limit only above
//   it Products       against plain loops; NaN opposite to zeros; threads: the same bits Errors
//   text of every check
#include "kernels/comet_lazy.h"

#include "kernels/sparse_product.h"
#include "tests/kernels/comet_fixture.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
struct Layers {
  CometShape shape;
  int64_t d_model;
  std::vector<T> features, split_weight, split_bias, leaf_weight, leaf_bias;

  Layers(CometShape s, int64_t D, double scale) : shape(s), d_model(D) {
    const int64_t splits = s.num_trees * (s.num_experts - 1);
    const int64_t leaves = s.num_trees * s.num_experts;
    features = normal_values<T>(s.num_tokens * D, 1);
    split_weight = normal_values<T>(splits * D, 2, scale);
    split_bias = normal_values<T>(splits, 3, scale);
    leaf_weight = normal_values<T>(leaves * D, 4);
    leaf_bias = normal_values<T>(leaves, 5);
  }
  CometLinear linear() const {
    return {d_model,           features.data(),    split_weight.data(),
            split_bias.data(), leaf_weight.data(), leaf_bias.data()};
  }
  CometCase<T> reached(bool is_reference = false, const uint8_t* valid = nullptr) const {
    CometCase<T> at;
    at.shape = shape;
    at.splits = nans<T>(shape.num_tokens * shape.num_trees * (shape.num_experts - 1));
    at.leaves = nans<T>(shape.num_tokens * shape.num_trees * shape.num_experts);
    (is_reference ? comet_reached_logits_reference(shape, 1, DTypeOf<T>::value, linear(), valid,
                                                   at.splits.data(), at.leaves.data())
                  : comet_reached_logits(shape, 1, DTypeOf<T>::value, linear(), valid,
                                         at.splits.data(), at.leaves.data()));
    return at;
  }
  std::vector<T> all(const std::vector<T>& weight, const std::vector<T>& bias) const {
    std::vector<T> logits;
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (size_t n = 0; n < bias.size(); ++n) {
        auto sum = static_cast<double>(bias[n]);
        for (int64_t d = 0; d < d_model; ++d) {
          sum += static_cast<double>(features[static_cast<size_t>(t * d_model + d)]) *
                 static_cast<double>(
                     weight[n * static_cast<size_t>(d_model) + static_cast<size_t>(d)]);
        }
        logits.push_back(static_cast<T>(sum));
      }
    }
    return logits;
  }
};

TEST(CometLazy, SameAsAll) {
  for (const int64_t E : {1, 2, 5, 8, 13}) {
    for (const double scale : {0.05, 0.3, 3.0}) {
      const int64_t K = std::min<int64_t>(E, 3);
      const Layers<double> layers({11, E, K}, 7, scale);
      const auto lazy = layers.reached();
      auto all = lazy;
      all.splits = layers.all(layers.split_weight, layers.split_bias);
      all.leaves = layers.all(layers.leaf_weight, layers.leaf_bias);
      const auto actual = lazy.forward(), expected = all.forward();
      expect_close(actual.weights, expected.weights, 1e-12, "weights");
      EXPECT_NEAR(actual.entropy_sum, expected.entropy_sum, 1e-11);
      EXPECT_EQ(actual.reached_nodes, expected.reached_nodes);
      EXPECT_EQ(actual.saturated_nodes, expected.saturated_nodes);
      const auto upstream = normal_values<double>(11 * E, 9);
      const auto grad = lazy.backward(upstream, 0.3), expected_grad = all.backward(upstream, 0.3);
      for (size_t i = 0; i < grad.splits.size(); ++i) {
        ASSERT_NEAR(grad.splits[i], expected_grad.splits[i], 1e-11);
      }
      for (size_t i = 0; i < grad.leaves.size(); ++i) {
        ASSERT_NEAR(grad.leaves[i], expected_grad.leaves[i], 1e-11);
      }
    }
  }
}

template <typename T>
void expect_reference() {
  for (const int64_t E : {1, 2, 3, 5, 8, 16, 33}) {
    for (const double scale : {0.05, 0.3, 3.0}) {
      const Layers<T> layers({7, E, std::min<int64_t>(E, 2)}, 19, scale);
      const std::vector<uint8_t> valid = {1, 1, 0, 1, 1, 0, 1};
      const auto actual = layers.reached(false, valid.data());
      const auto expected = layers.reached(true, valid.data());
      expect_close(actual.splits, expected.splits, 20 * tolerance<T>(), "splits");
      expect_close(actual.leaves, expected.leaves, 20 * tolerance<T>(), "leaves");
    }
  }
}

TEST(CometLazy, Reference) {
  expect_reference<float>();
  expect_reference<double>();
}

TEST(CometLazy, OnlyReached) {
  const int64_t E = 13, K = 2, T = 5;
  Layers<float> layers({T, E, K}, 7, 100.0);
  const auto lazy = layers.reached();
  std::vector<bool> leaf_is_reached(static_cast<size_t>(K * E));
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = 0; i < K; ++i) {
      const auto splits = lazy.splits.begin() + (t * K + i) * (E - 1);
      const auto leaves = lazy.leaves.begin() + (t * K + i) * E;
      const auto is_formed = [](float x) { return x != 0.0f; };
      EXPECT_LE(std::count_if(splits, splits + E - 1, is_formed), 4);
      EXPECT_EQ(std::count_if(leaves, leaves + E, is_formed), 1);
      for (int64_t l = 0; l < E; ++l) {
        if (leaves[l] != 0.0f) leaf_is_reached[static_cast<size_t>(i * E + l)] = true;
      }
    }
  }
  for (size_t l = 0; l < leaf_is_reached.size(); ++l) {
    if (leaf_is_reached[l]) continue;
    layers.leaf_weight[l * 7 + 3] = std::numeric_limits<float>::quiet_NaN();
  }
  EXPECT_TRUE(layers.reached().forward().has_same_bits(lazy.forward()));
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    EXPECT_TRUE(same_bits(layers.reached().leaves, lazy.leaves)) << count;
  }
}

TEST(CometLazy, ReachesFew) {
  const auto few = [](double scale, int64_t E, int64_t num_tokens = 100) {
    const Layers<float> layers({num_tokens, E, 2}, 7, scale);
    return comet_reaches_few(layers.shape, 1, DType::kFloat32, layers.linear(), 16);
  };
  EXPECT_TRUE(few(100, 64));    // 7 of 127
  EXPECT_FALSE(few(0.01, 64));  // all
  EXPECT_FALSE(few(100, 8));    // 4 of 15, above a fifth
  EXPECT_TRUE(few(0.01, 64, 0));
}

TEST(SparseProduct, Products) {
  const int64_t M = 37, N = 41, D = 19;
  auto a = normal_values<float>(M * N, 1);
  for (size_t i = 0; i < a.size(); ++i) {
    if (i % 7 != 0) a[i] = i % 2 == 0 ? 0.0f : -0.0f;
  }
  for (int64_t m = 0; m < M; ++m) a[static_cast<size_t>(m * N + 5)] = 0;
  for (int64_t n = 0; n < N; ++n) a[static_cast<size_t>(3 * N + n)] = 0;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  auto columns = normal_values<float>(N * D, 2), rows = normal_values<float>(M * D, 3);
  std::fill_n(columns.begin() + 5 * D, D, nan);
  std::fill_n(rows.begin() + 3 * D, D, nan);
  auto expected = nans<float>(M * D), expected_back = nans<float>(N * D);
  sparse_product_reference(a.data(), columns.data(), M, N, D, DType::kFloat32, expected.data());
  sparse_transposed_product_reference(a.data(), rows.data(), M, N, D, DType::kFloat32,
                                      expected_back.data());
  std::vector<float> first, first_back;
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    auto actual = nans<float>(M * D), back = nans<float>(N * D);
    sparse_product(a.data(), columns.data(), M, N, D, DType::kFloat32, actual.data());
    sparse_transposed_product(a.data(), rows.data(), M, N, D, DType::kFloat32, back.data());
    expect_close(actual, expected, 2e-6, "product");
    expect_close(back, expected_back, 2e-6, "transposed");
    if (count == 1) first = actual, first_back = back;
    EXPECT_TRUE(same_bits(actual, first)) << count;
    EXPECT_TRUE(same_bits(back, first_back)) << count;
    EXPECT_EQ(count_nonzero(a.data(), M * N, DType::kFloat32),
              std::count_if(a.begin(), a.end(), [](float x) { return x != 0; }));
  }
  for (const float x : expected) EXPECT_TRUE(std::isfinite(x));
  sparse_product(nullptr, nullptr, 0, 0, 0, DType::kFloat64, nullptr);
  std::vector<double> zeros(3, nan);
  sparse_transposed_product(nullptr, nullptr, 0, 1, 3, DType::kFloat64, zeros.data());
  EXPECT_EQ(zeros, (std::vector<double>{0, 0, 0}));
}

TEST(CometLazy, Errors) {
  const auto with = [](auto change) {
    return config_error([&] {
      const Layers<float> layers({2, 4, 2}, 3, 1.0);
      CometLinear linear = layers.linear();
      change(linear);
      std::vector<float> splits(12), leaves(16);
      comet_reached_logits(layers.shape, 1, DType::kFloat32, linear, nullptr, splits.data(),
                           leaves.data());
    });
  };
  const std::string tail = " elements are needed; pass a buffer";
  EXPECT_EQ(with([](auto& l) { l.d_model = 0; }),
            "[comet_reached_logits] d_model=0 is below 1; give the width of the tokens");
  EXPECT_EQ(with([](auto& l) { l.features = nullptr; }),
            "[comet_reached_logits] features=null but 6" + tail);
  EXPECT_EQ(with([](auto& l) { l.split_weight = nullptr; }),
            "[comet_reached_logits] split_weight=null but 18" + tail);
  EXPECT_EQ(with([](auto& l) { l.split_bias = nullptr; }),
            "[comet_reached_logits] split_bias=null but 6" + tail);
  EXPECT_EQ(with([](auto& l) { l.leaf_weight = nullptr; }),
            "[comet_reached_logits] leaf_weight=null but 24" + tail);
  EXPECT_EQ(with([](auto& l) { l.leaf_bias = nullptr; }),
            "[comet_reached_logits] leaf_bias=null but 8" + tail);
  EXPECT_EQ(
      config_error([] { sparse_product(nullptr, nullptr, 2, 3, 4, DType::kFloat32, nullptr); }),
      "[sparse_product] a=null but 6" + tail);
  EXPECT_EQ(config_error([] { count_nonzero(nullptr, -1, DType::kFloat32); }),
            "[count_nonzero] count=-1 is negative; choose 0 or more");
}

}  // namespace
}  // namespace perseid::kernels::testing
