#pragma once
#include <ATen/core/Tensor.h>

#include "moe/segments.h"

// Internal: products over the rows of a segment, on the calling thread.

namespace perseid {

/// The rows of a segment, [n, width], where they lie: a product that can read rows through an index
/// does, the others get a gathered copy, which is made once.
class SegmentRows {
 public:
  /// Rows that need no index.
  explicit SegmentRows(at::Tensor rows) : source_(std::move(rows)), gathered_(source_) {}
  /// Row i is rows[row_of[segment.begin + i]]; the copy takes `slot` of `scratch`, which must
  /// outlive this.
  SegmentRows(at::Tensor rows, const at::Tensor& row_of, const Segment& segment, Scratch& scratch,
              size_t slot);

  int64_t num_rows() const { return num_rows_ < 0 ? source_.size(0) : num_rows_; }
  int64_t width() const { return source_.size(1); }
  const at::Tensor& gathered() const;
  const at::Tensor& source() const { return source_; }
  const int32_t* row_of() const { return row_of_; }  ///< null: no index

 private:
  at::Tensor source_;
  mutable at::Tensor gathered_;
  const int32_t* row_of_ = nullptr;
  int64_t num_rows_ = -1;
  Scratch* scratch_ = nullptr;
  size_t slot_ = 0;
};

/// out = rows matrix + bias; bias may be undefined.
/// @param matrix  [width, N], contiguous or the transpose of a contiguous matrix
void multiply(at::Tensor out, const SegmentRows& rows, const at::Tensor& matrix,
              const at::Tensor& bias, Scratch& scratch);
/// out = a^T b over the same rows: the gradient of a weight.
void multiply_transposed(at::Tensor out, const SegmentRows& a, const SegmentRows& b,
                         Scratch& scratch);

}  // namespace perseid
