// Payload in device memory: on the GPU or, with tests/cuda_emulator, the emulator; on threads and
// on processes. Values are those of exchange_payload.h; what is received was NaN before.
//   RowsArrive       rank r reads value(s, r, i, c) in (s, i) order, for all shapes and for rows of
//                    no width
//   ReversedReturns  exchange, then exchange with reversed(plan): the input, bit for bit
//   SendIsReusable   the send buffer is overwritten on the stream at once: the rows of then arrive
//   ReduceSums       sums, minima, maxima in closed form for 0, 1, odd counts and several stages
//   NanStays         a NaN of any rank is the minimum and the maximum
//   GatherOrders, BroadcastCopies  in closed form
//   OneRankOnHost    a rank that passes host memory: all ranks say so, and the group stays usable
//   MissingRank      the others throw PeerLost that names it
//   InSplitGroups    groups of one and of several
#include <cmath>
#include <limits>

#include "comm/collectives.h"
#include "comm/exchange.h"
#include "exchange_payload.h"
#include "ranks.h"
#include "tests/kernels/device_fixture.h"

namespace perseid::testing {
namespace {

using comm::ExchangePlan;
using comm::Group;
using comm::ReduceOp;
using comm::RowType;
using kernels::DType;
using kernels::testing::DeviceArray;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

class DeviceComm : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kernels::device_count() == 0) GTEST_SKIP() << "needs a GPU: " << kernels::device_problem();
  }
};

ExchangePlan make_plan(Shape shape, const Group& group) {
  ExchangePlan plan;
  for (int p = 0; p < group.size(); ++p) {
    plan.send_rows.push_back(rows_of(shape, group.rank(), p));
    plan.recv_rows.push_back(rows_of(shape, p, group.rank()));
  }
  return plan;
}

std::vector<double> sent_rows(const ExchangePlan& plan, int64_t width, const Group& group) {
  std::vector<double> rows;
  for (int p = 0; p < group.size(); ++p) {
    for (int64_t i = 0; i < plan.send_rows[size_t(p)]; ++i) {
      for (int64_t c = 0; c < width; ++c) rows.push_back(value(group.rank(), p, i, c));
    }
  }
  return rows;
}

std::vector<double> expected_rows(const ExchangePlan& plan, int64_t width, const Group& group) {
  std::vector<double> rows;
  for (int p = 0; p < group.size(); ++p) {
    for (int64_t i = 0; i < plan.recv_rows[size_t(p)]; ++i) {
      for (int64_t c = 0; c < width; ++c) rows.push_back(value(p, group.rank(), i, c));
    }
  }
  return rows;
}

std::vector<double> exchanged(const std::vector<double>& rows, int64_t width,
                              const ExchangePlan& plan, const Group& group) {
  const kernels::OwnedStream own;
  DeviceArray<double> send(rows, own.get());
  DeviceArray<double> recv(std::vector<double>(size_t(plan.num_recv_rows() * width), kNaN),
                           own.get());
  comm::exchange_rows(send.data(), recv.data(), {DType::kFloat64, width}, plan, group,
                      {"dispatch", 3, 41}, own.get());
  return recv.read();
}

TEST_F(DeviceComm, RowsArrive) {
  run_ranks([](const Group& group) {
    for (const Shape shape : kShapes) {
      for (const int64_t width : {0, 1, 7}) {
        const ExchangePlan plan = make_plan(shape, group);
        EXPECT_EQ(exchanged(sent_rows(plan, width, group), width, plan, group),
                  expected_rows(plan, width, group));
      }
    }
  });
}

TEST_F(DeviceComm, ReversedReturns) {
  run_ranks([](const Group& group) {
    for (const Shape shape : kShapes) {
      const ExchangePlan plan = make_plan(shape, group);
      const std::vector<double> rows = sent_rows(plan, 5, group);
      const std::vector<double> there = exchanged(rows, 5, plan, group);
      EXPECT_EQ(exchanged(there, 5, comm::reversed(plan), group), rows);
    }
  });
}

