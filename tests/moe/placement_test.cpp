// Where experts live, and the groups of expert and data parallelism.
//   Contiguous          E = P*q + r: the first r ranks own q + 1 experts, ids rise with the rank
//   MoreRanksThan...    ranks E .. P-1 own nothing
//   Custom              slots follow the expert ids on each rank
//   Hash                equal for equal maps; changes with P and with the map
//   ParallelGroups      rank r of P: expert_parallel {r / ep}, place r % ep; replicas the other way
//   Errors              operation, argument, value, limit
#include "moe/placement.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "comm/collectives.h"
#include "kernels/error.h"
#include "moe/parallel_groups.h"
#include "tests/config_error.h"

namespace perseid {
namespace {
using testing::config_error;

/// Each expert is at its slot on its rank, and nowhere else.
void expect_consistent(const ExpertPlacement& placement) {
  int64_t total = 0;
  for (int rank = 0; rank < placement.num_ranks(); ++rank) {
    const std::vector<int64_t>& experts = placement.experts_of(rank);
    EXPECT_EQ(placement.num_local_experts(rank), static_cast<int64_t>(experts.size()));
    for (size_t slot = 0; slot < experts.size(); ++slot) {
      EXPECT_EQ(placement.rank_of(experts[slot]), rank);
      EXPECT_EQ(placement.slot_of(experts[slot]), static_cast<int32_t>(slot));
      EXPECT_TRUE(slot == 0 || experts[slot - 1] < experts[slot]);
    }
    total += placement.num_local_experts(rank);
  }
  EXPECT_EQ(total, placement.num_experts());
}

TEST(ExpertPlacement, ContiguousCoversUnevenExperts) {
  for (int64_t num_experts = 1; num_experts <= 13; ++num_experts) {
    for (int num_ranks = 1; num_ranks <= 6; ++num_ranks) {
      const ExpertPlacement placement = ExpertPlacement::contiguous(num_experts, num_ranks);
      expect_consistent(placement);
      for (int rank = 0; rank < num_ranks; ++rank) {
        EXPECT_EQ(placement.num_local_experts(rank),
                  num_experts / num_ranks + (rank < num_experts % num_ranks ? 1 : 0));
      }
      for (int64_t expert = 1; expert < num_experts; ++expert) {
        EXPECT_LE(placement.rank_of(expert - 1), placement.rank_of(expert));
      }
    }
  }
  const ExpertPlacement placement = ExpertPlacement::contiguous(8, 3);
  EXPECT_EQ(placement.experts_of(0), (std::vector<int64_t>{0, 1, 2}));
  EXPECT_EQ(placement.experts_of(1), (std::vector<int64_t>{3, 4, 5}));
  EXPECT_EQ(placement.experts_of(2), (std::vector<int64_t>{6, 7}));
}

TEST(ExpertPlacement, MoreRanksThanExperts) {
  const ExpertPlacement placement = ExpertPlacement::contiguous(2, 4);
  EXPECT_EQ(placement.num_local_experts(1), 1);
  EXPECT_TRUE(placement.experts_of(2).empty());
  EXPECT_TRUE(placement.experts_of(3).empty());
}

TEST(ExpertPlacement, CustomMap) {
  const ExpertPlacement placement({2, 0, 2, 0, 2}, 3);
  expect_consistent(placement);
  EXPECT_EQ(placement.experts_of(0), (std::vector<int64_t>{1, 3}));
  EXPECT_TRUE(placement.experts_of(1).empty());
  EXPECT_EQ(placement.experts_of(2), (std::vector<int64_t>{0, 2, 4}));
  EXPECT_EQ(placement.slot_of(4), 2);
}

TEST(ExpertPlacement, HashTellsPlacementsApart) {
  const uint32_t hash = ExpertPlacement::contiguous(5, 2).hash();
  EXPECT_EQ(hash, ExpertPlacement({0, 0, 0, 1, 1}, 2).hash());
  EXPECT_NE(hash, ExpertPlacement({0, 0, 0, 1, 1}, 3).hash());
  EXPECT_NE(hash, ExpertPlacement({0, 0, 1, 0, 1}, 2).hash());
  EXPECT_NE(hash, ExpertPlacement({0, 0, 0, 1}, 2).hash());
}

TEST(ExpertPlacement, Errors) {
  EXPECT_EQ(config_error([] { ExpertPlacement::contiguous(0, 2); }),
            "[expert_placement] num_experts=0 must be at least 1");
  EXPECT_EQ(config_error([] { ExpertPlacement({}, 2); }),
            "[expert_placement] num_experts=0 must be at least 1");
  EXPECT_EQ(config_error([] { ExpertPlacement::contiguous(4, 0); }),
            "[expert_placement] num_ranks=0 must be at least 1");
  EXPECT_EQ(config_error([] {
              ExpertPlacement({0, 3, 1}, 3);
            }),
            "[expert_placement] rank_of_expert[1]=3 must lie in [0, 3)");
  EXPECT_EQ(config_error([] {
              ExpertPlacement({0, 1, -1}, 3);
            }),
            "[expert_placement] rank_of_expert[2]=-1 must lie in [0, 3)");
  EXPECT_EQ(config_error([] { ExpertPlacement::contiguous(4, 2).experts_of(2); }),
            "[expert_placement] rank=2 must lie in [0, 2)");
}

/// World ranks of the members of a group, in its order.
std::vector<int> members(const comm::Group& group, const comm::Group& world) {
  std::vector<int> ranks(static_cast<size_t>(group.size()), -1);
  const int rank = world.rank();
  comm::all_gather(&rank, sizeof(rank), ranks.data(), group);
  return ranks;
}

TEST(ParallelGroups, MembersOfEachGroup) {
  for (const int num_ranks : {1, 2, 4}) {
    for (const int ep_size : {0, 1, 2, 4}) {
      if (ep_size > num_ranks) continue;
      comm::run_local(num_ranks, [&](const comm::Group& world) {
        const ParallelGroups groups = make_parallel_groups(world, ep_size);
        const int size = ep_size == 0 ? num_ranks : ep_size;
        std::vector<int> expert_parallel, expert_replicas;
        for (int rank = 0; rank < num_ranks; ++rank) {
          if (rank / size == world.rank() / size) expert_parallel.push_back(rank);
          if (rank % size == world.rank() % size) expert_replicas.push_back(rank);
        }
        EXPECT_EQ(groups.world.size(), num_ranks);
        EXPECT_EQ(members(groups.expert_parallel, world), expert_parallel);
        EXPECT_EQ(members(groups.expert_replicas, world), expert_replicas);
        EXPECT_EQ(groups.expert_parallel.rank(), world.rank() % size);
        EXPECT_EQ(groups.expert_replicas.rank(), world.rank() / size);
      });
    }
  }
}

TEST(ParallelGroups, SizeMustDivideTheWorld) {
  comm::run_local(4, [](const comm::Group& world) {
    EXPECT_EQ(config_error([&] { make_parallel_groups(world, 3); }),
              "[make_parallel_groups] ep_size=3 does not divide world size 4; choose a divisor, or "
              "0 for all ranks");
    EXPECT_NE(config_error([&] { make_parallel_groups(world, -2); }).find("ep_size=-2"),
              std::string::npos);
    EXPECT_NE(config_error([&] { make_parallel_groups(world, 8); }).find("ep_size=8"),
              std::string::npos);
    make_parallel_groups(world, 2);  // the group is still in order
  });
}

TEST(ParallelGroups, RanksThatDisagreeAllThrow) {
  comm::run_local(4, [](const comm::Group& world) {
    try {
      make_parallel_groups(world, world.rank() == 2 ? 3 : 2);
      ADD_FAILURE() << "no exception on rank " << world.rank();
    } catch (const RanksDisagree& error) {
      EXPECT_EQ(error.detail().culprit, 2);
      EXPECT_EQ(error.detail().rank, world.rank());
      EXPECT_NE(std::strstr(error.what(), "ep_size=2 from rank 0 differs from ep_size=3"), nullptr)
          << error.what();
    }
  });
}

}  // namespace
}  // namespace perseid
