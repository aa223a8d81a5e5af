// doubly_stochastic: the first iteration by logarithms, which leaves K = e^x; the others scale rows
// and columns of K, so that an iteration is one walk over K with two products an element and no
// exponential. Nothing gets lost by it: a step leaves each of its lines an entry of 1/n or more and
// none above 1, and the step after it divides by sums of at most n, so that from the second
// iteration on every sum, and with it the change of a factor, lies in [1/n^2, n]. Where factors
// have grown to 2^400 or shrunk to 2^-400, K is formed anew from the potentials; what underflowed
// in it is below 2^-1022 * 2^800 even then. Sums over columns in kLanes sums, over rows in order.
#include "kernels/doubly_stochastic.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/doubly_stochastic_checks.h"
#include "kernels/math.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr double kFactorMax = 0x1p400;
constexpr double kLogFactorMax = 277.0;  // its logarithm, rounded down
constexpr int64_t kLanes = 8;

// ---- loops -------------------------------------------------------------------------------------
// Rows have `stride` values, a multiple of kLanes. Those behind the n-th are 0 in K and in factors.

PERSEID_INLINE double dot(const double* a, const double* b, int64_t stride) {
  double sums[kLanes] = {};
  for (int64_t j = 0; j < stride; j += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[j + lane] * b[j + lane];
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

/// a = scores / temperature. Returns whether all may be used.
template <typename T>
PERSEID_SIMD_CLONES bool divide(const T* scores, double temperature, int64_t n, int64_t stride,
                                double* a) {
  int is_bad = 0;
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd reduction(| : is_bad)
    for (int64_t j = 0; j < n; ++j) {
      const double quotient = static_cast<double>(scores[i * n + j]) / temperature;
      a[i * stride + j] = quotient;
      is_bad |= std::abs(quotient) <= kQuotientMax ? 0 : 1;
    }
  }
  return is_bad == 0;
}

/// K[i, j] = e^(a[i, j] - u[i] - v[j]).
PERSEID_SIMD_CLONES void exp_of_rest(const double* a, const double* u, const double* v, int64_t n,
                                     int64_t stride, double* K) {
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      K[i * stride + j] = simd_exp(a[i * stride + j] - u[i] - v[j]);
    }
  }
}

/// u[i] = log of the sum over j of e^a[i, j]. @param ones  [stride] 1, then 0; @param terms
/// [stride] scratch
PERSEID_SIMD_CLONES void first_rows(const double* a, const double* ones, int64_t n, int64_t stride,
                                    double* terms, double* u) {
  for (int64_t i = 0; i < n; ++i) {
    const double* const row = a + i * stride;
    double largest = row[0];
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n; ++j) largest = row[j] > largest ? row[j] : largest;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) terms[j] = simd_exp(row[j] - largest);
    u[i] = largest + std::log(dot(terms, ones, stride));
  }
}

/// v[j] = log of the sum over i of e^(a[i, j] - u[i]). @param sums  [n] scratch
PERSEID_SIMD_CLONES void first_columns(const double* a, const double* u, int64_t n, int64_t stride,
                                       double* sums, double* v) {
  std::fill_n(v, n, -std::numeric_limits<double>::infinity());
  std::fill_n(sums, n, 0.0);
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const double value = a[i * stride + j] - u[i];
      v[j] = value > v[j] ? value : v[j];
    }
  }
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sums[j] += simd_exp(a[i * stride + j] - u[i] - v[j]);
  }
  for (int64_t j = 0; j < n; ++j) v[j] += std::log(sums[j]);
}

/// An iteration: r = 1 / (K c), then c = 1 / (K^T r). @param sums  [stride] scratch
PERSEID_SIMD_CLONES void iterate(const double* K, int64_t n, int64_t stride, double* r, double* c,
                                 double* sums) {
  std::fill_n(sums, stride, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    const double* const row = K + i * stride;
    const double factor = 1.0 / dot(row, c, stride);
    r[i] = factor;
#pragma omp simd
    for (int64_t j = 0; j < stride; ++j) sums[j] += row[j] * factor;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) c[j] = 1.0 / sums[j];
}