TEST_F(DeviceComm, SendIsReusable) {
  run_ranks([](const Group& group) {
    const auto size = static_cast<size_t>(group.size());
    constexpr int64_t kRows = 257, kWidth = 511;
    const ExchangePlan plan{std::vector<int64_t>(size, kRows), std::vector<int64_t>(size, kRows)};
    const size_t count = size * size_t(kRows * kWidth);
    const kernels::OwnedStream own;
    DeviceArray<int32_t> send(std::vector<int32_t>(count, -1), own.get());
    DeviceArray<int32_t> recv(std::vector<int32_t>(count, -1), own.get());
    for (int round = 0; round < 8; ++round) {
      const int mine = round * 16 + group.rank() + 1;
      const kernels::PinnedMemory host(int64_t(count * 4));
      std::fill_n(static_cast<int32_t*>(host.data()), count, mine);
      kernels::copy_bytes(send.data(), host.data(), host.bytes(), own.get());
      comm::exchange_rows(send.data(), recv.data(), {DType::kInt32, kWidth}, plan, group, {},
                          own.get());
      kernels::fill_zero(send.data(), host.bytes(), own.get());
      const std::vector<int32_t> got = recv.read();
      int64_t num_wrong = 0;
      for (size_t i = 0; i < count; ++i) {
        num_wrong += got[i] != round * 16 + int(i / size_t(kRows * kWidth)) + 1 ? 1 : 0;
      }
      EXPECT_EQ(num_wrong, 0);
    }
  });
}

template <typename T>
T element(int rank, int64_t i) {
  return static_cast<T>((i % 1000) * 16 + rank * 3 + 1);
}

template <typename T>
void expect_reduced(const Group& group, int64_t count) {
  const kernels::OwnedStream own;
  for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax}) {
    std::vector<T> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(element<T>(group.rank(), i));
    DeviceArray<T> data(values, own.get());
    comm::all_reduce(data.data(), count, op, group, {}, own.get());
    const std::vector<T> got = data.read();
    int64_t num_wrong = 0;
    for (int64_t i = 0; i < count; ++i) {
      T want = element<T>(0, i);
      if (op == ReduceOp::kMax) want = element<T>(group.size() - 1, i);
      for (int p = 1; p < group.size() && op == ReduceOp::kSum; ++p) want += element<T>(p, i);
      num_wrong += got[size_t(i)] != want ? 1 : 0;
    }
    EXPECT_EQ(num_wrong, 0) << count << " elements, op " << static_cast<int>(op);
  }
}

TEST_F(DeviceComm, ReduceSums) {
  run_ranks([](const Group& group) {
    for (const int64_t count : {0, 1, 3, 1001}) {
      expect_reduced<float>(group, count);
      expect_reduced<double>(group, count);
      expect_reduced<int64_t>(group, count);
    }
    expect_reduced<double>(group, (1 << 21) + 3);  // above what is on the host at a time
  });
}

TEST_F(DeviceComm, NanStays) {
  run_ranks([](const Group& group) {
    const kernels::OwnedStream own;
    for (int bad = 0; bad < group.size(); ++bad) {
      for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax}) {
        DeviceArray<double> data({1, group.rank() == bad ? kNaN : 2, 3}, own.get());
        comm::all_reduce(data.data(), 3, op, group, {}, own.get());
        const std::vector<double> got = data.read();
        EXPECT_TRUE(std::isnan(got[1]));
        EXPECT_FALSE(std::isnan(got[0]) || std::isnan(got[2]));
      }
    }
  });
}

TEST_F(DeviceComm, GatherOrders) {
  run_ranks([](const Group& group) {
    const kernels::OwnedStream own;
    for (const size_t count : {0, 1, 5, 70000}) {
      DeviceArray<int32_t> mine(std::vector<int32_t>(count, 8 + group.rank()), own.get());
      DeviceArray<int32_t> all(std::vector<int32_t>(count * size_t(group.size()), -1), own.get());
      comm::all_gather(mine.data(), int64_t(count * 4), all.data(), group, {}, own.get());
      std::vector<int32_t> want;
      for (int p = 0; p < group.size(); ++p) want.insert(want.end(), count, 8 + p);
      EXPECT_EQ(all.read(), want);
    }
  });
}

