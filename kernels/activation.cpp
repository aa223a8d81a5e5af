// activation_forward, activation_backward: one pass over rows, element by element, arithmetic in
// float32 (float64 for fp64). Forward reads num_rows * (gated ? 2F : F) elements and writes
// num_rows * F; backward reads F more per row and writes up to 3F. Rows are dealt to threads; a
// row's sum is formed by one thread in one order, so results do not depend on the number of
// threads.
#include "kernels/activation.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "kernels/activation_point.h"
#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/lanes.h"
#include "kernels/parallel.h"

namespace perseid::kernels {
namespace {

/// Fewer elements take less time than waking a thread.
constexpr int64_t kElementsPerThread = int64_t{1} << 14;

/// Calls body(ActivationTag<...>{}, std::bool_constant<gated>{}).
template <typename Body>
PERSEID_INLINE void dispatch_shape(const ActivationShape& shape, Body body) {
  const auto with_tag = [&](auto tag) __attribute__((always_inline)) {
    if (shape.gated) {
      body(tag, std::true_type{});
    } else {
      body(tag, std::false_type{});
    }
  };
  switch (shape.activation) {
    case Activation::kIdentity:
      return with_tag(ActivationTag<Activation::kIdentity>{});
    case Activation::kRelu:
      return with_tag(ActivationTag<Activation::kRelu>{});
    case Activation::kGelu:
      return with_tag(ActivationTag<Activation::kGelu>{});
    case Activation::kSilu:
      return with_tag(ActivationTag<Activation::kSilu>{});
  }
}

// ---- rows ----
// Tiles of gate and up lie far apart, which hides the pattern from the hardware: each tile asks for
// the same one of the next row.

template <Activation kActivation, bool kGated, typename T>
PERSEID_INLINE void forward_row(const T* pre, Accumulate<T> weight, int64_t d_ff, T* out) {
  using A = Accumulate<T>;
  Tile<T> gate_tile, up_tile, out_tile;
  const int64_t width = kGated ? 2 * d_ff : d_ff;
  const int64_t step = std::min(kTileMax, d_ff);
  for (int64_t at = 0; at < d_ff; at += step) {
    const int64_t count = std::min(step, d_ff - at);
    prefetch_for_read(pre + width + at, count);
    if constexpr (kGated) prefetch_for_read(pre + width + d_ff + at, count);
    const A* const gate = read_tile(pre + at, count, gate_tile);
    const A* const up = kGated ? read_tile(pre + d_ff + at, count, up_tile) : nullptr;
    A* const result = begin_tile(out + at, out_tile);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      A act = evaluate<kActivation>(gate[i]).value;
      if constexpr (kGated) act *= up[i];
      result[i] = weight * act;
    }
    write_tile(out + at, count, out_tile);
  }
}

/// Returns <grad, act>. `weighted_act` may be `grad`: an element is read before it is written.
template <Activation kActivation, bool kGated, typename T>
PERSEID_INLINE Accumulate<T> backward_row(const T* pre, Accumulate<T> weight, const T* grad_act,
                                          int64_t d_ff, T* grad_pre, T* weighted_act) {
  using A = Accumulate<T>;
  Tile<T> gate_tile, up_tile, grad_tile, grad_gate_tile, grad_up_tile, weighted_tile;
  const int64_t width = kGated ? 2 * d_ff : d_ff;
  const int64_t step = kIsConverted<T> ? std::min(kTileMax, d_ff) : d_ff;
  A sum = 0;
  for (int64_t at = 0; at < d_ff; at += step) {
    const int64_t count = std::min(step, d_ff - at);
    if constexpr (kIsConverted<T>) {  // a loop over whole rows is foreseen by the hardware
      prefetch_for_read(pre + width + at, count);
      if constexpr (kGated) prefetch_for_read(pre + width + d_ff + at, count);
      prefetch_for_read(grad_act + d_ff + at, count);
      prefetch_for_write(grad_pre + width + at, count);
      if constexpr (kGated) prefetch_for_write(grad_pre + width + d_ff + at, count);
      prefetch_for_write(weighted_act + d_ff + at, count);
    }
    const A* const gate = read_tile(pre + at, count, gate_tile);
    const A* const up = kGated ? read_tile(pre + d_ff + at, count, up_tile) : nullptr;
    const A* const grad = read_tile(grad_act + at, count, grad_tile);
    A* const grad_gate = begin_tile(grad_pre + at, grad_gate_tile);
    A* const grad_up = kGated ? begin_tile(grad_pre + d_ff + at, grad_up_tile) : nullptr;
    A* const weighted = begin_tile(weighted_act + at, weighted_tile);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      const Point<A> f = evaluate<kActivation>(gate[i]);
      const A scaled = weight * grad[i];
      A act = f.value;
      A grad_f = scaled;
      if constexpr (kGated) {
        act *= up[i];
        grad_f *= up[i];
        grad_up[i] = scaled * f.value;
      }
      sum += grad[i] * act;
      grad_gate[i] = grad_f * f.slope;
      weighted[i] = weight * act;
    }
    write_tile(grad_pre + at, count, grad_gate_tile);
    if constexpr (kGated) write_tile(grad_pre + d_ff + at, count, grad_up_tile);
    write_tile(weighted_act + at, count, weighted_tile);
  }
  return sum;
}

