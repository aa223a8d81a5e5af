// The order in which contenders of perseid-bench take turns.
#include "examples/bench/timing.h"

#include <gtest/gtest.h>

#include <set>
#include <utility>

namespace perseid::bench {
namespace {

TEST(Timing, ContendersFollowOthersNeverThemselves) {
  for (size_t count = 2; count <= 7; ++count) {
    std::set<std::pair<size_t, size_t>> followed;
    size_t last = count;
    for (int64_t round = 0; round <= static_cast<int64_t>(count); ++round) {
      std::set<size_t> seen;
      for (size_t place = 0; place < count; ++place) {
        const size_t turn = turn_of(count, round, place);
        seen.insert(turn);
        EXPECT_NE(turn, last) << count << " contenders, round " << round;
        if (last < count) followed.insert({last, turn});
        last = turn;
      }
      EXPECT_EQ(seen.size(), count);
      EXPECT_EQ(*seen.rbegin(), count - 1);
    }
    if (count % 2 == 0) {
      EXPECT_EQ(followed.size(), count * (count - 1));
    }
  }
}

TEST(Timing, EachContenderHasOneTimeForEachRoundAfterTheWarmUp) {
  std::vector<int> calls(3);
  std::vector<std::function<void()>> contenders;
  for (int& count : calls) contenders.emplace_back([&count] { ++count; });
  const auto ms = time_in_turns(contenders, 2, 5);
  EXPECT_EQ(calls, (std::vector<int>{7, 7, 7}));
  ASSERT_EQ(ms.size(), 3u);
  for (const auto& times : ms) EXPECT_EQ(times.size(), 5u);
}

}  // namespace
}  // namespace perseid::bench
