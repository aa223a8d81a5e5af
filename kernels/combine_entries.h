#pragma once
#include "kernels/combine.h"
#include "kernels/simd.h"

// Reading a CombineIndex. Private to this folder.

namespace perseid::kernels {

struct EntryRange {
  int64_t begin;
  int64_t end;
};

PERSEID_INLINE EntryRange entries_of(const CombineIndex& index, int64_t n) {
  if (index.offsets == nullptr) return {n * index.fixed, (n + 1) * index.fixed};
  return {index.offsets[n], index.offsets[n + 1]};
}
PERSEID_INLINE int64_t row_of_entry(const CombineIndex& index, int64_t entry) {
  return index.row_of == nullptr ? entry : index.row_of[entry];
}

}  // namespace perseid::kernels
