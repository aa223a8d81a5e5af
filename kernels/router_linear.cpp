// router_linear and its transpose: tiles of 6 rows by one vector of 64 bytes, built on one loop,
// sums[i] += a(i, k) * b[k, columns], in which a is broadcast and rows of b lie without gaps.
#include "kernels/router_linear.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/error.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kTileRows = 6;
constexpr int64_t kTokensPerTask = 96;
constexpr int64_t kTokensPerSum = 512;
constexpr int64_t kColumnsPerTask = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// 64 bytes of sums; compilers split them where registers are shorter.
template <typename A>
struct Vector {
  static constexpr int64_t kLanes = static_cast<int64_t>(64 / sizeof(A));
  typedef A Type __attribute__((vector_size(64), aligned(8), may_alias));
};

template <typename A>
PERSEID_INLINE void read(const A* p, typename Vector<A>::Type& out) {
  std::memcpy(&out, p, sizeof(out));
}
PERSEID_INLINE void read(const BFloat16* p, Vector<float>::Type& out) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Word __attribute__((vector_size(64)));
  Half bits;
  std::memcpy(&bits, p, sizeof(bits));
  const Word words = __builtin_convertvector(bits, Word) << 16;
  std::memcpy(&out, &words, sizeof(out));
}

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

/// Where a tile reads: a(i, k) = a[i * a_row + k * a_k], row k of b is b + k * b_k.
template <typename A, typename B>
struct TileInput {
  const A* a;
  int64_t a_row, a_k;
  const B* b;
  int64_t b_k;
  int64_t depth;
  const uint8_t* used;  ///< [depth] rows k to leave out are 0; null: none
};

/// sums[i] over k for kRows rows and one vector of columns; reads whole vectors of b.
template <int kRows, typename A, typename B>
PERSEID_INLINE void tile(const TileInput<A, B>& in, typename Vector<A>::Type (&sums)[kTileRows]) {
  typename Vector<A>::Type acc[kRows];
  for (int i = 0; i < kRows; ++i) acc[i] = typename Vector<A>::Type{};
  for (int64_t k = 0; k < in.depth; ++k) {
    if (in.used && !in.used[k]) continue;
    typename Vector<A>::Type row;
    read(in.b + k * in.b_k, row);
    const A* const a = in.a + k * in.a_k;
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) acc[i] += a[i * in.a_row] * row;
  }
  for (int i = 0; i < kRows; ++i) sums[i] = acc[i];
}

template <typename A, typename B>
PERSEID_INLINE void tile(int64_t rows, const TileInput<A, B>& in,
                         typename Vector<A>::Type (&sums)[kTileRows]) {
  switch (rows) {
    case 1:
      return tile<1>(in, sums);
    case 2:
      return tile<2>(in, sums);
    case 3:
      return tile<3>(in, sums);
    case 4:
      return tile<4>(in, sums);
    case 5:
      return tile<5>(in, sums);
    default:
      return tile<6>(in, sums);
  }
}

/// The last columns of rows whose number is no multiple of a vector, copied into whole vectors.
template <typename T>
void copy_tail(const T* rows, int64_t num_rows, int64_t width, int64_t lanes,
               std::vector<T>& tail) {
  const int64_t first = width / lanes * lanes;
  tail.assign(static_cast<size_t>(num_rows * lanes), T{});
  for (int64_t k = 0; k < num_rows; ++k) {
    std::copy(rows + k * width + first, rows + (k + 1) * width,
              tail.data() + static_cast<size_t>(k * lanes));
  }
}

// ---- forward ----

/// Logits of tokens [begin, end). `columns` is the weight as [vector, D, lanes], 0 behind E.
template <typename T, typename A>
PERSEID_SIMD_CLONES void forward_block(const RouterLinearShape& shape, const T* tokens,
                                       const A* columns, const A* bias, A* logits, int64_t begin,
                                       int64_t end) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  const int64_t D = shape.d_model, E = shape.num_experts;
  std::vector<A> converted(std::is_same_v<T, A> ? 0 : static_cast<size_t>(kTileRows * D));
  for (int64_t t = begin; t < end; t += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - t);
    const A* a;
    if constexpr (std::is_same_v<T, A>) {
      a = tokens + t * D;
    } else {
      for (int64_t i = 0; i < rows * D; ++i) {
        converted[static_cast<size_t>(i)] = load(tokens + t * D + i);
      }
      a = converted.data();
    }
    for (int64_t e = 0; e < E; e += kLanes) {
      typename Vector<A>::Type sums[kTileRows];
      tile(rows, TileInput<A, A>{a, D, 1, columns + e * D, kLanes, D, nullptr}, sums);
      const int64_t count = std::min(kLanes, E - e);
      for (int64_t i = 0; i < rows; ++i) {
        A* const out = logits + (t + i) * E + e;
        write<A>(out, sums[i], count);
        for (int64_t c = 0; bias && c < count; ++c) out[c] += bias[e + c];
      }
    }
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

