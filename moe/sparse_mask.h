#pragma once
#include <cstdint>
#include <vector>

#include "kernels/select_atoms.h"

namespace perseid {

/// A set of the places of a [rows, cols] table, one bit each, row by row: which atoms of a weight
/// are active. A value.
class PackedMask {
 public:
  PackedMask() = default;
  /// No place is in it.
  PackedMask(int64_t rows, int64_t cols);
  /// All are.
  static PackedMask full(int64_t rows, int64_t cols);

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t num_places() const { return rows_ * cols_; }
  int64_t count() const;  ///< places in it; a pass over the bits
  bool test(int64_t row, int64_t col) const { return test(row * cols_ + col); }
  bool test(int64_t place) const {
    return (words_[static_cast<size_t>(place / 64)] >> (place % 64) & 1) != 0;
  }
  void set(int64_t place, bool is_in);
  /// Rows [first, first + part.rows()) become those of a mask of as many columns. Others are a
  /// ConfigError.
  void set_rows(int64_t first, const PackedMask& part);

  /// 64 bits of shape and places; the same on every machine.
  uint64_t fingerprint() const;

  /// Place p is bit p % 64 of word p / 64; bits behind the last place are 0 and must stay so.
  const std::vector<uint64_t>& words() const { return words_; }
  uint64_t* data() { return words_.data(); }
  const uint64_t* data() const { return words_.data(); }

  friend bool operator==(const PackedMask&, const PackedMask&) = default;

 private:
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  std::vector<uint64_t> words_;
};

/// Of masks of one shape. Others are a ConfigError.
PackedMask operator&(const PackedMask& a, const PackedMask& b);
PackedMask operator|(const PackedMask& a, const PackedMask& b);
PackedMask without(const PackedMask& a, const PackedMask& b);  ///< in a and not in b

}  // namespace perseid
