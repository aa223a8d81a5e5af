// router_linear and its transpose. All three products are sums over k of a(i, k) * b(k, column):
// tiles of 6 rows i by one vector of columns, a is broadcast, and b lies in vectors, [vector, k,
// lanes].
#include "kernels/router_linear.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/parallel.h"
#include "kernels/router_linear_types.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kTileRows = 6;
constexpr int64_t kTokensPerTask = 96;
constexpr int64_t kTokensPerSum = 512;
constexpr int64_t kVectorsPerTask = 8;         ///< columns of the gradient of the weight
constexpr int64_t kTilesPerPanel = 8;          ///< of logits: they are read a cache line at a time
constexpr int64_t kBytesPerChunk = 512 << 10;  ///< of b, which stays in the cache meanwhile

/// 64 bytes of sums; compilers split them where registers are shorter.
template <typename A>
struct Vector {
  static constexpr int64_t kLanes = static_cast<int64_t>(64 / sizeof(A));
  typedef A Type __attribute__((vector_size(64), aligned(8), may_alias));
};

/// The first `count` values, a whole vector in the usual case.
template <typename A, typename Out>
PERSEID_INLINE void write(Out* p, const typename Vector<A>::Type& values, int64_t count) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  alignas(64) A lanes[kLanes];
  std::memcpy(lanes, &values, sizeof(lanes));
  if (count == kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) store(p + i, lanes[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) store(p + i, lanes[i]);
  }
}

/// sums[i] over k for kRows rows and one vector of columns.
template <int kRows, typename A>
PERSEID_INLINE void tile(const A* a, int64_t a_row, int64_t a_k, const A* b, int64_t depth,
                         typename Vector<A>::Type (&sums)[kTileRows]) {
  typename Vector<A>::Type acc[kRows];
  for (int i = 0; i < kRows; ++i) acc[i] = typename Vector<A>::Type{};
  for (int64_t k = 0; k < depth; ++k) {
    typename Vector<A>::Type row;
    std::memcpy(&row, b + k * Vector<A>::kLanes, sizeof(row));
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) acc[i] += a[i * a_row + k * a_k] * row;
  }
  for (int i = 0; i < kRows; ++i) sums[i] = acc[i];
}

template <typename A>
PERSEID_INLINE void tile(int64_t rows, const A* a, int64_t a_row, int64_t a_k, const A* b,
                         int64_t depth, typename Vector<A>::Type (&sums)[kTileRows]) {
  switch (rows) {
    case 1:
      return tile<1>(a, a_row, a_k, b, depth, sums);
    case 2:
      return tile<2>(a, a_row, a_k, b, depth, sums);
    case 3:
      return tile<3>(a, a_row, a_k, b, depth, sums);
    case 4:
      return tile<4>(a, a_row, a_k, b, depth, sums);
    case 5:
      return tile<5>(a, a_row, a_k, b, depth, sums);
    default:
      return tile<6>(a, a_row, a_k, b, depth, sums);
  }
}

/// out [num_rows, width] = a [num_rows, depth] b + bias, for b in vectors.
template <typename A, typename Out>
PERSEID_INLINE void multiply_rows(const A* a, int64_t num_rows, int64_t depth, const A* b,
                                  const A* bias, int64_t width, Out* out) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  const int64_t per_chunk =
      std::max<int64_t>(1, kBytesPerChunk / (depth * kLanes * static_cast<int64_t>(sizeof(A)))) *
      kLanes;
  for (int64_t first = 0; first < width; first += per_chunk) {
    const int64_t last = std::min(width, first + per_chunk);
    for (int64_t r = 0; r < num_rows; r += kTileRows) {
      const int64_t rows = std::min(kTileRows, num_rows - r);
      for (int64_t c = first; c < last; c += kLanes) {
        typename Vector<A>::Type sums[kTileRows];
        tile(rows, a + r * depth, depth, 1, b + c * depth, depth, sums);
        const int64_t count = std::min(kLanes, width - c);
        for (int64_t i = 0; i < rows; ++i) {
          Out* const p = out + (r + i) * width + c;
          write<A>(p, sums[i], count);
          if constexpr (std::is_same_v<A, Out>) {
            for (int64_t j = 0; bias && j < count; ++j) p[j] += bias[c + j];
          }
        }
      }
    }
  }
}

// ---- forward ----

