#pragma once
#include <cstdint>

#include "kernels/stream.h"

namespace perseid::kernels {

/// Stable counting sort of small integer keys: the order of rows inside an expert.
/// order[r] = index of the key that goes to row r; rows are grouped by key, equal keys keep their
/// order. Keys outside [0, num_buckets) take no row (-1 marks a dropped assignment).
/// @param keys     [num_keys] borrowed
/// @param offsets  [num_buckets + 1] first row of each bucket; the last is the number of rows
/// @param order    [num_keys] first offsets[num_buckets] entries are written; may be null: counts
/// only num_keys < 2^31. Deterministic for any thread count.
void counting_sort(const int32_t* keys, int64_t num_keys, int64_t num_buckets, int64_t* offsets,
                   int32_t* order, Stream stream = {});
void counting_sort_reference(const int32_t* keys, int64_t num_keys, int64_t num_buckets,
                             int64_t* offsets, int32_t* order);

}  // namespace perseid::kernels
