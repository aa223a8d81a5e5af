// doubly_stochastic: one block a matrix, a warp a row in a step over rows, and in one over columns
// 32 columns at a time with every 8th row in a warp. Potentials lie in rows and columns as they are
// kept, or one iteration of them in memory of their own. A sum is relative to its largest term in
// the first iteration and to the potential before in the others, which is at most a factor of n^2
// away: see doubly_stochastic.cpp. 2*iterations*n^2 exponentials a matrix, and as many reads of a
// score, from the caches where they have room for the matrix; as many again in the backward, which
// reads and writes a sum in double for each. Sums in double in a fixed order. Limit: n below 2^31.
#include <limits>

#include "kernels/cuda_launchers.h"
#include "kernels/device_memory.h"
#include "kernels/doubly_stochastic_checks.h"
#include "kernels/math.h"
#include "kernels/warp.cuh"

namespace perseid::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// A value of each lane of each warp, to be joined over warps.
using Parts = double[kWarps][kWarpSize];

struct Call {
  double per_temperature;
  int64_t iterations;
  int n;
  __host__ __device__ int64_t elements() const { return int64_t{n} * n; }
};

/// scores / temperature of this block's matrix.
template <typename T>
struct Quotients {
  const T* scores;
  double per_temperature;
  int64_t n;
  __device__ __forceinline__ double operator()(int i, int j) const {
    return static_cast<double>(scores[i * n + j]) * per_temperature;
  }
};

__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarpSize; }

struct Sum {
  static constexpr double kFirst = 0;
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
  static __device__ __forceinline__ double over_warp(double x) { return TokenWarp::sum(x); }
};
struct Largest {
  static constexpr double kFirst = -kInfinity;
  __device__ __forceinline__ double operator()(double a, double b) const { return b > a ? b : a; }
  static __device__ __forceinline__ double over_warp(double x) { return TokenWarp::max(x); }
};

/// finish(i, join of term(i, j) over j) for every row i, by one thread each. The block waits for
/// it.
template <typename Join, typename Term, typename Finish>
__device__ __forceinline__ void for_each_row(int n, const Term& term, const Finish& finish) {
  const Join join;
  for (int i = warp_of_block(); i < n; i += kWarps) {
    double value = Join::kFirst;
    PERSEID_ROLLED
    for (int j = TokenWarp::lane(); j < n; j += kWarpSize) value = join(value, term(i, j));
    value = Join::over_warp(value);
    if (TokenWarp::lane() == 0) finish(i, value);
  }
  __syncthreads();
}

/// Likewise finish(j, join of term(i, j) over i) for every column j. A thread gets the same (i, j)
/// as in for_each_row.
template <typename Join, typename Term, typename Finish>
__device__ __forceinline__ void for_each_column(int n, Parts& parts, const Term& term,
                                                const Finish& finish) {
  const Join join;
  const int warp = warp_of_block(), lane = TokenWarp::lane();
  for (int first = 0; first < n; first += kWarpSize) {
    const int j = first + lane;
    double value = Join::kFirst;
    PERSEID_ROLLED
    for (int i = warp; i < n && j < n; i += kWarps) value = join(value, term(i, j));
    parts[warp][lane] = value;
    __syncthreads();
    if (warp == 0 && j < n) {
      for (int other = 1; other < kWarps; ++other) value = join(value, parts[other][lane]);
      finish(j, value);
    }
    __syncthreads();
  }
}

/// body(i, j) for every element, by the thread that has it in for_each_row.
template <typename Body>
__device__ __forceinline__ void for_each_element(int n, const Body& body) {
  for (int i = warp_of_block(); i < n; i += kWarps) {
    for (int j = TokenWarp::lane(); j < n; j += kWarpSize) body(i, j);
  }
}

/// Whether all quotients may be used. Every thread calls it and gets the result.
template <typename T>
__device__ __forceinline__ bool are_usable(const Quotients<T>& a, int n, int* is_bad) {
  if (threadIdx.x == 0) *is_bad = 0;
  __syncthreads();
  for_each_element(n, [&](int i, int j) {
    if (!(std::abs(a(i, j)) <= kQuotientMax)) *is_bad = 1;  // all write the same
  });
  __syncthreads();
  return *is_bad == 0;
}

// ---- kernels -----------------------------------------------------------------------------------
/// Registers: 40. Shared: 2052.
/// @param step  potentials from one iteration to the next: n, or 0 if they are not kept
template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const Call call, const T* __restrict__ scores, T* __restrict__ pi, double* rows,
                   double* columns, int64_t step) {
  __shared__ Parts parts;
  __shared__ int is_bad;
  const int n = call.n;
  const int64_t potentials = step == 0 ? n : call.iterations * n;
  const Quotients<T> a{scores + blockIdx.x * call.elements(), call.per_temperature, n};
  T* const out = pi + blockIdx.x * call.elements();
  double* u = rows + blockIdx.x * potentials;
  double* v = columns + blockIdx.x * potentials;
  if (!are_usable(a, n, &is_bad)) {
    for_each_element(n, [&](int i, int j) { out[int64_t{i} * n + j] = static_cast<T>(kNaN); });
    for (int64_t k = threadIdx.x; k < potentials; k += kThreads) u[k] = v[k] = kNaN;
    return;
  }
  for_each_row<Largest>(n, a, [&](int i, double largest) { u[i] = largest; });
  for_each_row<Sum>(
      n, [&](int i, int j) { return simd_exp(a(i, j) - u[i]); },
      [&](int i, double sum) { u[i] += std::log(sum); });
  const auto after_row = [&](int i, int j) { return a(i, j) - u[i]; };
  for_each_column<Largest>(n, parts, after_row, [&](int j, double largest) { v[j] = largest; });
  const auto rest = [&](int i, int j) { return simd_exp(a(i, j) - u[i] - v[j]); };
  for_each_column<Sum>(n, parts, rest, [&](int j, double sum) { v[j] += std::log(sum); });
  for (int64_t t = 1; t < call.iterations; ++t) {
    double* const next_u = u + step;
    for_each_row<Sum>(n, rest, [&](int i, double sum) { next_u[i] = u[i] + std::log(sum); });
    u = next_u;
    double* const next_v = v + step;
    for_each_column<Sum>(n, parts, rest,
                         [&](int j, double sum) { next_v[j] = v[j] + std::log(sum); });
    v = next_v;
  }
  for_each_element(n, [&](int i, int j) { out[int64_t{i} * n + j] = static_cast<T>(rest(i, j)); });
}

