// A rank whose arguments are wrong still takes part: all ranks throw ConfigError with that rank as
// culprit, the argument and the value in each text, and the group stays usable. A group of one
// throws the same error. Each rank in turn is the one that refuses.
//   Rows, Plan, Row, Buffers, Counts, Collectives, Split, Layer
//   BeforeAnExchange  what local work throws reaches the peers that wait in the exchange
//   HighestWins    of two refusals the same is thrown on all ranks; of equal ones the lowest rank's
#include <limits>

#include "comm/collectives.h"
#include "comm/exchange.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::ExchangePlan;
using comm::Group;
using comm::RowType;
using kernels::DType;

/// call(is_bad) is refused by the bad rank.
void expect_refused(const Group& group, const std::vector<std::string>& parts,
                    const std::function<void(bool)>& call) {
  for (int bad = 0; bad < group.size(); ++bad) {
    const Caught caught = catch_error([&] { call(group.rank() == bad); });
    EXPECT_EQ(caught.type, "ConfigError") << caught.text;
    EXPECT_EQ(caught.detail.culprit, bad) << caught.text;
    EXPECT_EQ(caught.detail.rank, group.rank());
    expect_contains(caught.text, parts);
    if (group.size() > 1) expect_contains(caught.text, {"of rank " + std::to_string(bad)});
    const Caught after = catch_error([&] { comm::barrier(group); });
    EXPECT_EQ(after.type, "none") << after.text;
  }
}

/// A valid exchange that `spoil` makes wrong on the bad rank.
struct Arguments {
  std::vector<float> send = std::vector<float>(100, 1);
  std::vector<float> recv = std::vector<float>(100, 2);
  const void* send_data = nullptr;
  void* recv_data = nullptr;
  RowType row{DType::kFloat32, 5};
  ExchangePlan plan;
  kernels::Stream stream;
  int layer = 2;
};

void expect_exchange_refused(const Group& group, const std::vector<std::string>& parts,
                             const std::function<void(Arguments&)>& spoil) {
  expect_refused(group, parts, [&](bool is_bad) {
    Arguments arguments;
    arguments.send_data = arguments.send.data();
    arguments.recv_data = arguments.recv.data();
    arguments.plan.send_rows.assign(size_t(group.size()), 2);
    arguments.plan.recv_rows.assign(size_t(group.size()), 2);
    if (is_bad) spoil(arguments);
    comm::exchange_rows(arguments.send_data, arguments.recv_data, arguments.row, arguments.plan,
                        group, {"dispatch", arguments.layer, 41}, arguments.stream);
  });
}

TEST(Refusal, Rows) {
  run_ranks([](const Group& group) {
    expect_exchange_refused(group, {"[dispatch] send_rows[0]=-1", "outside [0, 2^31)"},
                            [](Arguments& a) { a.plan.send_rows[0] = -1; });
    expect_exchange_refused(group, {"[dispatch] send_rows[0]=2147483648", "step 41"},
                            [](Arguments& a) { a.plan.send_rows[0] = int64_t{1} << 31; });
    expect_exchange_refused(
        group, {"[dispatch] recv_rows[0]=-9223372036854775808"},
        [](Arguments& a) { a.plan.recv_rows[0] = std::numeric_limits<int64_t>::min(); });
    expect_exchange_refused(group, {"[dispatch] send_rows=3", "recv_rows=4", "one plan"},
                            [&](Arguments& a) {
                              a.plan.send_rows[size_t(group.rank())] = 3;
                              a.plan.recv_rows[size_t(group.rank())] = 4;
                            });
  });
}

TEST(Refusal, Plan) {
  run_ranks([](const Group& group) {
    const std::string size = std::to_string(group.size());
    const std::string more = std::to_string(group.size() + 1);
    expect_exchange_refused(group, {"[dispatch] plan=0 entries", "group of " + size},
                            [](Arguments& a) { a.plan.send_rows.clear(); });
    expect_exchange_refused(group, {"[dispatch] plan=" + more + " entries"},
                            [](Arguments& a) { a.plan.recv_rows.push_back(0); });
  });
}

TEST(Refusal, Row) {
  run_ranks([](const Group& group) {
    expect_exchange_refused(group, {"[dispatch] width=-1"}, [](Arguments& a) { a.row.width = -1; });
    expect_exchange_refused(group, {"[dispatch] width=536870912", "2147483648 bytes"},
                            [](Arguments& a) { a.row.width = 1 << 29; });
    expect_exchange_refused(group, {"[dispatch] dtype=99"},
                            [](Arguments& a) { a.row.dtype = static_cast<DType>(99); });
    expect_exchange_refused(group, {"[dispatch] stream=cuda"},
                            [](Arguments& a) { a.stream.device = kernels::Device::kCuda; });
  });
}

TEST(Refusal, Buffers) {
  run_ranks([](const Group& group) {
    const std::string rows = std::to_string(2 * group.size());
    expect_exchange_refused(group, {"[dispatch] send=null", rows + " rows"},
                            [](Arguments& a) { a.send_data = nullptr; });
    expect_exchange_refused(group, {"[dispatch] recv=null", rows + " rows"},
                            [](Arguments& a) { a.recv_data = nullptr; });
    expect_exchange_refused(group, {"[dispatch] recv=", "overlaps"},
                            [](Arguments& a) { a.recv_data = a.send.data() + 1; });
  });
}