template <typename T, typename A>
PERSEID_SIMD_CLONES void tokens_block(const RouterLinearShape& shape, const A* weight,
                                      const A* tail, const A* grad_logits, T* grad_tokens,
                                      int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  const int64_t D = shape.d_model, E = shape.num_experts;
  for (int64_t t = begin; t < end; t += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - t);
    for (int64_t d = 0; d < D; d += kLanes) {
      const bool whole = d + kLanes <= D;
      typename Vector<A>::Type sums[kTileRows];
      tile(rows,
           TileInput<A, A>{grad_logits + t * E, E, 1, whole ? weight + d : tail, whole ? D : kLanes,
                           E, nullptr},
           sums);
      for (int64_t i = 0; i < rows; ++i) {
        write<A>(grad_tokens + (t + i) * D + d, sums[i], std::min(kLanes, D - d));
      }
    }
  }
}

/// Sums over tokens [begin, end) for columns [left, right) of the gradient of the weight.
template <typename T, typename A>
PERSEID_SIMD_CLONES void weight_block(const RouterLinearShape& shape, const T* tokens,
                                      const T* tail, const uint8_t* valid, const A* grad_logits,
                                      A* sum, int64_t begin, int64_t end, int64_t left,
                                      int64_t right) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  const int64_t D = shape.d_model, E = shape.num_experts;
  for (int64_t d = left; d < right; d += kLanes) {
    const bool whole = d + kLanes <= D;
    for (int64_t e = 0; e < E; e += kTileRows) {
      const int64_t rows = std::min(kTileRows, E - e);
      typename Vector<A>::Type sums[kTileRows];
      tile(rows,
           TileInput<A, T>{grad_logits + begin * E + e, 1, E,
                           whole ? tokens + begin * D + d : tail + begin * kLanes,
                           whole ? D : kLanes, end - begin, valid ? valid + begin : nullptr},
           sums);
      for (int64_t i = 0; i < rows; ++i) {
        write<A>(sum + (e + i) * D + d, sums[i], std::min(kLanes, D - d));
      }
    }
  }
}

template <typename T, typename A>
void backward_tokens(const RouterLinearShape& shape, const A* weight, const A* grad_logits,
                     T* grad_tokens) {
  std::vector<A> tail;
  copy_tail(weight, shape.num_experts, shape.d_model, Vector<A>::kLanes, tail);
  parallel_tasks(ceil_div(shape.num_tokens, kTokensPerTask), [&](int64_t task) {
    const int64_t begin = task * kTokensPerTask;
    tokens_block(shape, weight, tail.data(), grad_logits, grad_tokens, begin,
                 std::min(shape.num_tokens, begin + kTokensPerTask));
  });
}

