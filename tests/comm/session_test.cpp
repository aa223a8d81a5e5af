//   Status       what run_session returns and prints for each kind of exception, self and local
//   Words        unknown words, numbers that do not fit, and parts that are not built
//   NoTransport  CPU ranks of torchrun or plain srun: the error offers mpirun and --comm local
//   PrintsOnce   ranks that fail alike print one line; a lost peer adds none
//   Describes    the first line of a program
#include "comm/session.h"

#include <cstdlib>
#include <new>
#include <stdexcept>

#include "comm/collectives.h"
#include "comm/nccl_group.h"
#include "kernels/device_memory.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::Group;
using comm::SessionOptions;

struct Ended {
  int status = 0;
  std::string output;
};

Ended run(const SessionOptions& options, const RankBody& body) {
  ::testing::internal::CaptureStderr();
  Ended ended;
  ended.status = comm::run_session(options, body);
  ended.output = ::testing::internal::GetCapturedStderr();
  return ended;
}

SessionOptions with(const std::string& comm, int local_ranks = 1) {
  SessionOptions options;
  options.comm = comm;
  options.launcher = "single";
  options.local_ranks = local_ranks;
  return options;
}

TEST(Session, Status) {
  EXPECT_EQ(run(with("self"), [](const Group& group) { EXPECT_EQ(group.size(), 1); }).status, 0);
  EXPECT_EQ(run(with("auto"), [](const Group& group) { EXPECT_EQ(group.size(), 1); }).status, 0);
  EXPECT_EQ(run(with("local", 3), [](const Group& group) { EXPECT_EQ(group.size(), 3); }).status,
            0);
  const Ended config = run(with("self"), [](const Group&) {
    throw ConfigError(ErrorDetail{"train", "steps", "-1", "is negative; choose steps >= 0"});
  });
  EXPECT_EQ(config.status, 64);
  EXPECT_EQ(config.output, "error: [train] steps=-1 is negative; choose steps >= 0\n");
  EXPECT_EQ(run(with("self"), [](const Group&) { throw std::bad_alloc(); }).status, 71);
  EXPECT_EQ(run(with("self"), [](const Group&) { throw std::runtime_error("x"); }).status, 70);
  EXPECT_EQ(run(with("self"), [](const Group&) { throw 5; }).status, 70);
  EXPECT_EQ(run(with("local", 2), [](const Group&) { throw std::bad_alloc(); }).status, 71);
}

void expect_refused(const SessionOptions& options, const std::vector<std::string>& parts) {
  const Ended ended = run(options, [](const Group&) { ADD_FAILURE() << "body was called"; });
  EXPECT_EQ(ended.status, 64);
  expect_contains(ended.output, {"error: ["});
  expect_contains(ended.output, parts);
}

TEST(Session, Words) {
  expect_refused(with("ftp"), {"comm=ftp", "--comm auto, self, local, mpi, tcp or nccl"});
  if (kernels::device_count() == 0) {
    expect_refused(with("nccl"), {comm::has_nccl() ? "[nccl_group] device=none can be used: "
                                                   : "[nccl_group] built without NCCL; "});
  }
  expect_refused(with("local", 0), {"local_ranks=0"});
  expect_refused(with("local", 5000), {"size=5000"});
  expect_refused(with("self", 4), {"local_ranks=4", "comm=local", "comm=self"});
  SessionOptions options;
  options.launcher = "ssh";
  expect_refused(options, {"launcher=ssh", "auto, mpi, slurm, torchrun or single"});
}

TEST(Session, NoTransport) {
  ::setenv("RANK", "0", 1);
  ::setenv("WORLD_SIZE", "2", 1);
  SessionOptions options;
  options.launcher = "torchrun";
  expect_refused(options,
                 {"comm=auto", "2 CPU ranks of torchrun", "mpirun", "--comm local", "--comm tcp"});
  options.comm = "local";
  EXPECT_EQ(run(options, [](const Group&) {}).status, 0);
  ::unsetenv("RANK");
  ::unsetenv("WORLD_SIZE");
}

TEST(Session, PrintsOnce) {
  const Ended agreed = run(with("local", 4), [](const Group& group) {
    comm::barrier(group, {"load", -1, group.rank() == 3 ? 1 : 0});
  });
  EXPECT_EQ(agreed.status, 76);
  EXPECT_EQ(agreed.output.find("[rank 0] error: [load] step=1 of rank 3 differs from step=0"), 0u)
      << agreed.output;
  EXPECT_EQ(agreed.output.find('\n'), agreed.output.size() - 1);
  const Ended alone = run(with("local", 3), [](const Group& group) {
    if (group.rank() == 2) throw DataError(ErrorDetail{"read", "row", "7", "is damaged"});
    comm::barrier(group);
  });
  EXPECT_EQ(alone.status, 65);
  EXPECT_EQ(alone.output, "[rank 2] error: [read] row=7 is damaged\n");
}

TEST(Session, Describes) {
  comm::LaunchInfo launch;
  const Group one;
  EXPECT_EQ(comm::describe(launch, one, 1), "launcher single, 1 rank on 1 host");
  launch.name = "mpirun";
  comm::run_local(2, [&](const Group& group) {
    EXPECT_EQ(comm::describe(launch, group, 2), "launcher mpirun, 2 ranks on 2 hosts");
    EXPECT_EQ(comm::count_hosts(group), 1);
  });
  EXPECT_FALSE(comm::mpi_version().empty());
}

}  // namespace
}  // namespace perseid::testing
