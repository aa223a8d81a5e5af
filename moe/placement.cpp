#include "moe/placement.h"

#include <limits>

#include "kernels/error.h"
#include "kernels/random.h"

namespace perseid {
namespace {
constexpr const char* kExpertPlacement = "expert_placement";

void require_sizes(int64_t num_experts, int num_ranks) {
  require(num_experts >= 1, kExpertPlacement, "num_experts", num_experts, "must be at least 1");
  require(num_experts <= std::numeric_limits<int32_t>::max(), kExpertPlacement, "num_experts",
          num_experts, "must be below 2^31");
  require(num_ranks >= 1, kExpertPlacement, "num_ranks", num_ranks, "must be at least 1");
}
}  // namespace

ExpertPlacement ExpertPlacement::contiguous(int64_t num_experts, int num_ranks) {
  require_sizes(num_experts, num_ranks);
  const int64_t quotient = num_experts / num_ranks;
  const int64_t remainder = num_experts % num_ranks;
  std::vector<int> rank_of_expert;
  rank_of_expert.reserve(static_cast<size_t>(num_experts));
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int64_t count = quotient + (rank < remainder ? 1 : 0);
    rank_of_expert.insert(rank_of_expert.end(), static_cast<size_t>(count), rank);
  }
  return ExpertPlacement(std::move(rank_of_expert), num_ranks);
}

ExpertPlacement::ExpertPlacement(std::vector<int> rank_of_expert, int num_ranks)
    : rank_of_(std::move(rank_of_expert)) {
  require_sizes(num_experts(), num_ranks);
  experts_of_.resize(static_cast<size_t>(num_ranks));
  slot_of_.reserve(rank_of_.size());
  for (int64_t expert = 0; expert < num_experts(); ++expert) {
    const int rank = rank_of(expert);
    if (rank < 0 || rank >= num_ranks) {
      throw ConfigError(ErrorDetail{kExpertPlacement, "rank_of_expert[" + to_text(expert) + "]",
                                    to_text(rank), "must lie in [0, " + to_text(num_ranks) + ")"});
    }
    std::vector<int64_t>& experts = experts_of_[static_cast<size_t>(rank)];
    slot_of_.push_back(static_cast<int32_t>(experts.size()));
    experts.push_back(expert);
  }
}

const std::vector<int64_t>& ExpertPlacement::experts_of(int rank) const {
  require(rank >= 0 && rank < num_ranks(), kExpertPlacement, "rank", rank,
          "must lie in [0, " + to_text(num_ranks()) + ")");
  return experts_of_[static_cast<size_t>(rank)];
}

uint32_t ExpertPlacement::hash() const {
  kernels::RandomKey key = kernels::random_key(static_cast<uint64_t>(num_ranks()));
  for (const int rank : rank_of_) key = key.with(static_cast<uint64_t>(rank));
  return static_cast<uint32_t>(key.value >> 32);
}

}  // namespace perseid