/// Back through an iteration: the step over columns, whose softmax is r K c, and the one over rows,
/// whose softmax is r K c_before. The gradient of the quotients is K W and what was added before.
/// @param pull  [stride] c * (dL/d column potential)
/// @param du    [n] dL/d row potential, from later steps; complete at the end
/// @param sums  [stride] becomes K^T (r du)
PERSEID_SIMD_CLONES void iterate_back(const double* K, int64_t n, int64_t stride, const double* r,
                                      const double* pull, const double* c_before, double* du,
                                      double* sums, double* W) {
  std::fill_n(sums, stride, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    const double* const row = K + i * stride;
    double* const weights = W + i * stride;
    const double factor = r[i];
    du[i] -= factor * dot(row, pull, stride);
    const double push = factor * du[i];
#pragma omp simd
    for (int64_t j = 0; j < stride; ++j) {
      sums[j] += row[j] * push;
      weights[j] += factor * pull[j] + push * c_before[j];
    }
  }
}

/// grad += K W, W = 0.
PERSEID_SIMD_CLONES void move_weights(const double* K, int64_t count, double* W, double* grad) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    grad[i] += K[i] * W[i];
    W[i] = 0;
  }
}

/// out = e^(from - to).
PERSEID_SIMD_CLONES void factors(const double* from, const double* to, int64_t n, double* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = simd_exp(from[i] - to[i]);
}

// ---- one matrix --------------------------------------------------------------------------------
using Values = std::vector<double>;

/// e^x = r[i] K[i, j] c[j] with K[i, j] = e^(a[i, j] - u[i] - v[j]) and a = scores / temperature.
struct Scaling {
  explicit Scaling(int64_t size)
      : n(size),
        stride(ceil_div(size, kLanes) * kLanes),
        a(static_cast<size_t>(n * stride)),
        K(a.size()),
        u(static_cast<size_t>(stride)),
        v(u.size()),
        r(u.size()),
        c(u.size()),
        sums(u.size()) {}

  void form() { exp_of_rest(a.data(), u.data(), v.data(), n, stride, K.data()); }
  void reset_factors() {
    std::fill_n(r.data(), n, 1.0);
    std::fill_n(c.data(), n, 1.0);
  }

  int64_t n, stride;
  Values a, K;  // [n, stride]
  Values u, v;  // [stride]
  Values r, c;  // [stride]
  Values sums;  // [stride] scratch
};

/// x = base - log factor.
void write_potentials(const Values& base, const Values& factor, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = base[i] - std::log(factor[i]);
}

bool are_moderate(const Values& factor, int64_t n) {
  const auto [low, high] = std::minmax_element(factor.begin(), factor.begin() + n);
  return *low >= 1 / kFactorMax && *high <= kFactorMax;
}

bool are_near(const Values& base, const double* potentials, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!(std::abs(base[i] - potentials[i]) <= kLogFactorMax)) return false;
  }
  return true;
}

class Forward {
 public:
  Forward(int64_t n, const DoublyStochasticOptions& options) : options_(options), at_(n) {}

  /// @param rows, columns  [iterations, n] or null
  template <typename T>
  void run(const T* scores, T* pi, double* rows, double* columns) {
    const int64_t n = at_.n;
    if (!divide(scores, options_.temperature, n, at_.stride, at_.a.data())) {
      constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(pi, n * n, static_cast<T>(kNaN));
      for (double* kept : {rows, columns}) {
        if (kept != nullptr) std::fill_n(kept, options_.iterations * n, kNaN);
      }
      return;
    }
    for (int64_t t = 0; t < options_.iterations; ++t) {
      t == 0 ? begin() : advance();
      if (rows == nullptr) continue;
      write_potentials(at_.u, at_.r, n, rows + t * n);
      write_potentials(at_.v, at_.c, n, columns + t * n);
    }
    for (int64_t i = 0; i < n; ++i) {
      const double* const row = at_.K.data() + i * at_.stride;
      for (int64_t j = 0; j < n; ++j) pi[i * n + j] = static_cast<T>(row[j] * at_.c[j] * at_.r[i]);
    }
  }