int64_t pre_width(const ActivationShape& shape) {
  return shape.gated ? 2 * shape.d_ff : shape.d_ff;
}

template <typename T>
PERSEID_SIMD_CLONES void forward_rows(const ActivationShape& shape, const T* pre,
                                      const Accumulate<T>* weights, T* out, int64_t begin,
                                      int64_t end) {
  const int64_t width = shape.gated ? 2 * shape.d_ff : shape.d_ff;
  dispatch_shape(
      shape, [&](auto tag, auto gated) __attribute__((always_inline)) {
        for (int64_t r = begin; r < end; ++r) {
          const Accumulate<T> weight = weights == nullptr ? Accumulate<T>{1} : weights[r];
          forward_row<decltype(tag)::value, decltype(gated)::value>(
              pre + r * width, weight, shape.d_ff, out + r * shape.d_ff);
        }
      });
}

/// Null outputs go to one row of scratch, [3F], that is written over and over and stays in the
/// cache.
template <typename T>
struct BackwardBuffers {
  const T* pre;
  const Accumulate<T>* weights;
  const T* grad_act;
  T* grad_pre;
  T* weighted_act;
  Accumulate<T>* grad_weights;
};

template <typename T>
PERSEID_SIMD_CLONES void backward_rows(const ActivationShape& shape, const BackwardBuffers<T>& at,
                                       T* scratch, int64_t begin, int64_t end) {
  const int64_t d_ff = shape.d_ff;
  const int64_t width = shape.gated ? 2 * d_ff : d_ff;
  dispatch_shape(
      shape, [&](auto tag, auto gated) __attribute__((always_inline)) {
        for (int64_t r = begin; r < end; ++r) {
          const Accumulate<T> sum = backward_row<decltype(tag)::value, decltype(gated)::value>(
              at.pre + r * width, at.weights == nullptr ? Accumulate<T>{1} : at.weights[r],
              at.grad_act + r * d_ff, d_ff,
              at.grad_pre == nullptr ? scratch : at.grad_pre + r * width,
              at.weighted_act == nullptr ? scratch + 2 * d_ff : at.weighted_act + r * d_ff);
          if (at.grad_weights != nullptr) at.grad_weights[r] = sum;
        }
      });
}

// ---- checks ----
void check(const char* operation, const ActivationShape& shape, const void* pre) {
  require_count(operation, "num_rows", shape.num_rows);
  require_count(operation, "d_ff", shape.d_ff);
  require(shape.activation <= Activation::kSilu, operation, "activation",
          static_cast<int>(shape.activation), "is unknown; choose 0 to 3");
  require_buffer(operation, "pre", pre, shape.num_rows * pre_width(shape));
}

int64_t rows_per_thread(const ActivationShape& shape) {
  return ceil_div(kElementsPerThread, std::max<int64_t>(shape.d_ff, 1));
}

/// f and f' in double, by their definitions.
Point<double> evaluate_reference(Activation activation, double x) {
  switch (activation) {
    case Activation::kIdentity:
      return {x, 1.0};
    case Activation::kRelu:
      return {x < 0.0 ? 0.0 : x, x <= 0.0 ? 0.0 : 1.0};
    case Activation::kGelu: {
      const double cdf = 0.5 * std::erfc(-x / std::sqrt(2.0));
      const double density = std::exp(-0.5 * x * x) / std::sqrt(2.0 * 3.14159265358979323846);
      return {x * cdf, cdf + x * density};
    }
    case Activation::kSilu: {
      const double s = 1.0 / (1.0 + std::exp(-x));
      return {x * s, s * (1.0 + x * (1.0 - s))};
    }
  }
  return {};
}

}  // namespace

