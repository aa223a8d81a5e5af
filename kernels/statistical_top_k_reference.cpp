// Statistical top-k by its definitions: one token after the other, in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/statistical_top_k.h"
#include "kernels/statistical_top_k_checks.h"

namespace perseid::kernels {
namespace {

void check(const char* operation, const StatisticalTopKShape& shape,
           const StatisticalTopKOptions& options) {
  const int64_t E = shape.num_experts, K = shape.top_k;
  require_count(operation, "num_tokens", shape.num_tokens);
  require(E >= 2 && E <= std::numeric_limits<int32_t>::max(), operation, "num_experts", E,
          "is outside [2, 2147483647]");
  require(K >= 1 && K < E, operation, "top_k", K,
          "is outside [1, num_experts - 1=" + to_text(E - 1) + "]");
  require(options.min_experts == 0 || options.min_experts == 1, operation, "min_experts",
          options.min_experts, "is neither 0 nor 1");
  require_count(operation, "cap", options.cap);
}

/// mean, std and theta by their definitions, in double.
struct ReferenceThreshold {
  double mean = 0, std = 0, theta = 0, quantile = 0, max = 0;
  double freedoms = 1;
  bool is_finite = true;
};

ReferenceThreshold reference_threshold(const StatisticalTopKShape& shape,
                                       const StatisticalTopKOptions& options,
                                       const std::vector<double>& z) {
  ReferenceThreshold of;
  const auto E = static_cast<double>(z.size());
  of.freedoms = options.unbiased ? E - 1 : E;
  of.quantile = normal_upper_quantile(static_cast<double>(shape.top_k) / E);
  of.max = *std::max_element(z.begin(), z.end());
  double squares = 0;
  for (const double value : z) {
    of.is_finite = of.is_finite && std::isfinite(value);
    of.mean += value / E;
  }
  for (const double value : z) squares += (value - of.mean) * (value - of.mean);
  of.std = std::sqrt(squares / of.freedoms);
  of.theta = of.mean + of.quantile * of.std;
  return of;
}

template <typename T>
std::vector<double> row_of(const void* scores, int64_t t, int64_t num_experts) {
  const T* const row = static_cast<const T*>(scores) + t * num_experts;
  return {row, row + num_experts};
}

template <typename T>
std::vector<double> reference_weights(const StatisticalTopKShape& shape,
                                      const StatisticalTopKOptions& options,
                                      const std::vector<double>& z) {
  const ReferenceThreshold of = reference_threshold(shape, options, z);
  std::vector<double> g(z.size(), 0.0);
  if (!of.is_finite) {
    std::fill_n(g.begin(), shape.top_k, std::numeric_limits<double>::quiet_NaN());
    return g;
  }
  int64_t num_positive = 0;
  for (size_t j = 0; j < z.size(); ++j) {
    g[j] = std::max(z[j] - of.theta, 0.0);
    num_positive += g[j] > 0 ? 1 : 0;
  }
  if (num_positive == 0 && options.min_experts == 1) {
    const auto largest = static_cast<size_t>(std::max_element(z.begin(), z.end()) - z.begin());
    g[largest] = std::max(of.max - of.mean, static_cast<double>(std::numeric_limits<T>::min()));
  }
  for (; options.cap > 0 && num_positive > options.cap; --num_positive) {
    size_t smallest = 0;  // of the positive ones, the last of equal ones
    for (size_t j = 0; j < g.size(); ++j) {
      if (g[j] > 0 && (g[smallest] == 0 || g[j] <= g[smallest])) smallest = j;
    }
    g[smallest] = 0;
  }
  return g;
}

}  // namespace

void check_statistical_top_k(const StatisticalTopKShape& shape,
                             const StatisticalTopKOptions& options, const void* scores,
                             const void* weights) {
  constexpr const char* kOperation = "statistical_top_k";
  check(kOperation, shape, options);
  require_buffer(kOperation, "scores", scores, shape.num_tokens * shape.num_experts);
  require_buffer(kOperation, "weights", weights, shape.num_tokens * shape.num_experts);
}

void check_statistical_top_k_backward(const StatisticalTopKShape& shape,
                                      const StatisticalTopKOptions& options, const void* scores,
                                      const void* weights, const void* grad_weights,
                                      const void* grad_scores) {
  constexpr const char* kOperation = "statistical_top_k_backward";
  check(kOperation, shape, options);
  const int64_t count = shape.num_tokens * shape.num_experts;
  require_buffer(kOperation, "scores", scores, count);
  require_buffer(kOperation, "weights", weights, count);
  require_buffer(kOperation, "grad_weights", grad_weights, count);
  require_buffer(kOperation, "grad_scores", grad_scores, count);
}

void statistical_top_k_reference(const StatisticalTopKShape& shape,
                                 const StatisticalTopKOptions& options, DType dtype,
                                 const void* scores, const uint8_t* valid, void* weights,
                                 int64_t* non_finite_tokens) {
  check_statistical_top_k(shape, options, scores, weights);
  const int64_t E = shape.num_experts;
  if (non_finite_tokens != nullptr) *non_finite_tokens = 0;
  dispatch_float_dtype(dtype, "statistical_top_k", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      std::vector<double> g(static_cast<size_t>(E), 0.0);
      if (valid == nullptr || valid[t] != 0) {
        g = reference_weights<T>(shape, options, row_of<T>(scores, t, E));
      }
      if (std::isnan(g[0]) && non_finite_tokens != nullptr) ++*non_finite_tokens;
      for (int64_t j = 0; j < E; ++j) {
        static_cast<T*>(weights)[t * E + j] = static_cast<T>(g[static_cast<size_t>(j)]);
      }
    }
  });
}

void statistical_top_k_backward_reference(const StatisticalTopKShape& shape,
                                          const StatisticalTopKOptions& options, DType dtype,
                                          const void* scores, const uint8_t* valid,
                                          const void* weights, const void* grad_weights,
                                          void* grad_scores) {
  check_statistical_top_k_backward(shape, options, scores, weights, grad_weights, grad_scores);
  const int64_t E = shape.num_experts;
  dispatch_float_dtype(dtype, "statistical_top_k_backward", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      const std::vector<double> z = row_of<T>(scores, t, E), g = row_of<T>(weights, t, E);
      const std::vector<double> upstream = row_of<T>(grad_weights, t, E);
      const ReferenceThreshold of = reference_threshold(shape, options, z);
      const bool is_valid = valid == nullptr || valid[t] != 0;
      double sum = 0;
      for (size_t j = 0; j < z.size(); ++j) sum += g[j] > 0 ? upstream[j] : 0;
      for (size_t j = 0; j < z.size(); ++j) {
        double slope = 0;  // of theta with respect to z_j
        if (!options.detach_threshold) slope = 1 / static_cast<double>(E);
        if (!options.detach_threshold && of.max > of.theta && of.std > 0) {
          slope += of.quantile * (z[j] - of.mean) / (of.freedoms * of.std);
        }
        double grad = (g[j] > 0 ? upstream[j] : 0) - sum * slope;
        if (!of.is_finite) grad = std::numeric_limits<double>::quiet_NaN();
        static_cast<T*>(grad_scores)[t * E + static_cast<int64_t>(j)] =
            static_cast<T>(is_valid ? grad : 0.0);
      }
    }
  });
}

}  // namespace perseid::kernels