 private:
  void begin() {
    at_.reset_factors();
    std::fill(at_.sums.begin(), at_.sums.end(), 0.0);
    first_rows(at_.a.data(), at_.c.data(), at_.n, at_.stride, at_.sums.data(), at_.u.data());
    first_columns(at_.a.data(), at_.u.data(), at_.n, at_.stride, at_.sums.data(), at_.v.data());
    at_.form();
  }
  void advance() {
    if (!are_moderate(at_.r, at_.n) || !are_moderate(at_.c, at_.n)) {
      write_potentials(at_.u, at_.r, at_.n, at_.u.data());
      write_potentials(at_.v, at_.c, at_.n, at_.v.data());
      at_.form();
      at_.reset_factors();
    }
    iterate(at_.K.data(), at_.n, at_.stride, at_.r.data(), at_.c.data(), at_.sums.data());
  }

  DoublyStochasticOptions options_;
  Scaling at_;
};

class Backward {
 public:
  Backward(int64_t n, const DoublyStochasticOptions& options)
      : options_(options),
        at_(n),
        c_before_(at_.u.size()),
        pull_(at_.u.size()),
        du_(at_.u.size()),
        dv_(at_.u.size()),
        W_(at_.a.size()),
        grad_(at_.a.size()) {}

  template <typename T>
  void run(const T* scores, const double* rows, const double* columns, const T* grad_pi,
           T* grad_scores) {
    const int64_t n = at_.n, stride = at_.stride, last = options_.iterations - 1;
    if (!divide(scores, options_.temperature, n, stride, at_.a.data())) {
      std::fill_n(grad_scores, n * n, std::numeric_limits<T>::quiet_NaN());
      return;
    }
    std::fill(grad_.begin(), grad_.end(), 0.0);
    rebase(rows + last * n, columns + last * n);
    begin(grad_pi);
    for (int64_t t = last; t >= 0; --t) {
      recede(rows + t * n, columns + t * n, t == 0 ? nullptr : columns + (t - 1) * n);
    }
    // The first step over rows, from column potentials of 0.
    move_weights(at_.K.data(), n * stride, W_.data(), grad_.data());
    std::copy_n(rows, n, at_.u.data());
    std::fill_n(at_.v.data(), n, 0.0);
    at_.form();
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t k = i * stride + j;
        grad_scores[i * n + j] =
            static_cast<T>((grad_[k] + at_.K[k] * du_[i]) / options_.temperature);
      }
    }
  }

 private:
  /// K from these potentials.
  void rebase(const double* u, const double* v) {
    std::copy_n(u, at_.n, at_.u.data());
    std::copy_n(v, at_.n, at_.v.data());
    at_.form();
  }

  /// pi = K: the gradient of the quotients that does not go by potentials, and of the last ones.
  template <typename T>
  void begin(const T* grad_pi) {
    const int64_t n = at_.n;
    std::fill(dv_.begin(), dv_.end(), 0.0);
    for (int64_t i = 0; i < n; ++i) {
      const double* const row = at_.K.data() + i * at_.stride;
      double* const weights = W_.data() + i * at_.stride;
      for (int64_t j = 0; j < n; ++j) {
        weights[j] = static_cast<double>(grad_pi[i * n + j]);
        dv_[j] -= row[j] * weights[j];
      }
      du_[i] = -dot(row, weights, at_.stride);
    }
  }

  /// @param v_before  column potentials of the iteration before; null in the first one
  void recede(const double* u, const double* v, const double* v_before) {
    const int64_t n = at_.n;
    if (!are_near(at_.u, u, n) || !are_near(at_.v, v, n) ||
        (v_before != nullptr && !are_near(at_.v, v_before, n))) {
      move_weights(at_.K.data(), n * at_.stride, W_.data(), grad_.data());
      rebase(u, v);
    }
    factors(at_.u.data(), u, n, at_.r.data());
    factors(at_.v.data(), v, n, at_.c.data());
    if (v_before == nullptr) {
      std::fill(c_before_.begin(), c_before_.end(), 0.0);
    } else {
      factors(at_.v.data(), v_before, n, c_before_.data());
    }
    for (int64_t j = 0; j < n; ++j) pull_[j] = at_.c[j] * dv_[j];
    iterate_back(at_.K.data(), n, at_.stride, at_.r.data(), pull_.data(), c_before_.data(),
                 du_.data(), at_.sums.data(), W_.data());
    if (v_before == nullptr) return;
    for (int64_t j = 0; j < n; ++j) dv_[j] = -c_before_[j] * at_.sums[j];
    std::fill_n(du_.data(), n, 0.0);
  }

  DoublyStochasticOptions options_;
  Scaling at_;
  Values c_before_, pull_;  // [stride]
  Values du_, dv_;          // [stride] gradients of the potentials
  Values W_, grad_;         // [n, stride]
};

