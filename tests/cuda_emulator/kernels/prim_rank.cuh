#pragma once
#include "kernels/prim.cuh"

namespace perseid::kernels::prim {

/// Key by key as CUB's: the stable rank of each of kItems keys of each thread, whose order is
/// warp-striped: item i of lane l of warp w is key (w * kItems + i) * 32 + l of the block. Digits
/// are the kBits that the extractor yields. exclusive_digit_prefix[d] of thread t is that of digit
/// t * BINS_TRACKED_PER_THREAD + d, and `callback` gets the counts of the same digits. What belongs
/// to digits past the last is rubbish. Unlike here, CUB's ends without a barrier.
template <int kThreads, int kBits, bool kIsDescending>
class BlockRadixRankMatchEarlyCounts {
  static_assert(!kIsDescending);

 public:
  static constexpr int BINS_TRACKED_PER_THREAD = ((1 << kBits) + kThreads - 1) / kThreads;
  struct TempStorage {
    int counts[1 << kBits];
    int next[1 << kBits];
    uint16_t digits[kThreads * 64];
    int ranks[kThreads * 64];
  };
  explicit BlockRadixRankMatchEarlyCounts(TempStorage& storage) : storage_(storage) {}

  template <typename Key, int kItems, typename Extractor>
  void RankKeys(Key (&keys)[kItems], int (&ranks)[kItems], Extractor extractor) {
    int prefix[BINS_TRACKED_PER_THREAD];
    RankKeys(keys, ranks, extractor, prefix);
  }
  template <typename Key, int kItems, typename Extractor>
  void RankKeys(Key (&keys)[kItems], int (&ranks)[kItems], Extractor extractor,
                int (&exclusive_digit_prefix)[BINS_TRACKED_PER_THREAD]) {
    RankKeys(keys, ranks, extractor, exclusive_digit_prefix,
             [](const int(&)[BINS_TRACKED_PER_THREAD]) {});
  }
  template <typename Key, int kItems, typename Extractor, typename Callback>
  void RankKeys(Key (&keys)[kItems], int (&ranks)[kItems], Extractor extractor,
                int (&exclusive_digit_prefix)[BINS_TRACKED_PER_THREAD], Callback callback) {
    static_assert(kItems <= 64);
    const int thread = static_cast<int>(threadIdx.x);
    const auto place = [&](int i) { return (thread / 32 * kItems + i) * 32 + thread % 32; };
    for (int i = 0; i < kItems; ++i) {
      storage_.digits[place(i)] = static_cast<uint16_t>(extractor.Digit(keys[i]));
    }
    __syncthreads();
    if (thread == 0) {
      for (int& count : storage_.counts) count = 0;
      for (int k = 0; k < kThreads * kItems; ++k) ++storage_.counts[storage_.digits[k]];
      int sum = 0;
      for (int digit = 0; digit < (1 << kBits); ++digit) {
        storage_.next[digit] = sum;
        sum += std::exchange(storage_.counts[digit], sum);
      }
      for (int k = 0; k < kThreads * kItems; ++k) {
        storage_.ranks[k] = storage_.next[storage_.digits[k]]++;
      }
    }
    __syncthreads();
    for (int i = 0; i < kItems; ++i) ranks[i] = storage_.ranks[place(i)];
    int bins[BINS_TRACKED_PER_THREAD];
    for (int d = 0; d < BINS_TRACKED_PER_THREAD; ++d) {
      const int digit = thread * BINS_TRACKED_PER_THREAD + d;
      const bool is_digit = digit < (1 << kBits);
      exclusive_digit_prefix[d] = is_digit ? storage_.counts[digit] : -77;
      bins[d] = is_digit ? storage_.next[digit] - storage_.counts[digit] : -77;
    }
    callback(bins);
    __syncthreads();
  }

 private:
  TempStorage& storage_;
};

}  // namespace perseid::kernels::prim