template <typename T, typename A>
void backward_weight(const RouterLinearShape& shape, const T* tokens, const uint8_t* valid,
                     const A* grad_logits, A* grad_weight) {
  const int64_t size = shape.num_experts * shape.d_model;
  const int64_t num_sums = std::max<int64_t>(1, ceil_div(shape.num_tokens, kTokensPerSum));
  const int64_t num_columns = ceil_div(shape.d_model, kColumnsPerTask);
  std::vector<T> tail;
  if (shape.d_model % Vector<A>::kLanes != 0) {
    copy_tail(tokens, shape.num_tokens, shape.d_model, Vector<A>::kLanes, tail);
  }
  std::vector<A> further(static_cast<size_t>((num_sums - 1) * size));
  parallel_tasks(num_sums * num_columns, [&](int64_t task) {
    const int64_t block = task / num_columns, left = task % num_columns * kColumnsPerTask;
    weight_block(shape, tokens, tail.data(), valid, grad_logits,
                 block == 0 ? grad_weight : further.data() + (block - 1) * size,
                 block * kTokensPerSum, std::min(shape.num_tokens, (block + 1) * kTokensPerSum),
                 left, std::min(shape.d_model, left + kColumnsPerTask));
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

/// Calls body(T{}, A{}) with the element types of tokens and of the arithmetic.
template <typename Body>
void dispatch_types(DType dtype, DType tokens_dtype, Body body) {
  if (dtype == DType::kFloat64 && tokens_dtype == DType::kFloat64) return body(double{}, double{});
  if (dtype == DType::kFloat32 && tokens_dtype == DType::kFloat32) return body(float{}, float{});
  if (dtype == DType::kFloat32 && tokens_dtype == DType::kBFloat16) {
    return body(BFloat16{}, float{});
  }
  throw ConfigError(ErrorDetail{"router_linear", "tokens_dtype", dtype_name(tokens_dtype),
                                std::string("does not go with logits in ") + dtype_name(dtype)});
}

}  // namespace

void router_linear(const RouterLinearShape& shape, DType dtype, DType tokens_dtype,
                   const void* tokens, const void* weight, const void* bias, void* logits,
                   Stream /*stream*/) {
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
                            void* grad_bias, Stream /*stream*/) {
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

// ---- reference ----

void router_linear_reference(const RouterLinearShape& shape, DType dtype, DType tokens_dtype,
                             const void* tokens, const void* weight, const void* bias,
                             void* logits) {
  dispatch_types(dtype, tokens_dtype, [&](auto t_tag, auto a_tag) {
    using T = decltype(t_tag);
    using A = decltype(a_tag);
    const auto* x = static_cast<const T*>(tokens);
    const auto* w = static_cast<const A*>(weight);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t e = 0; e < shape.num_experts; ++e) {
        double sum = bias ? static_cast<double>(static_cast<const A*>(bias)[e]) : 0.0;
        for (int64_t d = 0; d < shape.d_model; ++d) {
          sum += static_cast<double>(load(x + t * shape.d_model + d)) *
                 static_cast<double>(w[e * shape.d_model + d]);
        }
        static_cast<A*>(logits)[t * shape.num_experts + e] = static_cast<A>(sum);
      }
    }
  });
}

void router_linear_backward_reference(const RouterLinearShape& shape, DType dtype,
                                      DType tokens_dtype, const void* tokens, const void* weight,
                                      const uint8_t* valid, const void* grad_logits,
                                      void* grad_tokens, void* grad_weight, void* grad_bias) {
  dispatch_types(dtype, tokens_dtype, [&](auto t_tag, auto a_tag) {
    using T = decltype(t_tag);
    using A = decltype(a_tag);
    const int64_t num_tokens = shape.num_tokens, E = shape.num_experts, D = shape.d_model;
    const auto grad = [&](int64_t t, int64_t e) {
      return static_cast<double>(static_cast<const A*>(grad_logits)[t * E + e]);
    };
    for (int64_t t = 0; grad_tokens && t < num_tokens; ++t) {
      for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t e = 0; e < E; ++e) {
          sum += grad(t, e) * static_cast<double>(static_cast<const A*>(weight)[e * D + d]);
        }
        store(static_cast<T*>(grad_tokens) + t * D + d, static_cast<A>(sum));
      }
    }
    for (int64_t e = 0; e < E; ++e) {
      double bias_sum = 0;
      for (int64_t d = 0; d < (grad_weight ? D : 0); ++d) {
        double sum = 0;
        for (int64_t t = 0; t < num_tokens; ++t) {
          if (valid && !valid[t]) continue;
          sum += grad(t, e) * static_cast<double>(load(static_cast<const T*>(tokens) + t * D + d));
        }
        static_cast<A*>(grad_weight)[e * D + d] = static_cast<A>(sum);
      }
      for (int64_t t = 0; t < num_tokens; ++t) {
        if (!valid || valid[t]) bias_sum += grad(t, e);
      }
      if (grad_bias) static_cast<A*>(grad_bias)[e] = static_cast<A>(bias_sum);
    }
  });
}

}  // namespace perseid::kernels
