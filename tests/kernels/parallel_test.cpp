// parallel_for and parallel_tasks on the calling thread and on a pool.
//   Covers       each index exactly once, ranges of at least the grain
//   Nested       a call inside a body runs on the thread of the body, whatever the pool
//   Exceptions   the first one reaches the caller, also through a pool that cannot pass it on
#include <atomic>
#include <set>
#include <stdexcept>

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

TEST(ParallelFor, CoversEachIndexOnce) {
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    for (const int64_t size : {0, 1, 2, 7, 64, 1001}) {
      for (const int64_t grain : {0, 1, 3, 100, 5000}) {
        std::vector<std::atomic<int>> visits(static_cast<size_t>(size) + 5);
        parallel_for(5, 5 + size, grain, [&](int64_t begin, int64_t end) {
          EXPECT_TRUE(end - begin >= std::min(grain, size));
          for (int64_t i = begin; i < end; ++i) ++visits[i];
        });
        for (int64_t i = 0; i < size + 5; ++i) EXPECT_EQ(visits[i].load(), i < 5 ? 0 : 1);
      }
    }
  }
}

TEST(ParallelFor, DefaultIsTheCallingThread) {
  EXPECT_EQ(num_threads(), 1);
  int calls = 0;
  parallel_for(0, 1000000, 1, [&](int64_t begin, int64_t end) {
    EXPECT_EQ(begin, 0);
    EXPECT_EQ(end, 1000000);
    ++calls;
  });
  EXPECT_EQ(calls, 1);
}

TEST(ParallelFor, EmptyRangeCallsNothing) {
  const Threads threads(3);
  parallel_for(4, 4, 1, [](int64_t, int64_t) { FAIL(); });
  parallel_for(4, 3, 1, [](int64_t, int64_t) { FAIL(); });
  parallel_tasks(0, [](int64_t) { FAIL(); });
}

TEST(ParallelFor, NestedCallsStayOnTheirThread) {
  const Threads threads(3);
  EXPECT_EQ(num_threads(), 3);
  parallel_for(0, 3, 1, [](int64_t, int64_t) {
    const auto here = std::this_thread::get_id();
    EXPECT_EQ(num_threads(), 1);
    parallel_for(0, 100, 1,
                 [here](int64_t, int64_t) { EXPECT_EQ(std::this_thread::get_id(), here); });
    parallel_tasks(9, [here](int64_t) { EXPECT_EQ(std::this_thread::get_id(), here); });
  });
  EXPECT_EQ(num_threads(), 3);
}

TEST(ParallelFor, OneRangeLeavesNestedCallsThePool) {
  const Threads threads(3);
  parallel_tasks(1, [](int64_t) { EXPECT_EQ(num_threads(), 3); });
}

TEST(ParallelFor, FirstExceptionReachesTheCaller) {
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    EXPECT_THROW(parallel_for(0, 100, 1,
                              [](int64_t begin, int64_t end) {
                                if (begin <= 50 && 50 < end) throw std::out_of_range("50");
                              }),
                 std::out_of_range);
    EXPECT_THROW(parallel_tasks(20,
                                [](int64_t task) {
                                  if (task == 7) throw std::length_error("7");
                                }),
                 std::length_error);
    EXPECT_EQ(num_threads(), count);  // the mark of a region is taken back
  }
}

TEST(ParallelTasks, RunsEachTaskOnce) {
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    for (const int64_t num_tasks : {1, 2, 5, 100}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(num_tasks));
      parallel_tasks(num_tasks, [&](int64_t task) { ++runs[task]; });
      for (const auto& run : runs) EXPECT_EQ(run.load(), 1);
    }
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
