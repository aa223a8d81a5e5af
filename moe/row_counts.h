#pragma once
#include <cstdint>
#include <vector>

namespace perseid {

struct LocalPlan;

/// Rows that went backward through each expert of a rank, shared by the experts and whoever reads
/// them. They only grow.
struct RowCounts {
  std::vector<int64_t> rows;  ///< [L]
  int64_t num_readers = 0;    ///< 0: nothing is counted

  /// A row counts once per expert that runs it, whatever the number of gates; rows lost to capacity
  /// do not count. A plan made on a GPU makes the host wait.
  void add(const LocalPlan& plan);
};

}  // namespace perseid