/// body(worker, matrix) for every matrix; a worker serves one thread.
template <typename Worker, typename Body>
void for_each_matrix(const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
                     const Body& body) {
  parallel_for(0, shape.num_matrices, 1, [&](int64_t begin, int64_t end) {
    Worker worker(shape.size, options);
    for (int64_t b = begin; b < end; ++b) body(worker, b);
  });
}

}  // namespace

void doubly_stochastic(const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
                       DType dtype, const void* scores, void* pi, double* rows, double* columns,
                       Stream stream) {
  constexpr const char* kOperation = "doubly_stochastic";
  check_doubly_stochastic(kOperation, shape, options, scores);
  require_matrices(kOperation, "pi", shape, pi);
  const int64_t n = shape.size, potentials = options.iterations * n;
  if (rows != nullptr || columns != nullptr) {
    require_buffer(kOperation, "rows", rows, shape.num_matrices * potentials);
    require_buffer(kOperation, "columns", columns, shape.num_matrices * potentials);
  }
  if (stream.device == Device::kCuda) {
    return cuda::doubly_stochastic(shape, options, dtype, scores, pi, rows, columns, stream);
  }
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    for_each_matrix<Forward>(shape, options, [&](Forward& worker, int64_t b) {
      worker.run(static_cast<const T*>(scores) + b * n * n, static_cast<T*>(pi) + b * n * n,
                 rows == nullptr ? nullptr : rows + b * potentials,
                 columns == nullptr ? nullptr : columns + b * potentials);
    });
  });
}

void doubly_stochastic_backward(const DoublyStochasticShape& shape,
                                const DoublyStochasticOptions& options, DType dtype,
                                const void* scores, const double* rows, const double* columns,
                                const void* grad_pi, void* grad_scores, Stream stream) {
  constexpr const char* kOperation = "doubly_stochastic_backward";
  check_doubly_stochastic(kOperation, shape, options, scores);
  const int64_t n = shape.size, potentials = options.iterations * n;
  require_buffer(kOperation, "rows", rows, shape.num_matrices * potentials);
  require_buffer(kOperation, "columns", columns, shape.num_matrices * potentials);
  require_matrices(kOperation, "grad_pi", shape, grad_pi);
  require_matrices(kOperation, "grad_scores", shape, grad_scores);
  if (stream.device == Device::kCuda) {
    return cuda::doubly_stochastic_backward(shape, options, dtype, scores, rows, columns, grad_pi,
                                            grad_scores, stream);
  }
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    for_each_matrix<Backward>(shape, options, [&](Backward& worker, int64_t b) {
      worker.run(static_cast<const T*>(scores) + b * n * n, rows + b * potentials,
                 columns + b * potentials, static_cast<const T*>(grad_pi) + b * n * n,
                 static_cast<T*>(grad_scores) + b * n * n);
    });
  });
}

}  // namespace perseid::kernels
