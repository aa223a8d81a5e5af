// One GoogleTest binary started by mpirun. Every rank prints its own failures with the rank in
// front. After each test all ranks agree on the result, so verdict and exit code are the same
// everywhere. Talks to MPI itself: it must not depend on the code under test.
#include <gtest/gtest.h>
#include <mpi.h>

#include <cstdio>

namespace {

class RankListener : public testing::EmptyTestEventListener {
 public:
  explicit RankListener(int rank) : rank_(rank) {}

  void OnTestPartResult(const testing::TestPartResult& part) override {
    if (part.passed() || (part.skipped() && rank_ != 0)) return;
    const char* file = part.file_name() != nullptr ? part.file_name() : "?";
    std::fprintf(stderr, "[rank %d] %s:%d\n%s\n", rank_, file, part.line_number(), part.message());
  }

  void OnTestEnd(const testing::TestInfo& test) override {
    const int mine[2] = {test.result()->Failed() ? 1 : 0, test.result()->Skipped() ? 0 : 1};
    int any[2] = {0, 0};
    MPI_Allreduce(mine, any, 2, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    num_failed_ += any[0];
    const char* ran = any[1] != 0 ? "OK" : "SKIPPED";
    const char* verdict = any[0] != 0 ? "FAILED" : ran;
    if (rank_ == 0) std::printf("[%8s] %s.%s\n", verdict, test.test_suite_name(), test.name());
  }

  void OnTestProgramEnd(const testing::UnitTest& tests) override {
    if (rank_ != 0) return;
    std::printf("%d tests, %d failed\n", tests.test_to_run_count(), num_failed_);
  }

  int num_failed() const { return num_failed_; }

 private:
  int rank_;
  int num_failed_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  int granted = 0;
  int rank = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &granted);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  testing::InitGoogleTest(&argc, argv);
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  delete listeners.Release(listeners.default_result_printer());
  auto* listener = new RankListener(rank);  // owned by GoogleTest once appended
  listeners.Append(listener);

  const int mine = RUN_ALL_TESTS() != 0 || listener->num_failed() > 0 ? 1 : 0;
  int code = 1;
  MPI_Allreduce(&mine, &code, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  std::fflush(nullptr);
  MPI_Finalize();
  return code;
}