TEST_F(DeviceComm, BroadcastCopies) {
  run_ranks([](const Group& group) {
    const kernels::OwnedStream own;
    for (int root = 0; root < group.size(); ++root) {
      for (const size_t count : {0, 1, 70001}) {
        const int mine = group.rank() == root ? 1000 + root : -1;
        DeviceArray<int32_t> data(std::vector<int32_t>(count, mine), own.get());
        comm::broadcast(data.data(), int64_t(count * 4), root, group, {}, own.get());
        EXPECT_EQ(data.read(), std::vector<int32_t>(count, 1000 + root));
      }
    }
  });
}

void expect_disagree(const Group& group, int odd, const std::function<void(bool)>& call) {
  const Caught caught = catch_error([&] { call(group.rank() == odd); });
  EXPECT_EQ(caught.type, "RanksDisagree") << caught.text;
  EXPECT_EQ(caught.detail.culprit, group.size() == 2 ? 1 : odd);
  expect_contains(caught.text, {"device=cuda", "device=cpu", "memory of one kind of device"});
  EXPECT_EQ(catch_error([&] { comm::barrier(group); }).type, "none");
}

TEST_F(DeviceComm, OneRankOnHost) {
  run_ranks([](const Group& group) {
    if (group.size() == 1) return;
    const kernels::OwnedStream own;
    const std::vector<int64_t> one(size_t(group.size()), 1);
    std::vector<float> send(size_t(group.size()), 1), recv(size_t(group.size()), 2);
    DeviceArray<float> device_send(send, own.get()), device_recv(recv, own.get());
    const auto on = [&](bool is_host) { return is_host ? kernels::Stream{} : own.get(); };
    const auto from = [&](bool is_host) { return is_host ? send.data() : device_send.data(); };
    const auto into = [&](bool is_host) { return is_host ? recv.data() : device_recv.data(); };
    for (int odd = 0; odd < group.size(); ++odd) {
      expect_disagree(group, odd, [&](bool is_host) {
        comm::exchange_rows(from(is_host), into(is_host), {DType::kFloat32, 1}, {one, one}, group,
                            {}, on(is_host));
      });
      expect_disagree(group, odd, [&](bool is_host) {
        comm::all_reduce(into(is_host), 1, ReduceOp::kSum, group, {}, on(is_host));
      });
      expect_disagree(group, odd, [&](bool is_host) {
        comm::all_gather(from(is_host), 4, into(is_host), group, {}, on(is_host));
      });
      expect_disagree(group, odd, [&](bool is_host) {
        comm::broadcast(into(is_host), 4, 0, group, {}, on(is_host));
      });
    }
    EXPECT_EQ(recv, std::vector<float>(size_t(group.size()), 2));
  });
}

TEST_F(DeviceComm, MissingRank) {
  run_ranks([](const Group& world) {
    if (world.size() == 1) return;
    const int missing = world.size() - 1;
    const Group group = world.split(0, 0);
    group.set_timeout_ms(150);
    meet();
    if (group.rank() != missing) {
      const Caught caught =
          catch_error([&] { exchanged({}, 3, make_plan(Shape::kNothing, group), group); });
      EXPECT_EQ(caught.type, "PeerLost") << caught.text;
      EXPECT_EQ(caught.detail.culprit, missing) << caught.text;
    }
    meet();
  });
}

TEST_F(DeviceComm, InSplitGroups) {
  run_ranks([](const Group& world) {
    for (const Group& group : {world.split(world.rank(), 0), world.split(world.rank() / 2, 0)}) {
      const ExchangePlan plan = make_plan(Shape::kUneven, group);
      EXPECT_EQ(exchanged(sent_rows(plan, 7, group), 7, plan, group),
                expected_rows(plan, 7, group));
    }
  });
}

}  // namespace
}  // namespace perseid::testing
