// Sessions of a real job; its main has initialised MPI and finalises it.
//   Status       0 on all ranks; the status of a rank that fails alone reaches all the others
//   Agreed       an agreed error ends all ranks alike, and is printed by rank 0 only
//   WrongWords   the same for an option that all ranks got wrong
//   Version      "Open MPI 4.1.4" or the like
#include <mpi.h>

#include "comm/collectives.h"
#include "comm/session.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::Group;

int rank_of_job() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

int size_of_job() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

comm::SessionOptions with_mpi() {
  comm::SessionOptions options;
  options.comm = "mpi";
  return options;
}

TEST(MpiSession, Status) {
  for (const char* word : {"auto", "mpi"}) {
    comm::SessionOptions options;
    options.comm = word;
    const int status = comm::run_session(options, [](const Group& group) {
      EXPECT_STREQ(group.backend_name(), "mpi");
      EXPECT_EQ(group.rank(), rank_of_job());
      EXPECT_EQ(group.size(), size_of_job());
      EXPECT_EQ(comm::count_hosts(group), 1);
    });
    EXPECT_EQ(status, 0);
  }
  const int last = size_of_job() - 1;
  ::testing::internal::CaptureStderr();
  const int status = comm::run_session(with_mpi(), [&](const Group& group) {
    if (group.rank() == last) throw DataError(ErrorDetail{"read", "row", "7", "is damaged"});
  });
  const std::string output = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(status, 65);
  const std::string front = last == 0 ? "" : "[rank " + std::to_string(last) + "] ";
  EXPECT_EQ(output, rank_of_job() == last ? front + "error: [read] row=7 is damaged\n" : "");
}

TEST(MpiSession, Agreed) {
  if (size_of_job() == 1) GTEST_SKIP() << "needs two ranks";
  ::testing::internal::CaptureStderr();
  const int status = comm::run_session(with_mpi(), [](const Group& group) {
    comm::barrier(group, {"load", -1, group.rank() == 1 ? 1 : 0});
  });
  const std::string output = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(status, 76);
  EXPECT_EQ(output.empty(), rank_of_job() != 0) << output;
  if (rank_of_job() == 0) expect_contains(output, {"[rank 0] error: [load] step=1 of rank 1"});
}

TEST(MpiSession, WrongWords) {
  comm::SessionOptions options;
  options.comm = "ftp";
  ::testing::internal::CaptureStderr();
  const int status = comm::run_session(options, [](const Group&) { ADD_FAILURE(); });
  const std::string output = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(status, 64);
  EXPECT_EQ(output.empty(), rank_of_job() != 0) << output;
  if (rank_of_job() == 0) expect_contains(output, {"comm=ftp"});
}

TEST(MpiSession, Version) {
  EXPECT_EQ(comm::mpi_version().find("none"), std::string::npos);
  const size_t digit = comm::mpi_version().find_first_of("0123456789");
  EXPECT_NE(digit, std::string::npos) << comm::mpi_version();
  EXPECT_EQ(comm::mpi_version().find(','), std::string::npos) << comm::mpi_version();
}

}  // namespace
}  // namespace perseid::testing
