#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace perseid {

/// Where each expert lives: global expert id -> (rank of the expert-parallel group, slot on it).
/// E need not divide by P, and a rank may own no expert. A value; equal on all ranks.
class ExpertPlacement {
 public:
  /// Experts in order, ranks in order; the first E % P ranks hold one expert more.
  static ExpertPlacement contiguous(int64_t num_experts, int num_ranks);

  /// @param rank_of_expert  [E] ranks in [0, num_ranks); slots follow the expert ids on each rank
  ExpertPlacement(std::vector<int> rank_of_expert, int num_ranks);

  int64_t num_experts() const { return static_cast<int64_t>(rank_of_.size()); }
  int num_ranks() const { return static_cast<int>(experts_of_.size()); }
  int rank_of(int64_t expert) const { return rank_of_[static_cast<size_t>(expert)]; }
  int32_t slot_of(int64_t expert) const { return slot_of_[static_cast<size_t>(expert)]; }
  /// Global ids of the experts of a rank, by slot. Throws ConfigError for a rank out of range.
  const std::vector<int64_t>& experts_of(int rank) const;
  int64_t num_local_experts(int rank) const {
    return static_cast<int64_t>(experts_of(rank).size());
  }
  /// Equal placements have equal hashes; part of the configuration that ranks compare.
  uint32_t hash() const;

 private:
  std::vector<int> rank_of_;
  std::vector<int32_t> slot_of_;
  std::vector<std::vector<int64_t>> experts_of_;
};

}  // namespace perseid
