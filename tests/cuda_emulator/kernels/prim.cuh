#pragma once
#include "kernels/launch.cuh"

// The emulator's kernels/prim.cuh: the pieces of CUB that kernels use, by shuffles and barriers,
// with CUB's signatures. Sums run in another order than CUB's.

namespace perseid::kernels::prim {

struct Plus {
  template <typename T>
  T operator()(const T& a, const T& b) const {
    return static_cast<T>(a + b);
  }
};
struct Maximum {
  template <typename T>
  T operator()(const T& a, const T& b) const {
    return a < b ? b : a;
  }
};
struct Minimum {
  template <typename T>
  T operator()(const T& a, const T& b) const {
    return b < a ? b : a;
  }
};

/// As in CUB the result is defined in the first lane of each logical warp; the others get rubbish.
template <typename T, int kWidth = 32>
class WarpReduce {
 public:
  struct TempStorage {};
  explicit WarpReduce(TempStorage&) {}
  template <typename Op>
  T Reduce(T value, Op op) {
    const int lane = cuda_emulator::lane(), first = lane / kWidth * kWidth;
    const unsigned group = kWidth == 32 ? 0xFFFFFFFFu : ((1u << kWidth) - 1u) << first;
    const uint64_t* const words =
        cuda_emulator::warp_exchange("WarpReduce", group, cuda_emulator::to_word(value));
    T result = cuda_emulator::from_word<T>(words[first]);
    for (int i = 1; i < kWidth; ++i) {
      result = op(result, cuda_emulator::from_word<T>(words[first + i]));
    }
    return lane == first ? result : T(-77);
  }
  T Sum(T value) { return Reduce(value, Plus()); }
};

/// As in CUB the result is defined in thread 0.
template <typename T, int kThreads>
class BlockReduce {
 public:
  struct TempStorage {
    T values[kThreads];
  };
  explicit BlockReduce(TempStorage& storage) : storage_(storage) {}
  template <typename Op>
  T Reduce(T value, Op op) {
    storage_.values[threadIdx.x] = value;
    __syncthreads();
    T result = storage_.values[0];
    for (int i = 1; i < kThreads; ++i) result = op(result, storage_.values[i]);
    return threadIdx.x == 0 ? result : T(-77);
  }
  T Sum(T value) { return Reduce(value, Plus()); }

 private:
  TempStorage& storage_;
};

template <typename T, int kThreads>
class BlockScan {
 public:
  struct TempStorage {
    T values[kThreads];
  };
  explicit BlockScan(TempStorage& storage) : storage_(storage) {}
  void ExclusiveSum(T value, T& result) {
    T total;
    ExclusiveSum(value, result, total);
  }
  void ExclusiveSum(T value, T& result, T& total) {
    storage_.values[threadIdx.x] = value;
    __syncthreads();
    T before{}, all{};
    for (int i = 0; i < kThreads; ++i) {
      if (i == static_cast<int>(threadIdx.x)) before = all;
      all = static_cast<T>(all + storage_.values[i]);
    }
    result = before;
    total = all;
  }
  void InclusiveSum(T value, T& result) {
    T before;
    ExclusiveSum(value, before);
    result = static_cast<T>(before + value);
  }

 private:
  TempStorage& storage_;
};

}  // namespace perseid::kernels::prim
