// doubly_stochastic by its definition: x step by step, each sum relative to its largest term.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/doubly_stochastic_checks.h"

namespace perseid::kernels {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// x after each step, of a matrix [n, n].
using Steps = std::vector<std::vector<double>>;

/// Where the elements of a line are: a row, or for `of_columns` a column.
struct Lines {
  int64_t n;
  bool of_columns;
  size_t operator()(int64_t line, int64_t k) const {
    return static_cast<size_t>(of_columns ? k * n + line : line * n + k);
  }
};

/// x less the logarithm of the sum of e^x over each line.
std::vector<double> normalized(std::vector<double> x, const Lines& at) {
  for (int64_t line = 0; line < at.n; ++line) {
    double largest = x[at(line, 0)], sum = 0;
    for (int64_t k = 1; k < at.n; ++k) largest = std::max(largest, x[at(line, k)]);
    for (int64_t k = 0; k < at.n; ++k) sum += std::exp(x[at(line, k)] - largest);
    for (int64_t k = 0; k < at.n; ++k) x[at(line, k)] -= largest + std::log(sum);
  }
  return x;
}

/// Empty for a matrix without a result.
template <typename T>
Steps steps_of(const T* scores, int64_t n, const DoublyStochasticOptions& options) {
  std::vector<double> x(scores, scores + n * n);
  for (double& value : x) {
    value /= options.temperature;
    if (!(std::abs(value) <= kQuotientMax)) return {};
  }
  Steps steps;
  for (int64_t t = 0; t < options.iterations; ++t) {
    steps.push_back(normalized(steps.empty() ? x : steps.back(), {n, false}));
    steps.push_back(normalized(steps.back(), {n, true}));
  }
  return steps;
}

template <typename T>
void forward(const T* scores, int64_t n, const DoublyStochasticOptions& options, T* pi) {
  const Steps steps = steps_of(scores, n, options);
  for (int64_t i = 0; i < n * n; ++i) {
    pi[i] = static_cast<T>(steps.empty() ? kNaN : std::exp(steps.back()[static_cast<size_t>(i)]));
  }
}

template <typename T>
void backward(const T* scores, int64_t n, const DoublyStochasticOptions& options, const T* grad_pi,
              T* grad_scores) {
  const Steps steps = steps_of(scores, n, options);
  std::vector<double> grad(grad_pi, grad_pi + n * n);
  if (steps.empty()) std::fill(grad.begin(), grad.end(), kNaN);
  for (size_t i = 0; i < grad.size() && !steps.empty(); ++i) grad[i] *= std::exp(steps.back()[i]);
  for (size_t step = steps.size(); step-- > 0;) {
    const std::vector<double>& after = steps[step];
    const Lines at{n, step % 2 == 1};
    for (int64_t line = 0; line < n; ++line) {
      double sum = 0;
      for (int64_t k = 0; k < n; ++k) sum += grad[at(line, k)];
      for (int64_t k = 0; k < n; ++k) grad[at(line, k)] -= std::exp(after[at(line, k)]) * sum;
    }
  }
  for (size_t i = 0; i < grad.size(); ++i) {
    grad_scores[i] = static_cast<T>(grad[i] / options.temperature);
  }
}

}  // namespace

void check_doubly_stochastic(const char* operation, const DoublyStochasticShape& shape,
                             const DoublyStochasticOptions& options, const void* scores) {
  require_count(operation, "num_matrices", shape.num_matrices);
  require(shape.size >= 1, operation, "size", shape.size, "is below 1");
  require(options.temperature > 0 && std::isfinite(options.temperature), operation, "temperature",
          options.temperature, "is not a finite number above 0; 1e-3 is usual");
  require(options.iterations >= 1, operation, "iterations", options.iterations,
          "is below 1; 20 is usual");
  require_matrices(operation, "scores", shape, scores);
}

void require_matrices(const char* operation, const char* argument,
                      const DoublyStochasticShape& shape, const void* buffer) {
  require_buffer(operation, argument, buffer, shape.num_matrices * shape.size * shape.size);
}

void doubly_stochastic_reference(const DoublyStochasticShape& shape,
                                 const DoublyStochasticOptions& options, DType dtype,
                                 const void* scores, void* pi) {
  check_doubly_stochastic("doubly_stochastic", shape, options, scores);
  require_matrices("doubly_stochastic", "pi", shape, pi);
  dispatch_float_dtype(dtype, "doubly_stochastic", [&](auto tag) {
    using T = decltype(tag);
    const int64_t n = shape.size;
    for (int64_t b = 0; b < shape.num_matrices; ++b) {
      forward(static_cast<const T*>(scores) + b * n * n, n, options,
              static_cast<T*>(pi) + b * n * n);
    }
  });
}

void doubly_stochastic_backward_reference(const DoublyStochasticShape& shape,
                                          const DoublyStochasticOptions& options, DType dtype,
                                          const void* scores, const void* grad_pi,
                                          void* grad_scores) {
  constexpr const char* kOperation = "doubly_stochastic_backward";
  check_doubly_stochastic(kOperation, shape, options, scores);
  require_matrices(kOperation, "grad_pi", shape, grad_pi);
  require_matrices(kOperation, "grad_scores", shape, grad_scores);
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const int64_t n = shape.size;
    for (int64_t b = 0; b < shape.num_matrices; ++b) {
      backward(static_cast<const T*>(scores) + b * n * n, n, options,
               static_cast<const T*>(grad_pi) + b * n * n,
               static_cast<T*>(grad_scores) + b * n * n);
    }
  });
}

}  // namespace perseid::kernels