/// Registers: 48. Shared: 2052.
/// @param memory  [B, n * n + 2n] gradients of quotients, row and column potentials
template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const Call call, const T* __restrict__ scores, const double* __restrict__ rows,
                    const double* __restrict__ columns, const T* __restrict__ grad_pi,
                    T* __restrict__ grad_scores, double* memory) {
  __shared__ Parts parts;
  __shared__ int is_bad;
  const int n = call.n;
  const int64_t first = blockIdx.x * call.elements(), last = (call.iterations - 1) * n;
  const Quotients<T> a{scores + first, call.per_temperature, n};
  T* const out = grad_scores + first;
  if (!are_usable(a, n, &is_bad)) {
    for_each_element(n, [&](int i, int j) { out[int64_t{i} * n + j] = static_cast<T>(kNaN); });
    return;
  }
  double* const grad = memory + blockIdx.x * (call.elements() + 2 * n);
  double* const du = grad + call.elements();
  double* const dv = du + n;
  const double* u = rows + blockIdx.x * call.iterations * n + last;
  const double* v = columns + blockIdx.x * call.iterations * n + last;
  for_each_row<Sum>(
      n,
      [&](int i, int j) {
        const int64_t k = int64_t{i} * n + j;
        grad[k] = simd_exp(a(i, j) - u[i] - v[j]) * static_cast<double>(grad_pi[first + k]);
        return grad[k];
      },
      [&](int i, double sum) { du[i] = -sum; });
  for_each_column<Sum>(
      n, parts, [&](int i, int j) { return grad[int64_t{i} * n + j]; },
      [&](int j, double sum) { dv[j] = -sum; });
  const auto pull = [&](int i, int j, double potential, double d) {
    const double change = simd_exp(a(i, j) - potential) * d;
    grad[int64_t{i} * n + j] += change;
    return change;
  };
  for (int64_t t = call.iterations - 1; t >= 0; --t) {
    const bool is_last = t == call.iterations - 1, is_first = t == 0;
    for_each_row<Sum>(
        n, [&](int i, int j) { return pull(i, j, u[i] + v[j], dv[j]); },
        [&](int i, double sum) { du[i] = (is_last ? du[i] : 0.0) - sum; });
    v -= is_first ? 0 : n;
    for_each_column<Sum>(
        n, parts, [&](int i, int j) { return pull(i, j, u[i] + (is_first ? 0.0 : v[j]), du[i]); },
        [&](int j, double sum) { dv[j] = -sum; });
    u -= is_first ? 0 : n;
  }
  for_each_element(n, [&](int i, int j) {
    const int64_t k = int64_t{i} * n + j;
    out[k] = static_cast<T>(grad[k] * call.per_temperature);
  });
}

// ---- launch ------------------------------------------------------------------------------------
Call make_call(const char* operation, const DoublyStochasticShape& shape,
               const DoublyStochasticOptions& options) {
  require(shape.size <= std::numeric_limits<int32_t>::max(), operation, "size", shape.size,
          "exceeds 2147483647 on a GPU");
  return {1 / options.temperature, options.iterations, static_cast<int>(shape.size)};
}

}  // namespace

void cuda::doubly_stochastic(const DoublyStochasticShape& shape,
                             const DoublyStochasticOptions& options, DType dtype,
                             const void* scores, void* pi, double* rows, double* columns,
                             const Stream& stream) {
  constexpr const char* kOperation = "doubly_stochastic";
  const Call call = make_call(kOperation, shape, options);
  const int64_t B = shape.num_matrices, n = shape.size;
  const bool is_kept = rows != nullptr;
  DeviceMemory potentials;
  if (!is_kept && B > 0) {
    potentials = DeviceMemory(2 * B * n * int64_t{sizeof(double)}, stream);
    rows = potentials.as<double>();
    columns = rows + B * n;
  }
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    launch(kOperation, &forward_kernel<T>, B, kThreads, stream, call, static_cast<const T*>(scores),
           static_cast<T*>(pi), rows, columns, is_kept ? n : 0);
  });
}

void cuda::doubly_stochastic_backward(const DoublyStochasticShape& shape,
                                      const DoublyStochasticOptions& options, DType dtype,
                                      const void* scores, const double* rows, const double* columns,
                                      const void* grad_pi, void* grad_scores,
                                      const Stream& stream) {
  constexpr const char* kOperation = "doubly_stochastic_backward";
  const Call call = make_call(kOperation, shape, options);
  DeviceMemory memory;
  if (shape.num_matrices > 0) {
    memory = DeviceMemory(
        shape.num_matrices * (shape.size + 2) * shape.size * int64_t{sizeof(double)}, stream);
  }
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    launch(kOperation, &backward_kernel<T>, shape.num_matrices, kThreads, stream, call,
           static_cast<const T*>(scores), rows, columns, static_cast<const T*>(grad_pi),
           static_cast<T*>(grad_scores), memory.as<double>());
  });
}

}  // namespace perseid::kernels