// ---- forward ----
void activation_forward(const ActivationShape& shape, DType dtype, const void* pre,
                        const void* weights, void* out, Stream stream) {
  constexpr const char* kOperation = "activation_forward";
  check(kOperation, shape, pre);
  require_buffer(kOperation, "out", out, shape.num_rows * shape.d_ff);
  if (stream.device == Device::kCuda) {
    return cuda::activation_forward(shape, dtype, pre, weights, out, stream);
  }
  dispatch_dtype(dtype, kOperation, [&](auto element) {
    using T = decltype(element);
    parallel_for(0, shape.num_rows, rows_per_thread(shape), [&](int64_t begin, int64_t end) {
      forward_rows(shape, static_cast<const T*>(pre), static_cast<const Accumulate<T>*>(weights),
                   static_cast<T*>(out), begin, end);
    });
  });
}

void activation_forward_reference(const ActivationShape& shape, DType dtype, const void* pre,
                                  const void* weights, void* out) {
  check("activation_forward", shape, pre);
  dispatch_dtype(dtype, "activation_forward", [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    for (int64_t r = 0; r < shape.num_rows; ++r) {
      const T* const gate = static_cast<const T*>(pre) + r * pre_width(shape);
      const double weight = weights == nullptr ? 1.0 : static_cast<const A*>(weights)[r];
      for (int64_t i = 0; i < shape.d_ff; ++i) {
        const double f = evaluate_reference(shape.activation, load(gate + i)).value;
        const double act = shape.gated ? f * load(gate + shape.d_ff + i) : f;
        store(static_cast<T*>(out) + r * shape.d_ff + i, static_cast<A>(weight * act));
      }
    }
  });
}

// ---- backward ----
void activation_backward(const ActivationShape& shape, DType dtype, const void* pre,
                         const void* weights, const void* grad_act, void* grad_pre,
                         void* weighted_act, void* grad_weights, Stream stream) {
  constexpr const char* kOperation = "activation_backward";
  check(kOperation, shape, pre);
  require_buffer(kOperation, "grad_act", grad_act, shape.num_rows * shape.d_ff);
  if (stream.device == Device::kCuda) {
    return cuda::activation_backward(shape, dtype, pre, weights, grad_act, grad_pre, weighted_act,
                                     grad_weights, stream);
  }
  dispatch_dtype(dtype, kOperation, [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const BackwardBuffers<T> buffers{
        static_cast<const T*>(pre), static_cast<const A*>(weights), static_cast<const T*>(grad_act),
        static_cast<T*>(grad_pre),  static_cast<T*>(weighted_act),  static_cast<A*>(grad_weights)};
    const bool needs_scratch = grad_pre == nullptr || weighted_act == nullptr;
    parallel_for(0, shape.num_rows, rows_per_thread(shape), [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(needs_scratch ? static_cast<size_t>(3 * shape.d_ff) : 0);
      backward_rows(shape, buffers, scratch.data(), begin, end);
    });
  });
}

void activation_backward_reference(const ActivationShape& shape, DType dtype, const void* pre,
                                   const void* weights, const void* grad_act, void* grad_pre,
                                   void* weighted_act, void* grad_weights) {
  check("activation_backward", shape, pre);
  dispatch_dtype(dtype, "activation_backward", [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const int64_t d_ff = shape.d_ff;
    for (int64_t r = 0; r < shape.num_rows; ++r) {
      const T* const gate = static_cast<const T*>(pre) + r * pre_width(shape);
      T* const grad_gate =
          grad_pre == nullptr ? nullptr : static_cast<T*>(grad_pre) + r * pre_width(shape);
      const double weight = weights == nullptr ? 1.0 : static_cast<const A*>(weights)[r];
      double sum = 0;
      for (int64_t i = 0; i < d_ff; ++i) {
        const Point<double> f = evaluate_reference(shape.activation, load(gate + i));
        const double up = shape.gated ? load(gate + d_ff + i) : 1.0;
        const double grad = load(static_cast<const T*>(grad_act) + r * d_ff + i);
        sum += grad * f.value * up;
        if (grad_gate != nullptr) {
          store(grad_gate + i, static_cast<A>(weight * grad * up * f.slope));
          if (shape.gated) store(grad_gate + d_ff + i, static_cast<A>(weight * grad * f.value));
        }
        if (weighted_act != nullptr) {
          store(static_cast<T*>(weighted_act) + r * d_ff + i,
                static_cast<A>(weight * f.value * up));
        }
      }
      if (grad_weights != nullptr) static_cast<A*>(grad_weights)[r] = static_cast<A>(sum);
    }
  });
}

}  // namespace perseid::kernels
