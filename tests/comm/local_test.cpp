// What only threads as ranks show.
//   BarrierWaits       a rank leaves the barrier only after all have entered
//   ThrowReachesAll    a body that throws: the others get PeerLost at once, also in sub-groups, and
//                      run_local rethrows the cause, not a PeerLost
//   LowestCause        two bodies throw: that of the lower rank is rethrown
//   ReturnReachesAll   a body that returns early is no reason to wait either
//   AgreedErrorOnAll   all ranks get an agreed error although the first to throw leaves
//   OnlyPeerLost       if there is no other cause, PeerLost is rethrown
//   BadSize            0 and too many threads
//   SelfGroup          a group of one does everything without peers
//   OddSizes           groups of 5 and 16
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "comm/collectives.h"
#include "comm/exchange.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::Group;
using Clock = std::chrono::steady_clock;

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(Clock::now() - begin_).count(); }

 private:
  Clock::time_point begin_ = Clock::now();
};

TEST(Local, BarrierWaits) {
  for (const int size : {1, 2, 4}) {
    std::atomic<int> entered{0};
    comm::run_local(size, [&](const Group& group) {
      for (int round = 1; round <= 200; ++round) {
        entered.fetch_add(1);
        comm::barrier(group);
        EXPECT_GE(entered.load(), round * size);
      }
    });
  }
}

TEST(Local, ThrowReachesAll) {
  for (int bad = 0; bad < 4; ++bad) {
    for (const bool in_subgroup : {false, true}) {
      const Stopwatch watch;
      std::atomic<int> num_lost{0};
      const Caught caught = catch_error([&] {
        comm::run_local(4, [&](const Group& world) {
          const Group group = in_subgroup ? world.split(0, 0).split(1, 0) : world;
          if (group.rank() == bad) {
            throw DataError(ErrorDetail{"read", "file", "x.bin", "is cut off"});
          }
          const Caught lost = catch_error([&] { comm::barrier(group); });
          EXPECT_EQ(lost.type, "PeerLost") << lost.text;
          expect_contains(lost.text, {"has left", "rank(s) "});
          num_lost.fetch_add(1);
          comm::barrier(world);  // throws PeerLost again
        });
      });
      EXPECT_EQ(num_lost.load(), 3);
      EXPECT_EQ(caught.type, "DataError");
      EXPECT_EQ(caught.text, "[read] file=x.bin is cut off");
      EXPECT_LT(watch.seconds(), 10);
    }
  }
}

TEST(Local, LowestCause) {
  const auto run = [](int first, int second) {
    return catch_error([&] {
      comm::run_local(4, [&](const Group& group) {
        if (group.rank() == first) throw std::runtime_error("first");
        if (group.rank() == second) throw std::runtime_error("second");
        comm::barrier(group);
      });
    });
  };
  EXPECT_EQ(run(1, 3).text, "first");
  EXPECT_EQ(run(3, 2).text, "second");
}

TEST(Local, ReturnReachesAll) {
  const Stopwatch watch;
  const Caught caught = catch_error([] {
    comm::run_local(3, [](const Group& group) {
      if (group.rank() != 1) comm::barrier(group);
    });
  });
  EXPECT_EQ(caught.type, "PeerLost");
  expect_contains(caught.text, {"nothing received from rank(s) 1", "its body has returned"});
  EXPECT_LT(watch.seconds(), 10);
}

TEST(Local, AgreedErrorOnAll) {
  for (int round = 0; round < 200; ++round) {
    std::atomic<int> num_agreed{0};
    const Caught caught = catch_error([&] {
      comm::run_local(4, [&](const Group& group) {
        try {
          comm::barrier(group, {"save", -1, group.rank() == 2 ? 8 : 7});
        } catch (const RanksDisagree& error) {
          num_agreed.fetch_add(error.detail().culprit == 2 ? 1 : 0);
          throw;
        }
      });
    });
    EXPECT_EQ(caught.type, "RanksDisagree");
    EXPECT_EQ(num_agreed.load(), 4);
  }
}

TEST(Local, OnlyPeerLost) {
  const Caught caught = catch_error([] {
    comm::run_local(2, [](const Group& group) {
      group.set_timeout_ms(30);
      if (group.rank() == 0) comm::barrier(group);
    });
  });
  EXPECT_EQ(caught.type, "PeerLost");
}

TEST(Local, BadSize) {
  for (const int size : {-1, 0, 1025}) {
    const Caught caught = catch_error([&] { comm::run_local(size, [](const Group&) {}); });
    EXPECT_EQ(caught.type, "ConfigError");
    expect_contains(caught.text, {"[run_local] size=" + std::to_string(size), "[1, 1024]"});
  }
}

TEST(Local, SelfGroup) {
  const Group group;
  EXPECT_EQ(group.rank(), 0);
  EXPECT_EQ(group.size(), 1);
  EXPECT_STREQ(group.backend_name(), "self");
  group.set_config_hash(5);
  comm::barrier(group);
  double sum = 3;
  comm::all_reduce(&sum, 1, comm::ReduceOp::kSum, group);
  EXPECT_EQ(sum, 3);
  float mine = 2;
  float all = 0;
  comm::all_gather(&mine, sizeof(mine), &all, group);
  comm::broadcast(&mine, sizeof(mine), 0, group);
  EXPECT_EQ(all, 2);
  EXPECT_EQ(mine, 2);
  EXPECT_EQ(comm::exchange_counts({4, 5}, 2, group), (std::vector<int64_t>{4, 5}));
  const float send[4] = {1, 2, 3, 4};
  float recv[4] = {};
  comm::exchange_rows(send, recv, {kernels::DType::kFloat32, 2}, {{2}, {2}}, group);
  EXPECT_EQ(recv[3], 4);
  const Group part = group.split(3, 1);
  EXPECT_EQ(part.size(), 1);
  comm::barrier(part);
}

TEST(Local, OddSizes) {
  for (const int size : {5, 16}) {
    comm::run_local(size, [](const Group& group) {
      std::vector<float> data(1000, static_cast<float>(group.rank()));
      comm::all_reduce(data.data(), 1000, comm::ReduceOp::kSum, group);
      const int size_now = group.size();
      EXPECT_EQ(data, std::vector<float>(1000, static_cast<float>(size_now * (size_now - 1) / 2)));
    });
  }
}

}  // namespace
}  // namespace perseid::testing
