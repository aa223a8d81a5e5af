#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "comm/group.h"
#include "kernels/error.h"

// Internal: settings that every rank must pass alike.

namespace perseid {

/// Throws RanksDisagree unless all values, gathered in rank order, have the same bits. Every rank
/// that holds the same values throws the same culprit, so it needs no communication.
template <typename T>
void require_same_on_ranks(const std::vector<T>& values, const char* argument, int rank,
                           const comm::CallSite& site) {
  for (size_t r = 1; r < values.size(); ++r) {
    if (std::memcmp(&values[r], &values[0], sizeof(T)) == 0) continue;
    ErrorDetail detail{site.operation, argument, to_text(values[0]),
                       "from rank 0 differs from " + std::string(argument) + "=" +
                           to_text(values[r]) + " from rank " + to_text(r) +
                           "; all ranks must pass the same value"};
    detail.rank = rank;
    detail.culprit = static_cast<int>(r);
    detail.layer = site.layer;
    detail.step = site.step;
    throw RanksDisagree(detail);
  }
}

}  // namespace perseid
