// One rank does not come. The others throw PeerLost after the timeout, within 2 s more, and name
// it; their group is failed, and so is that of the late rank when it comes.
//   Collective    every collective, the missing rank being each in turn
//   OneOfTwo      with two missing ranks both are named
#include <chrono>

#include "comm/collectives.h"
#include "comm/exchange.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::Group;
using Clock = std::chrono::steady_clock;

constexpr int64_t kTimeoutMs = 150;

void call_collective(int kind, const Group& group) {
  std::vector<float> data(4096, 1);
  std::vector<float> all(4096 * size_t(group.size()));
  const std::vector<int64_t> rows(size_t(group.size()), 1);
  switch (kind) {
    case 0:
      return comm::barrier(group);
    case 1:
      return comm::all_reduce(data.data(), 4096, comm::ReduceOp::kSum, group);
    case 2:
      return comm::all_gather(data.data(), 4096, all.data(), group);
    case 3:
      return comm::broadcast(data.data(), 4096, 0, group);
    case 4:
      return static_cast<void>(comm::exchange_counts(rows, 1, group));
    case 5:
      return static_cast<void>(group.split(0, 0));
    default: {
      const comm::RowType row{kernels::DType::kFloat32, 4};
      return comm::exchange_rows(data.data(), all.data(), row, {rows, rows}, group);
    }
  }
}

TEST(Timeout, Collective) {
  run_ranks([](const Group& world) {
    if (world.size() == 1) return;
    for (int kind = 0; kind < 7; ++kind) {
      const int missing = (kind + 1) % world.size();
      const Group group = world.split(0, 0);
      group.set_timeout_ms(kTimeoutMs);
      meet();
      if (group.rank() != missing) {
        const auto begin = Clock::now();
        const Caught caught = catch_error([&] { call_collective(kind, group); });
        const std::chrono::duration<double> seconds = Clock::now() - begin;
        EXPECT_EQ(caught.type, "PeerLost") << caught.text;
        EXPECT_EQ(caught.detail.culprit, missing) << caught.text;
        expect_contains(caught.text, {"nothing received from rank(s) " + std::to_string(missing)});
        EXPECT_LT(seconds.count(), 2.0 + kTimeoutMs / 1000.0);
        const Caught again = catch_error([&] { comm::barrier(group); });
        EXPECT_EQ(again.type, "PeerLost");
        expect_contains(again.text, {"group=failed by an earlier error: ["});
      }
      meet();
      if (group.rank() == missing) {
        const Caught late = catch_error([&] { call_collective(kind, group); });
        EXPECT_EQ(late.type, "PeerLost") << late.text;
      }
      meet();
    }
  });
}

TEST(Timeout, TwoMissing) {
  run_ranks([](const Group& world) {
    if (world.size() < 3) return;
    const Group group = world.split(0, 0);
    group.set_timeout_ms(kTimeoutMs);
    meet();
    if (group.rank() == 0) {
      const Caught caught = catch_error([&] { comm::barrier(group, {"start", -1, 5}); });
      EXPECT_EQ(caught.type, "PeerLost");
      EXPECT_EQ(caught.detail.culprit, 1);
      expect_contains(caught.text, {"[start] timeout_ms=150 has passed", "rank(s) 1, 2", "step 5"});
    }
    meet();
  });
}

}  // namespace
}  // namespace perseid::testing
