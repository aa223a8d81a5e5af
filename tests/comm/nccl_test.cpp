// NCCL without a GPU: it links, and every way in ends in an error that says what to do.
//   Version          that of the library, and the faulty ones are refused
//   InitFails        ncclGetUniqueId works, ncclCommInitRankConfig refuses: call, text and rank
//   NoDevice         nccl_group ends before NCCL is touched, on all ranks alike
#include <nccl.h>

#include "comm/nccl_comm.h"
#include "comm/nccl_group.h"
#include "kernels/device_memory.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::Group;

TEST(Nccl, Version) {
  EXPECT_TRUE(comm::has_nccl());
  EXPECT_EQ(comm::nccl_version().find("NCCL 2."), 0u) << comm::nccl_version();
  for (const int works : {22703, 22802, 22809, 23007}) comm::check_nccl_version(works);
  for (const int faulty : {22803, 22805, 22808}) {
    const Caught caught = catch_error([&] { comm::check_nccl_version(faulty); });
    EXPECT_EQ(caught.type, "ConfigError");
    expect_contains(caught.text, {"[nccl_group] nccl_version=2.28.", "2.28.9 or newer"});
  }
}

TEST(Nccl, InitFails) {
  if (kernels::device_count() > 0) GTEST_SKIP() << "needs a machine without a GPU";
  ncclUniqueId id;
  ASSERT_EQ(ncclGetUniqueId(&id), ncclSuccess);
  const auto deadline = comm::Clock::now() + std::chrono::seconds(20);
  const Caught caught = catch_error([&] { comm::NcclComm(id, 0, 1, deadline); });
  EXPECT_EQ(caught.type, "ConfigError");
  expect_contains(caught.text,
                  {"[nccl_group] ncclCommInitRankConfig=", "cuda", "NCCL_DEBUG=WARN", "rank 0"});
}

TEST(Nccl, NoDevice) {
  if (kernels::device_count() > 0) GTEST_SKIP() << "needs a machine without a GPU";
  run_ranks([](const Group& group) {
    const Caught caught = catch_error([&] { comm::nccl_group(group); });
    EXPECT_EQ(caught.type, "ConfigError");
    expect_contains(caught.text, {"[nccl_group] device=none can be used: ", "--comm mpi"});
    EXPECT_EQ(catch_error([&] { comm::nccl_group(group); }).text, caught.text);
  });
}

}  // namespace
}  // namespace perseid::testing