TEST(Refusal, Counts) {
  run_ranks([](const Group& group) {
    const auto size = static_cast<size_t>(group.size());
    expect_refused(group, {"[exchange_counts] send[0]=-5"}, [&](bool is_bad) {
      comm::exchange_counts(std::vector<int64_t>(size, is_bad ? -5 : 1), 1, group);
    });
    expect_refused(group, {"[exchange_counts] send[0]=2147483648"}, [&](bool is_bad) {
      comm::exchange_counts(std::vector<int64_t>(size, is_bad ? int64_t{1} << 31 : 1), 1, group);
    });
    expect_refused(group, {"[exchange_counts] counts_per_peer=-1"}, [&](bool is_bad) {
      comm::exchange_counts(std::vector<int64_t>(size), is_bad ? -1 : 1, group);
    });
    expect_refused(group,
                   {"[exchange_counts] send=0 entries", "counts_per_peer=" + std::to_string(size)},
                   [&](bool is_bad) {
                     comm::exchange_counts(std::vector<int64_t>(is_bad ? 0 : size), 1, group);
                   });
  });
}

TEST(Refusal, Collectives) {
  run_ranks([](const Group& group) {
    std::vector<float> data(100);
    std::vector<float> all(100);
    const auto sum = comm::ReduceOp::kSum;
    expect_refused(group, {"[all_reduce] count=-3"}, [&](bool is_bad) {
      comm::all_reduce(data.data(), is_bad ? -3 : 3, sum, group);
    });
    expect_refused(group, {"[all_reduce] count=2147483648"}, [&](bool is_bad) {
      comm::all_reduce(data.data(), is_bad ? int64_t{1} << 31 : 3, sum, group);
    });
    expect_refused(group, {"[all_reduce] data=null", "12 bytes"}, [&](bool is_bad) {
      comm::all_reduce(is_bad ? nullptr : data.data(), 3, sum, group);
    });
    expect_refused(group, {"[all_gather] bytes=-1"}, [&](bool is_bad) {
      comm::all_gather(data.data(), is_bad ? -1 : 4, all.data(), group);
    });
    expect_refused(group, {"[all_gather] data=null"}, [&](bool is_bad) {
      comm::all_gather(is_bad ? nullptr : data.data(), 4, all.data(), group);
    });
    expect_refused(group, {"[broadcast] bytes=2147483648"}, [&](bool is_bad) {
      comm::broadcast(data.data(), is_bad ? int64_t{1} << 31 : 4, 0, group);
    });
    expect_refused(group, {"[broadcast] root=", "choose root in [0, "}, [&](bool is_bad) {
      comm::broadcast(data.data(), 4, is_bad ? group.size() : 0, group);
    });
    expect_refused(group, {"[broadcast] data=null"}, [&](bool is_bad) {
      comm::broadcast(is_bad ? nullptr : data.data(), 4, 0, group);
    });
  });
}

TEST(Refusal, Split) {
  run_ranks([](const Group& group) {
    expect_refused(group, {"[split] color=-1", "choose color >= 0"},
                   [&](bool is_bad) { group.split(is_bad ? -1 : 0, 0); });
    const Caught caught = catch_error([&] { group.set_timeout_ms(0); });
    EXPECT_EQ(caught.type, "ConfigError");
    expect_contains(caught.text, {"[set_timeout_ms] timeout_ms=0"});
  });
}

TEST(Refusal, BeforeAnExchange) {
  using comm::NextExchange;
  run_ranks([](const Group& group) {
    const auto size = static_cast<size_t>(group.size());
    const ExchangePlan plan{std::vector<int64_t>(size, 1), std::vector<int64_t>(size, 1)};
    for (const NextExchange next : {NextExchange::kCounts, NextExchange::kRows}) {
      for (int bad = 0; bad < group.size(); ++bad) {
        const Caught caught = catch_error([&] {
          comm::before_exchange(next, group, {"dispatch", 2, 41}, [&] {
            require(group.rank() != bad, "dispatch", "rows", 3, "differs from 4 rows of the plan");
          });
          std::vector<int64_t> send(size), recv(size);
          if (next == NextExchange::kCounts)
            comm::exchange_counts(send, 1, group, {"dispatch", 2, 41});
          comm::exchange_rows(send.data(), recv.data(), {DType::kInt64, 1}, plan, group,
                              {"dispatch", 2, 41});
        });
        EXPECT_EQ(caught.type, "ConfigError") << caught.text;
        const std::string of_bad = "of rank " + std::to_string(bad) + " before the exchange";
        expect_contains(caught.text, group.rank() == bad
                                         ? std::vector<std::string>{"[dispatch] rows=3 differs"}
                                         : std::vector<std::string>{"arguments=refused", of_bad});
        EXPECT_EQ(catch_error([&] { comm::barrier(group); }).type, "none");
      }
    }
  });
}

TEST(Refusal, HighestWins) {
  run_ranks([](const Group& group) {
    if (group.size() < 2) return;
    std::vector<float> data(100);
    const Caught caught = catch_error([&] {
      if (group.rank() == 0) comm::broadcast(nullptr, 4, 0, group);
      if (group.rank() == 1) comm::broadcast(data.data(), 4, -2, group);
      if (group.rank() > 1) comm::broadcast(data.data(), 4, 0, group);
    });
    EXPECT_EQ(caught.type, "ConfigError");
    EXPECT_EQ(caught.detail.culprit, 1);
    expect_contains(caught.text, {"[broadcast] root=-2 of rank 1"});
    const Caught equal = catch_error(
        [&] { comm::broadcast(data.data(), 4, group.rank() == 0 ? 0 : -group.rank(), group); });
    EXPECT_EQ(equal.detail.culprit, 1);
    expect_contains(equal.text, {"[broadcast] root=-1 of rank 1"});
  });
}

}  // namespace
}  // namespace perseid::testing
