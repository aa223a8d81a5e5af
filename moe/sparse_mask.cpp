#include "moe/sparse_mask.h"

#include <algorithm>
#include <bit>

#include "kernels/error.h"
#include "kernels/random.h"

namespace perseid {
namespace {

constexpr const char* kPackedMask = "packed_mask";

template <typename Combine>
PackedMask combined(const PackedMask& a, const PackedMask& b, Combine combine) {
  require(a.rows() == b.rows(), kPackedMask, "rows", b.rows(),
          "differs from rows=" + to_text(a.rows()) + " of the first mask");
  require(a.cols() == b.cols(), kPackedMask, "cols", b.cols(),
          "differs from cols=" + to_text(a.cols()) + " of the first mask");
  PackedMask result(a.rows(), a.cols());
  for (size_t w = 0; w < a.words().size(); ++w) {
    result.data()[w] = combine(a.words()[w], b.words()[w]);
  }
  return result;
}

}  // namespace

PackedMask::PackedMask(int64_t rows, int64_t cols) : rows_(rows), cols_(cols) {
  require(rows >= 0, kPackedMask, "rows", rows, "is negative; choose 0 or more");
  require(cols >= 0, kPackedMask, "cols", cols, "is negative; choose 0 or more");
  words_.assign(static_cast<size_t>(kernels::num_mask_words(num_places())), 0);
}

PackedMask PackedMask::full(int64_t rows, int64_t cols) {
  PackedMask mask(rows, cols);
  for (uint64_t& word : mask.words_) word = ~uint64_t{0};
  if (mask.num_places() % 64 != 0) {
    mask.words_.back() = (uint64_t{1} << (mask.num_places() % 64)) - 1;
  }
  return mask;
}

int64_t PackedMask::count() const {
  int64_t count = 0;
  for (const uint64_t word : words_) count += std::popcount(word);
  return count;
}

void PackedMask::set(int64_t place, bool is_in) {
  const uint64_t bit = uint64_t{1} << (place % 64);
  uint64_t& word = words_[static_cast<size_t>(place / 64)];
  word = is_in ? word | bit : word & ~bit;
}

void PackedMask::set_rows(int64_t first, const PackedMask& part) {
  require(part.cols() == cols_, kPackedMask, "cols", part.cols(),
          "of the rows differs from cols=" + to_text(cols_));
  require(first >= 0 && first + part.rows() <= rows_, kPackedMask, "first", first,
          "with rows=" + to_text(part.rows()) + " is outside rows=" + to_text(rows_));
  for (int64_t place = 0; place < part.num_places(); place += 64) {
    const int64_t count = std::min<int64_t>(part.num_places() - place, 64);
    const uint64_t bits = part.words_[static_cast<size_t>(place / 64)];
    const uint64_t all = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    const int64_t target = first * cols_ + place, shift = target % 64;
    uint64_t* const word = words_.data() + target / 64;
    word[0] = (word[0] & ~(all << shift)) | bits << shift;
    if (shift + count > 64) {
      word[1] = (word[1] & ~(all >> (64 - shift))) | bits >> (64 - shift);
    }
  }
}

uint64_t PackedMask::fingerprint() const {
  uint64_t hash = kernels::random_key(0)
                      .with(static_cast<uint64_t>(rows_))
                      .with(static_cast<uint64_t>(cols_))
                      .value;
  for (const uint64_t word : words_) hash = kernels::splitmix64(hash ^ word);
  return hash;
}

PackedMask operator&(const PackedMask& a, const PackedMask& b) {
  return combined(a, b, [](uint64_t x, uint64_t y) { return x & y; });
}
PackedMask operator|(const PackedMask& a, const PackedMask& b) {
  return combined(a, b, [](uint64_t x, uint64_t y) { return x | y; });
}
PackedMask without(const PackedMask& a, const PackedMask& b) {
  return combined(a, b, [](uint64_t x, uint64_t y) { return x & ~y; });
}

}  // namespace perseid