template <typename T, typename A>
PERSEID_SIMD_CLONES void forward_block(const RouterLinearShape& shape, const T* tokens,
                                       const A* columns, const A* bias, A* logits, int64_t begin,
                                       int64_t end) {
  const int64_t D = shape.d_model, E = shape.num_experts;
  const T* const rows = tokens + begin * D;
  if constexpr (std::is_same_v<T, A>) {
    multiply_rows(rows, end - begin, D, columns, bias, E, logits + begin * E);
  } else {
    const std::unique_ptr<A[]> converted(new A[static_cast<size_t>((end - begin) * D)]);
    A* const values = converted.get();
#pragma omp simd
    for (int64_t i = 0; i < (end - begin) * D; ++i) values[i] = load(rows + i);
    multiply_rows(values, end - begin, D, columns, bias, E, logits + begin * E);
  }
}

template <typename T, typename A>
void forward(const RouterLinearShape& shape, const T* tokens, const A* weight, const A* bias,
             A* logits) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  const int64_t D = shape.d_model, E = shape.num_experts;
  std::vector<A> columns(static_cast<size_t>(ceil_div(E, kLanes) * kLanes * D));
  for (int64_t e = 0; e < E; ++e) {
    A* const out = columns.data() + e / kLanes * kLanes * D + e % kLanes;
    for (int64_t d = 0; d < D; ++d) out[d * kLanes] = weight[e * D + d];
  }
  parallel_tasks(ceil_div(shape.num_tokens, kTokensPerTask), [&](int64_t task) {
    const int64_t begin = task * kTokensPerTask;
    forward_block(shape, tokens, columns.data(), bias, logits, begin,
                  std::min(shape.num_tokens, begin + kTokensPerTask));
  });
}

// ---- backward ----

/// Columns [left, right) of rows [num_rows, width] in vectors, 0 behind the last column and in rows
/// that are not used (null: all are).
template <typename T, typename A>
PERSEID_INLINE void pack_columns(const T* rows, int64_t num_rows, int64_t width, int64_t left,
                                 int64_t right, const uint8_t* used, A* out) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  for (int64_t c = left; c < right; c += kLanes, out += num_rows * kLanes) {
    const int64_t count = std::min(kLanes, right - c);
    for (int64_t r = 0; r < num_rows; ++r) {
      const T* const from = rows + r * width + c;
      A* const to = out + r * kLanes;
      if (used && !used[r]) {
        std::fill_n(to, kLanes, A{});
      } else if (count == kLanes) {
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<A>(load(from + i));
      } else {
        for (int64_t i = 0; i < kLanes; ++i)
          to[i] = i < count ? static_cast<A>(load(from + i)) : A{};
      }
    }
  }
}

template <typename T, typename A>
PERSEID_SIMD_CLONES void tokens_block(const RouterLinearShape& shape, const A* columns,
                                      const A* grad_logits, T* grad_tokens, int64_t begin,
                                      int64_t end) {
  const int64_t D = shape.d_model, E = shape.num_experts;
  multiply_rows(grad_logits + begin * E, end - begin, E, columns, static_cast<const A*>(nullptr), D,
                grad_tokens + begin * D);
}

template <typename T, typename A>
void backward_tokens(const RouterLinearShape& shape, const A* weight, const A* grad_logits,
                     T* grad_tokens) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  const int64_t D = shape.d_model, E = shape.num_experts;
  std::vector<A> columns(static_cast<size_t>(ceil_div(D, kLanes) * kLanes * E));
  pack_columns(weight, E, D, 0, D, nullptr, columns.data());
  parallel_tasks(ceil_div(shape.num_tokens, kTokensPerTask), [&](int64_t task) {
    const int64_t begin = task * kTokensPerTask;
    tokens_block(shape, columns.data(), grad_logits, grad_tokens, begin,
                 std::min(shape.num_tokens, begin + kTokensPerTask));
  });
}

/// Columns [left, right) of rows [num_rows, width] as tiles [tile, num_rows, kTileRows], with zeros
/// as in pack_columns.
template <typename A>
PERSEID_INLINE void pack_tiles(const A* rows, int64_t num_rows, int64_t width, int64_t left,
                               int64_t right, const uint8_t* used, A* out) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const bool is_used = !used || used[r];
    A* to = out + r * kTileRows;
    for (int64_t c = left; c < right; c += kTileRows, to += num_rows * kTileRows) {
      const A* const from = rows + r * width + c;
      if (is_used && c + kTileRows <= right) {
        std::copy_n(from, kTileRows, to);
      } else {
        for (int64_t i = 0; i < kTileRows; ++i) to[i] = is_used && c + i < right ? from[i] : A{};
      }
    }
  }
}

