// doubly_stochastic and its backward on a device against the CPU; outputs held NaN before.
//   Sizes        0, 1 and 3 matrices, sizes around a warp, iterations, temperatures; the potentials
//   Unkept       without potentials the same bits
//   NonFinite    one matrix of several
//   SameBits     twice
#include "kernels/doubly_stochastic.h"

#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
struct Outputs {
  std::vector<T> pi;
  std::vector<double> rows, columns;
  std::vector<T> grad_scores;
};

class DeviceDoublyStochastic : public DeviceTest {
 protected:
  template <typename T>
  Outputs<T> run(const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
                 const std::vector<T>& scores, const std::vector<T>& grad_pi) {
    const auto count = static_cast<int64_t>(scores.size());
    const int64_t potentials = shape.num_matrices * options.iterations * shape.size;
    DeviceArray<T> from(scores, stream()), upstream(grad_pi, stream());
    DeviceArray<T> pi(nans<T>(count), stream()), grad(nans<T>(count), stream());
    DeviceArray<double> rows(nans<double>(potentials), stream());
    DeviceArray<double> columns(nans<double>(potentials), stream());
    doubly_stochastic(shape, options, DTypeOf<T>::value, from.data(), pi.data(), rows.data(),
                      columns.data(), stream());
    doubly_stochastic_backward(shape, options, DTypeOf<T>::value, from.data(), rows.data(),
                               columns.data(), upstream.data(), grad.data(), stream());
    return {pi.read(), rows.read(), columns.read(), grad.read()};
  }
  template <typename T>
  static Outputs<T> run_host(const DoublyStochasticShape& shape,
                             const DoublyStochasticOptions& options, const std::vector<T>& scores,
                             const std::vector<T>& grad_pi) {
    const auto count = static_cast<int64_t>(scores.size());
    const int64_t potentials = shape.num_matrices * options.iterations * shape.size;
    Outputs<T> out{nans<T>(count), nans<double>(potentials), nans<double>(potentials),
                   nans<T>(count)};
    doubly_stochastic(shape, options, DTypeOf<T>::value, scores.data(), out.pi.data(),
                      out.rows.data(), out.columns.data());
    doubly_stochastic_backward(shape, options, DTypeOf<T>::value, scores.data(), out.rows.data(),
                               out.columns.data(), grad_pi.data(), out.grad_scores.data());
    return out;
  }
  template <typename T>
  void compare(const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
               double scale = 1) {
    const int64_t count = shape.num_matrices * shape.size * shape.size;
    const auto scores = normal_values<T>(count, 1, scale), grad_pi = normal_values<T>(count, 2);
    const Outputs<T> found = run(shape, options, scores, grad_pi);
    const Outputs<T> expected = run_host(shape, options, scores, grad_pi);
    const std::string what = to_text(shape.num_matrices) + " of " + to_text(shape.size) + " at " +
                             to_text(options.temperature) + " x " + to_text(options.iterations);
    // A quotient is a product with 1 / temperature here, so that its last digit may differ.
    const double digits = std::max(1e-12, 5e-15 * scale / options.temperature);
    const double allowed = std::is_same_v<T, double> ? digits : 2e-6 + digits;
    expect_close(found.rows, expected.rows, 1e-12, what + " rows");
    expect_close(found.columns, expected.columns, 1e-12, what + " columns");
    expect_close(found.pi, expected.pi, allowed, what + " pi");
    // Terms as large as the upstream gradient over the temperature cancel.
    for (size_t k = 0; k < scores.size(); ++k) {
      ASSERT_NEAR(found.grad_scores[k], expected.grad_scores[k], 10 * allowed / options.temperature)
          << what << " gradient " << k;
    }
  }
};

TEST_F(DeviceDoublyStochastic, Sizes) {
  for (const int64_t n : {1, 2, 5, 31, 64, 100}) {
    for (const int64_t B : {0, 1, 3}) {
      for (const int64_t iterations : {1, 5}) {
        compare<double>({B, n}, {.5, iterations});
        compare<float>({B, n}, {.5, iterations});
      }
    }
    compare<double>({1, n}, {1e-3, 4}, .05);
    compare<float>({1, n}, {1e-6, 4}, .05);
  }
  compare<double>({2, 7}, {1e-3, 150}, .05);
}

TEST_F(DeviceDoublyStochastic, Unkept) {
  const DoublyStochasticShape shape{2, 33};
  const auto scores = normal_values<float>(2 * 33 * 33, 1);
  for (const int64_t iterations : {1, 2, 5}) {
    DeviceArray<float> from(scores, stream()), pi(nans<float>(2 * 33 * 33), stream());
    doubly_stochastic(shape, {.1, iterations}, DType::kFloat32, from.data(), pi.data(), nullptr,
                      nullptr, stream());
    EXPECT_TRUE(same_bits(pi.read(), run(shape, {.1, iterations}, scores, scores).pi));
  }
}

TEST_F(DeviceDoublyStochastic, NonFinite) {
  const DoublyStochasticShape shape{3, 6};
  const DoublyStochasticOptions options{.1, 3};
  const auto clean = normal_values<double>(3 * 36, 1), grad_pi = normal_values<double>(3 * 36, 2);
  const auto expected = run(shape, options, clean, grad_pi);
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), kInf, -kInf, 2e11}) {
    auto scores = clean;
    scores[36 + 20] = bad;
    const auto found = run(shape, options, scores, grad_pi);
    for (size_t k = 0; k < scores.size(); ++k) {
      const bool is_broken = k / 36 == 1;
      ASSERT_EQ(std::isnan(found.pi[k]), is_broken);
      ASSERT_EQ(std::isnan(found.grad_scores[k]), is_broken);
      if (is_broken) continue;
      ASSERT_EQ(found.pi[k], expected.pi[k]);
      ASSERT_EQ(found.grad_scores[k], expected.grad_scores[k]);
    }
    for (size_t k = 0; k < found.rows.size(); ++k) {
      ASSERT_EQ(std::isnan(found.rows[k]), k / 18 == 1);
      ASSERT_EQ(std::isnan(found.columns[k]), k / 18 == 1);
    }
  }
}

TEST_F(DeviceDoublyStochastic, SameBits) {
  const DoublyStochasticShape shape{2, 40};
  const auto scores = normal_values<double>(2 * 1600, 1), grad_pi = normal_values<double>(3200, 2);
  const auto once = run(shape, {.1, 5}, scores, grad_pi);
  const auto again = run(shape, {.1, 5}, scores, grad_pi);
  EXPECT_TRUE(same_bits(once.pi, again.pi));
  EXPECT_TRUE(same_bits(once.grad_scores, again.grad_scores));
}

}  // namespace
}  // namespace perseid::kernels::testing
