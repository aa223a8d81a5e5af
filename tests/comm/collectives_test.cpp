//   AllReduceSums      sums, minima and maxima in closed form, float, double and int64, for 0, 1
//   and
//                      odd counts, and for several rounds
//   SumsInRankOrder    the sum of values whose order matters is that of rank order, the same bits
//                      on all ranks
//   NanStays           a NaN of any rank is the minimum and the maximum
//   AllGatherOrders    block r is that of rank r
//   BroadcastCopies    every rank as root
//   SplitOrders        members by color, ranks by (key, rank); groups work at the same time
//   SplitOfSplit       groups of groups, and two splits of one group side by side
//   ManyCalls          1,000 collectives of mixed kinds in a row
#include "comm/collectives.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "comm/exchange.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::Group;
using comm::ReduceOp;

template <typename T>
T element(int rank, int64_t i) {
  return static_cast<T>((i % 1000) * 16 + rank * 3 + 1);
}

template <typename T>
void expect_reduced(const Group& group, int64_t count) {
  for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax}) {
    std::vector<T> data(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      data[static_cast<size_t>(i)] = element<T>(group.rank(), i);
    }
    comm::all_reduce(data.data(), count, op, group);
    int64_t num_wrong = 0;
    for (int64_t i = 0; i < count; ++i) {
      T want = element<T>(0, i);
      if (op == ReduceOp::kMax) want = element<T>(group.size() - 1, i);
      for (int p = 1; p < group.size() && op == ReduceOp::kSum; ++p) want += element<T>(p, i);
      num_wrong += data[static_cast<size_t>(i)] != want ? 1 : 0;
    }
    EXPECT_EQ(num_wrong, 0) << count << " elements, op " << static_cast<int>(op);
  }
}

TEST(Collectives, AllReduceSums) {
  run_ranks([](const Group& group) {
    for (const int64_t count : {0, 1, 2, 3, 17, 1001, 300007}) {
      expect_reduced<float>(group, count);
      expect_reduced<double>(group, count);
      expect_reduced<int64_t>(group, count);
    }
  });
}

TEST(Collectives, SumsInRankOrder) {
  run_ranks([](const Group& group) {
    constexpr int64_t kCount = 1003;
    const auto at = [](int rank, int64_t i) {
      return std::ldexp(1.0f + static_cast<float>(i % 97) / 97.0f, (rank * 11 + int(i)) % 25);
    };
    std::vector<float> data(kCount);
    for (int64_t i = 0; i < kCount; ++i) data[size_t(i)] = at(group.rank(), i);
    comm::all_reduce(data.data(), kCount, ReduceOp::kSum, group);
    std::vector<float> want(kCount);
    for (int64_t i = 0; i < kCount; ++i) {
      want[size_t(i)] = at(0, i);
      for (int p = 1; p < group.size(); ++p) want[size_t(i)] += at(p, i);
    }
    EXPECT_EQ(std::memcmp(data.data(), want.data(), kCount * sizeof(float)), 0);
  });
}

TEST(Collectives, NanStays) {
  run_ranks([](const Group& group) {
    for (int bad = 0; bad < group.size(); ++bad) {
      for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax}) {
        const bool is_bad = group.rank() == bad;
        double data[3] = {1, is_bad ? std::numeric_limits<double>::quiet_NaN() : 2, 3};
        comm::all_reduce(data, 3, op, group);
        EXPECT_TRUE(std::isnan(data[1]));
        EXPECT_FALSE(std::isnan(data[0]) || std::isnan(data[2]));
      }
    }
  });
}

TEST(Collectives, AllGatherOrders) {
  run_ranks([](const Group& group) {
    for (const size_t count : {0, 1, 5, 70000}) {
      std::vector<int32_t> mine(count);
      for (size_t i = 0; i < count; ++i) mine[i] = int32_t(i) * 8 + group.rank();
      std::vector<int32_t> all(count * size_t(group.size()), -1);
      comm::all_gather(mine.data(), int64_t(count * 4), all.data(), group);
      size_t num_wrong = 0;
      for (size_t i = 0; i < all.size(); ++i) {
        num_wrong += all[i] != int32_t(i % count) * 8 + int32_t(i / count) ? 1 : 0;
      }
      EXPECT_EQ(num_wrong, 0u);
    }
  });
}

TEST(Collectives, BroadcastCopies) {
  run_ranks([](const Group& group) {
    for (int root = 0; root < group.size(); ++root) {
      for (const size_t count : {0, 1, 70001}) {
        std::vector<int32_t> data(count, group.rank() == root ? 1000 + root : -1);
        comm::broadcast(data.data(), int64_t(count * 4), root, group);
        EXPECT_EQ(data, std::vector<int32_t>(count, 1000 + root));
      }
    }
  });
}

TEST(Collectives, SplitOrders) {
  run_ranks([](const Group& group) {
    const Group half = group.split(group.rank() % 2, -group.rank());
    const int num_same = (group.size() + 1 - group.rank() % 2) / 2;
    EXPECT_EQ(half.size(), num_same);
    EXPECT_EQ(half.rank(), num_same - 1 - group.rank() / 2);  // highest old rank first
    EXPECT_STREQ(half.backend_name(), group.backend_name());
    std::vector<int> all(size_t(half.size()), -1);
    const int mine = group.rank();
    comm::all_gather(&mine, sizeof(mine), all.data(), half);
    for (size_t i = 0; i < all.size(); ++i) {
      EXPECT_EQ(all[i], (num_same - 1 - int(i)) * 2 + group.rank() % 2);
    }
    const Group same = group.split(7, 0);
    EXPECT_EQ(same.size(), group.size());
    EXPECT_EQ(same.rank(), group.rank());
  });
}

TEST(Collectives, SplitOfSplit) {
  run_ranks([](const Group& group) {
    const Group rows = group.split(group.rank() / 2, group.rank());
    const Group columns = group.split(group.rank() % 2, group.rank());
    const Group alone = rows.split(rows.rank(), 0);
    EXPECT_EQ(alone.size(), 1);
    double sum = group.rank();
    double want = 0;
    for (int p = 0; p < group.size(); ++p) want += p;
    comm::all_reduce(&sum, 1, ReduceOp::kSum, alone);
    comm::all_reduce(&sum, 1, ReduceOp::kSum, rows);
    comm::all_reduce(&sum, 1, ReduceOp::kSum, columns);
    if (group.size() == 3) {  // not a grid: the sums are over incomplete rows
      EXPECT_TRUE(sum == 3 || sum == 1) << sum;
    } else {
      EXPECT_EQ(sum, want);
    }
    comm::barrier(group);
  });
}

TEST(Collectives, ManyCalls) {
  run_ranks([](const Group& group) {
    const std::vector<int64_t> counts(size_t(group.size()), group.rank());
    const Group pair = group.split(group.rank() / 2, 0);
    for (int i = 0; i < 250; ++i) {
      comm::barrier(i % 2 == 0 ? group : pair);
      const std::vector<int64_t> got = comm::exchange_counts(counts, 1, group);
      for (size_t p = 0; p < got.size(); ++p) EXPECT_EQ(got[p], int64_t(p));
      float x = 1;
      comm::all_reduce(&x, 1, ReduceOp::kSum, pair);
      EXPECT_EQ(x, float(pair.size()));
      comm::broadcast(&x, sizeof(x), i % group.size(), group);
    }
  });
}

}  // namespace
}  // namespace perseid::testing
