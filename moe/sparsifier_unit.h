#pragma once
#include <string>

#include "kernels/error.h"
#include "moe/sparsifier.h"

// Internal: what the Sparsifier keeps of each unit, for its source files.

namespace perseid {

inline constexpr const char* kSparsifier = "sparsifier";  ///< in errors

[[noreturn]] inline void fail_sparsifier(const std::string& argument, const std::string& value,
                                         const std::string& limit) {
  throw ConfigError(ErrorDetail{kSparsifier, argument, value, limit});
}

inline at::Tensor slot_of(const at::Tensor& parameter, int64_t slot) {
  return slot < 0 ? parameter : parameter.select(0, slot);
}

struct Sparsifier::Unit {
  AtomLayout layout;
  PackedMask mask;
  PackedMask ever_active;
  at::Tensor inactive;  ///< [out, in] bool, where the parameter is
  int64_t offset = 0;   ///< of its update steps
  int64_t num_rows = 0;
  int64_t num_updates = 0;
  int64_t num_skipped = 0;
  at::Tensor grad_sum;
};

/// What an update of one unit would do.
struct Sparsifier::Proposal {
  size_t unit = 0;
  UnitUpdate report;
  MaskUpdate change;
};

}  // namespace perseid
