#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Exact linear assignment by shortest augmenting paths with duals (Jonker and Volgenant 1987), in
// double. Sequential: equal input gives equal output, for equally good assignments too. On kCuda
// the host waits for the arrays, does the work and copies the results back.

namespace perseid::kernels {

struct AssignmentShape {
  int64_t num_rows = 0;     ///< R >= 0
  int64_t num_columns = 0;  ///< C >= 0, at most 2^31 - 1
};

/// Dual solution, a certificate of optimality: cost[r, c] >= row[r] + column[c], with equality for
/// assigned pairs; column[c] <= 0, and 0 for a column with room left. Null: not written.
struct AssignmentDuals {
  double* row = nullptr;     ///< [R]
  double* column = nullptr;  ///< [C]
};

/// Gives each row a column so that the sum of the costs is least and column c has at most
/// capacity[c] rows.
/// @param cost           [R, C] finite, or +infinity for a pair that is not allowed
/// @param capacity       [C] >= 0; null: 1 each, so that R = C is a permutation
/// @param column_of_row  [R]
/// Worst case O(R C (R + C)), so O(n^3) for a square; O(R C) memory is read only. Throws
/// ConfigError for other costs and if there is no assignment.
void assign(const AssignmentShape& shape, const double* cost, const int64_t* capacity,
            int32_t* column_of_row, const AssignmentDuals& duals = {}, Stream stream = {});
/// Tries all C^R ways, the first of the best in order of column_of_row. No duals.
void assign_reference(const AssignmentShape& shape, const double* cost, const int64_t* capacity,
                      int32_t* column_of_row);

/// The largest sum of scores with balanced columns (BASE layers, Lewis et al. 2021): each gets R /
/// C rows, rounded down or up. A score that is not finite counts as the smallest finite one, or 0
/// if there is none.
/// @param scores         [R, C] fp32 or fp64, C >= 1
/// @param column_of_row  [R]
void assign_balanced(const AssignmentShape& shape, DType dtype, const void* scores,
                     int32_t* column_of_row, Stream stream = {});
/// Tries all C^R ways, the first of the best in order of column_of_row.
void assign_balanced_reference(const AssignmentShape& shape, DType dtype, const void* scores,
                               int32_t* column_of_row);

}  // namespace perseid::kernels