/// Sums over tokens [begin, end) for columns [left, right) of the gradient of the weight.
template <typename T, typename A>
PERSEID_SIMD_CLONES void weight_block(const RouterLinearShape& shape, const T* tokens,
                                      const uint8_t* valid, const A* grad_logits, A* sum,
                                      int64_t begin, int64_t end, int64_t left, int64_t right) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  constexpr int64_t kPanel = kTilesPerPanel * kTileRows;
  const int64_t D = shape.d_model, E = shape.num_experts, depth = end - begin;
  const uint8_t* const used = valid ? valid + begin : nullptr;
  const std::unique_ptr<A[]> columns(
      new A[static_cast<size_t>(ceil_div(right - left, kLanes) * kLanes * depth)]);
  const std::unique_ptr<A[]> panel(new A[static_cast<size_t>(
      std::min(kTilesPerPanel, ceil_div(E, kTileRows)) * kTileRows * depth)]);
  pack_columns(tokens + begin * D, depth, D, left, right, used, columns.get());
  for (int64_t first = 0; first < E; first += kPanel) {
    const int64_t last = std::min(E, first + kPanel);
    pack_tiles(grad_logits + begin * E, depth, E, first, last, used, panel.get());
    for (int64_t e = first; e < last; e += kTileRows) {
      const int64_t rows = std::min(kTileRows, last - e);
      for (int64_t d = left; d < right; d += kLanes) {
        typename Vector<A>::Type sums[kTileRows];
        tile(rows, panel.get() + (e - first) * depth, 1, kTileRows,
             columns.get() + (d - left) * depth, depth, sums);
        for (int64_t i = 0; i < rows; ++i) {
          write<A>(sum + (e + i) * D + d, sums[i], std::min(kLanes, D - d));
        }
      }
    }
  }
}

template <typename T, typename A>
void backward_weight(const RouterLinearShape& shape, const T* tokens, const uint8_t* valid,
                     const A* grad_logits, A* grad_weight) {
  constexpr int64_t kColumns = kVectorsPerTask * Vector<A>::kLanes;
  const int64_t size = shape.num_experts * shape.d_model;
  const int64_t num_sums = std::max<int64_t>(1, ceil_div(shape.num_tokens, kTokensPerSum));
  const int64_t num_columns = ceil_div(shape.d_model, kColumns);
  std::vector<A> further(static_cast<size_t>((num_sums - 1) * size));
  parallel_tasks(num_sums * num_columns, [&](int64_t task) {
    const int64_t block = task / num_columns, left = task % num_columns * kColumns;
    weight_block(shape, tokens, valid, grad_logits,
                 block == 0 ? grad_weight : further.data() + (block - 1) * size,
                 block * kTokensPerSum, std::min(shape.num_tokens, (block + 1) * kTokensPerSum),
                 left, std::min(shape.d_model, left + kColumns));
  });
  for (int64_t block = 0; block + 1 < num_sums; ++block) {
    const A* const more = further.data() + block * size;
    for (int64_t i = 0; i < size; ++i) grad_weight[i] += more[i];
  }
}

template <typename A>
void backward_bias(const RouterLinearShape& shape, const uint8_t* valid, const A* grad_logits,
                   A* grad_bias) {
  std::vector<double> sums(static_cast<size_t>(shape.num_experts));
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    if (valid && !valid[t]) continue;
    for (int64_t e = 0; e < shape.num_experts; ++e) {
      sums[static_cast<size_t>(e)] += static_cast<double>(grad_logits[t * shape.num_experts + e]);
    }
  }
  std::copy(sums.begin(), sums.end(), grad_bias);
}

constexpr const char* kOnCuda = "use LibTorch's matrix product there, or give it CPU memory";

}  // namespace

void router_linear(const RouterLinearShape& shape, DType dtype, DType tokens_dtype,
                   const void* tokens, const void* weight, const void* bias, void* logits,
                   Stream stream) {
  require_device(stream, "router_linear", kOnCuda);
  dispatch_types(dtype, tokens_dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    forward(shape, static_cast<const T*>(tokens), static_cast<const A*>(weight),
            static_cast<const A*>(bias), static_cast<A*>(logits));
  });
}

void router_linear_backward(const RouterLinearShape& shape, DType dtype, DType tokens_dtype,
                            const void* tokens, const void* weight, const uint8_t* valid,
                            const void* grad_logits, void* grad_tokens, void* grad_weight,
                            void* grad_bias, Stream stream) {
  require_device(stream, "router_linear_backward", kOnCuda);
  dispatch_types(dtype, tokens_dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const A* const grad = static_cast<const A*>(grad_logits);
    if (grad_tokens) {
      backward_tokens(shape, static_cast<const A*>(weight), grad, static_cast<T*>(grad_tokens));
    }
    if (grad_weight) {
      backward_weight(shape, static_cast<const T*>(tokens), valid, grad,
                      static_cast<A*>(grad_weight));
    }
    if (grad_bias) backward_bias(shape, valid, grad, static_cast<A*>(grad_bias));
  });
}

}  // namespace perseid::kernels
