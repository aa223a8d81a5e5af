#include "moe/row_counts.h"

#include "moe/routing_plan.h"

namespace perseid {

void RowCounts::add(const LocalPlan& plan) {
  if (num_readers == 0) return;
  const std::vector<int64_t> offsets = plan.host_offsets();
  for (size_t slot = 0; slot < rows.size(); ++slot) rows[slot] += offsets[slot + 1] - offsets[slot];
}

}  // namespace perseid
