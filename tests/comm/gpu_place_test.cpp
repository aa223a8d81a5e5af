// Which ranks can form an NCCL group.
//   OneGpuEach       passes, on one host and on two hosts with equal bus ids
//   NoGpu            the lowest rank without one is named
//   SharedGpu        both ranks, host, bus id and counts are named
//   SharedByWish     NCCL_HOSTID that differs, or NCCL_MULTI_RANK_GPU_ENABLE on both
//   OwnPlace         of this process, gathered
#include "comm/gpu_place.h"

#include <cstring>

#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::GpuPlace;

GpuPlace place(const char* host, const char* bus_id, const char* host_id = "", int may_share = 0) {
  GpuPlace place;
  std::strcpy(place.host.data(), host);
  std::strcpy(place.bus_id.data(), bus_id);
  std::strcpy(place.host_id.data(), host_id);
  place.num_devices = *bus_id == '\0' ? 0 : 2;
  place.may_share = may_share;
  return place;
}

TEST(GpuPlace, OneGpuEach) {
  EXPECT_FALSE(comm::place_problem({place("a", "1")}).has_value());
  EXPECT_FALSE(
      comm::place_problem({place("a", "1"), place("a", "2"), place("b", "1"), place("b", "2")}));
}

TEST(GpuPlace, NoGpu) {
  const auto problem = comm::place_problem({place("a", "1"), place("b", ""), place("c", "")});
  ASSERT_TRUE(problem.has_value());
  EXPECT_EQ(problem->culprit, 1);
  expect_contains(ConfigError(*problem).what(),
                  {"[nccl_group] device=none is visible to rank 1 on host b", "nvidia-smi"});
}

TEST(GpuPlace, SharedGpu) {
  const auto problem =
      comm::place_problem({place("a", "1"), place("b", "1"), place("b", "2"), place("b", "1")});
  ASSERT_TRUE(problem.has_value());
  EXPECT_EQ(problem->culprit, 3);
  expect_contains(ConfigError(*problem).what(),
                  {"[nccl_group] device=1 of rank 3 on host b is that of rank 1, too; 3 ranks run "
                   "there and this one sees 2 GPU(s)",
                   "--ntasks-per-node", "--comm mpi or local", "NCCL_HOSTID"});
}

TEST(GpuPlace, SharedByWish) {
  EXPECT_FALSE(comm::place_problem({place("a", "1", "x"), place("a", "1", "y")}).has_value());
  EXPECT_TRUE(comm::place_problem({place("a", "1", "x"), place("a", "1", "x")}).has_value());
  EXPECT_FALSE(comm::place_problem({place("a", "1", "", 1), place("a", "1", "", 1)}).has_value());
  EXPECT_TRUE(comm::place_problem({place("a", "1", "", 1), place("a", "1")}).has_value());
}

TEST(GpuPlace, OwnPlace) {
  run_ranks([](const comm::Group& group) {
    const std::vector<GpuPlace> places = comm::gather_places(comm::own_place(0), group);
    ASSERT_EQ(places.size(), static_cast<size_t>(group.size()));
    for (const GpuPlace& other : places) EXPECT_STREQ(other.host.data(), places[0].host.data());
  });
}

}  // namespace
}  // namespace perseid::testing
