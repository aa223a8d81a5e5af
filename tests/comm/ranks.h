#pragma once
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "comm/group.h"
#include "kernels/error.h"

namespace perseid::testing {

using RankBody = std::function<void(const comm::Group&)>;

/// Runs body on every rank of a fresh group: comm_test on 1, 2, 3 and 4 threads one after the
/// other, comm_mpi_test on the processes of the job. Use EXPECT in body: a rank that leaves early
/// lets the others wait.
void run_ranks(const RankBody& body);

/// Waits for all ranks of run_ranks by other means than the code under test.
void meet();

/// The error that `call` throws, as its fields; fails the test if it throws none.
struct Caught {
  std::string type;
  std::string text;
  ErrorDetail detail;
};
Caught catch_error(const std::function<void()>& call);

/// Fails unless `text` contains each of `parts`.
void expect_contains(const std::string& text, const std::vector<std::string>& parts);

}  // namespace perseid::testing
