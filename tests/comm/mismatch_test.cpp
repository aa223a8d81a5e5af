// One rank differs in one thing. All ranks throw RanksDisagree with the same culprit, each text has
// the operation, the culprit and both values; no row has moved. Each rank in turn is the odd one;
// at two ranks the lower one is right (tie), whoever it is.
//   RowsShort, RowsLong            usable afterwards
//   Width, DType, Config           usable afterwards
//   Layer, Step, Collective, Name, Sequence     the group is failed afterwards
//   AllReduceArguments, BroadcastArguments, OtherArguments   count, dtype, op, bytes, root, counts
//   SubgroupOnly                   a failed group leaves the others alone
//   LowestOfSeveral                two odd ranks: the lower one is named
#include "comm/backend.h"
#include "comm/collectives.h"
#include "comm/exchange.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::CallSite;
using comm::ExchangePlan;
using comm::Group;
using comm::RowType;
using kernels::DType;

constexpr float kPoison = -7777;

/// One call of exchange_rows with 2 rows to each rank.
struct Exchange {
  RowType row{DType::kFloat32, 5};
  CallSite site{"dispatch", 3, 41};
  ExchangePlan plan;
  std::vector<float> send = std::vector<float>(1000, 1);
  std::vector<float> recv = std::vector<float>(1000, kPoison);

  explicit Exchange(const Group& group) {
    plan.send_rows.assign(size_t(group.size()), 2);
    plan.recv_rows.assign(size_t(group.size()), 2);
  }
  void run(const Group& group) {
    comm::exchange_rows(send.data(), recv.data(), row, plan, group, site);
  }
};

void expect_usable(const Group& group) {
  Exchange exchange(group);
  const Caught caught = catch_error([&] { exchange.run(group); });
  EXPECT_EQ(caught.type, "none") << caught.text;
  EXPECT_EQ(exchange.recv[0], 1);
}

void expect_failed(const Group& group, const std::string& type) {
  const Caught caught = catch_error([&] { comm::barrier(group); });
  EXPECT_EQ(caught.type, type);
  expect_contains(caught.text, {"[barrier] group=failed by an earlier error: ["});
}

void expect_culprit(const Caught& caught, const std::string& type, int culprit, const Group& group,
                    const std::vector<std::string>& parts) {
  EXPECT_EQ(caught.type, type) << caught.text;
  EXPECT_EQ(caught.detail.culprit, culprit) << caught.text;
  EXPECT_EQ(caught.detail.rank, group.rank()) << caught.text;
  expect_contains(caught.text, parts);
  expect_contains(caught.text, {"rank " + std::to_string(culprit)});
}

int culprit_of(int odd, const Group& group) { return group.size() == 2 ? 1 : odd; }

/// Runs spoil(exchange) on each rank in turn, on a group of its own.
void for_each_odd_rank(const Group& world, bool is_usable_after,
                       const std::vector<std::string>& parts,
                       const std::function<void(Exchange&)>& spoil) {
  if (world.size() == 1) return;
  for (int odd = 0; odd < world.size(); ++odd) {
    const Group group = world.split(0, 0);
    Exchange exchange(group);
    if (group.rank() == odd) spoil(exchange);
    const Caught caught = catch_error([&] { exchange.run(group); });
    expect_culprit(caught, "RanksDisagree", culprit_of(odd, group), group, parts);
    EXPECT_EQ(exchange.recv, std::vector<float>(1000, kPoison)) << "rows have moved";
    if (is_usable_after) {
      expect_usable(group);
    } else {
      expect_failed(group, "RanksDisagree");
    }
  }
}

TEST(Mismatch, RowsShort) {
  run_ranks([](const Group& world) {
    for (int odd = 0; odd < world.size() && world.size() > 1; ++odd) {
      Exchange exchange(world);
      const int target = odd == 0 ? world.size() - 1 : 0;
      if (world.rank() == odd) exchange.plan.send_rows[size_t(target)] = 1;
      const Caught caught = catch_error([&] { exchange.run(world); });
      const std::string values = "send_rows=1 of rank " + std::to_string(odd) +
                                 " differs from recv_rows=2 of rank " + std::to_string(target);
      expect_culprit(caught, "RanksDisagree", odd, world, {"[dispatch] " + values, "step 41"});
      EXPECT_EQ(exchange.recv, std::vector<float>(1000, kPoison));
      expect_usable(world);
    }
  });
}

TEST(Mismatch, RowsLong) {
  run_ranks([](const Group& world) {
    for (int odd = 0; odd < world.size() && world.size() > 1; ++odd) {
      Exchange exchange(world);
      for (int p = 0; p < world.size(); ++p) {
        if (world.rank() == odd && p != odd) exchange.plan.send_rows[size_t(p)] = 9;
      }
      const Caught caught = catch_error([&] { exchange.run(world); });
      expect_culprit(caught, "RanksDisagree", odd, world,
                     {"[dispatch] send_rows=9", "recv_rows=2"});
      expect_usable(world);
    }
  });
}

TEST(Mismatch, Width) {
  run_ranks([](const Group& world) {
    for_each_odd_rank(world, true,
                      {"[dispatch] dtype=fp32, width=", "dtype=fp32, width=5",
                       "dtype=fp32, width=6", "must use one width", "layer 3, step 41"},
                      [](Exchange& exchange) { exchange.row.width = 6; });
  });
}

TEST(Mismatch, DType) {
  run_ranks([](const Group& world) {
    for_each_odd_rank(
        world, true,
        {"[dispatch] dtype=", "dtype=fp32, width=5", "dtype=bf16, width=5", "must use one dtype"},
        [](Exchange& exchange) { exchange.row.dtype = DType::kBFloat16; });
  });
}

TEST(Mismatch, Layer) {
  run_ranks([](const Group& world) {
    for_each_odd_rank(world, false, {"[dispatch] layer=", "layer=3", "layer=4"},
                      [](Exchange& exchange) { exchange.site.layer = 4; });
    for_each_odd_rank(world, false, {"[dispatch] layer=", "layer=3", "layer=-1"},
                      [](Exchange& exchange) { exchange.site.layer = -1; });
  });
}

TEST(Mismatch, Step) {
  run_ranks([](const Group& world) {
    for_each_odd_rank(world, false, {"[dispatch] step=", "step=41", "step=42"},
                      [](Exchange& exchange) { exchange.site.step = 42; });
  });
}

TEST(Mismatch, Name) {
  run_ranks([](const Group& world) {
    for_each_odd_rank(world, false, {"operation=", "operation=dispatch", "operation=combine"},
                      [](Exchange& exchange) { exchange.site.operation = "combine"; });
  });
}

TEST(Mismatch, Collective) {
  run_ranks([](const Group& world) {
    for (int odd = 0; odd < world.size() && world.size() > 1; ++odd) {
      const Group group = world.split(0, 0);
      Exchange exchange(group);
      const Caught caught = catch_error([&] {
        if (group.rank() == odd) {
          comm::barrier(group, exchange.site);
        } else {
          exchange.run(group);
        }
      });
      expect_culprit(caught, "RanksDisagree", culprit_of(odd, group), group,
                     {"[dispatch] collective=", "collective=barrier", "collective=exchange_rows"});
      expect_failed(group, "RanksDisagree");
      expect_failed(group, "RanksDisagree");
    }
  });
}

TEST(Mismatch, Sequence) {
  run_ranks([](const Group& world) {
    for (int odd = 0; odd < world.size() && world.size() > 1; ++odd) {
      const Group group = world.split(0, 0);
      comm::barrier(group);
      if (group.rank() == odd) group.backend().state().sequence += 7;
      Exchange exchange(group);
      const Caught caught = catch_error([&] { exchange.run(group); });
      expect_culprit(caught, "RanksDisagree", culprit_of(odd, group), group,
                     {"[dispatch] sequence=", "sequence=1", "sequence=8"});
      expect_failed(group, "RanksDisagree");
    }
  });
}

TEST(Mismatch, Config) {
  run_ranks([](const Group& world) {
    for (int odd = 0; odd < world.size() && world.size() > 1; ++odd) {
      const Group group = world.split(0, 0);
      const uint32_t hash = group.rank() == odd ? 0xBEEF : 0xABCD;
      const Caught caught = catch_error([&] { group.set_config_hash(hash); });
      expect_culprit(
          caught, "RanksDisagree", culprit_of(odd, group), group,
          {"[set_config_hash] config_hash=", "config_hash=0xbeef", "config_hash=0xabcd"});
      expect_usable(group);
      group.set_config_hash(0x1234);
      expect_usable(group);
      // A rank whose settings change later is found by the next collective of any kind.
      if (group.rank() == odd) group.backend().state().config_hash = 0x77;
      Exchange exchange(group);
      const Caught later = catch_error([&] { exchange.run(group); });
      expect_culprit(later, "RanksDisagree", culprit_of(odd, group), group,
                     {"[dispatch] config_hash=", "config_hash=0x77", "config_hash=0x1234"});
    }
  });
}

TEST(Mismatch, SubgroupsShareConfig) {
  run_ranks([](const Group& world) {
    world.set_config_hash(0x55);
    const Group group = world.split(0, 0);
    EXPECT_EQ(group.backend().state().config_hash, 0x55u);
    expect_usable(group);
  });
}

/// `call(is_odd)` on a usable group; the last rank is the odd one.
void expect_disagree(const Group& group, const std::vector<std::string>& parts,
                     const std::function<void(bool)>& call) {
  const Caught caught = catch_error([&] { call(group.rank() == group.size() - 1); });
  expect_culprit(caught, "RanksDisagree", group.size() - 1, group, parts);
  expect_usable(group);
}

TEST(Mismatch, AllReduceArguments) {
  run_ranks([](const Group& group) {
    if (group.size() == 1) return;
    std::vector<double> data(100, 1);
    using comm::ReduceOp;
    expect_disagree(
        group, {"[all_reduce] dtype=fp64, count=8, op=sum of rank", "count=7"},
        [&](bool is_odd) { comm::all_reduce(data.data(), is_odd ? 8 : 7, ReduceOp::kSum, group); });
    expect_disagree(
        group, {"count=7, op=max of rank", "op=sum; all ranks must use one op"}, [&](bool is_odd) {
          comm::all_reduce(data.data(), 7, is_odd ? ReduceOp::kMax : ReduceOp::kSum, group);
        });
    expect_disagree(group, {"dtype=int64, count=7", "dtype=fp64, count=7"}, [&](bool is_odd) {
      std::vector<int64_t> integers(7);
      if (is_odd) {
        comm::all_reduce(integers.data(), 7, ReduceOp::kSum, group);
      } else {
        comm::all_reduce(data.data(), 7, ReduceOp::kSum, group);
      }
    });
    EXPECT_EQ(data, std::vector<double>(100, 1));
  });
}

TEST(Mismatch, OtherArguments) {
  run_ranks([](const Group& group) {
    if (group.size() == 1) return;
    std::vector<char> data(1000, 'x');
    std::vector<char> all(1000, 'y');
    expect_disagree(group, {"[all_gather] bytes=4 of rank", "bytes=5"}, [&](bool is_odd) {
      comm::all_gather(data.data(), is_odd ? 4 : 5, all.data(), group);
    });
    expect_disagree(group, {"[broadcast] bytes=4, root=0 of rank", "bytes=5, root=0"},
                    [&](bool is_odd) { comm::broadcast(data.data(), is_odd ? 4 : 5, 0, group); });
    expect_disagree(group, {"bytes=5, root=1 of rank", "bytes=5, root=0", "must use one root"},
                    [&](bool is_odd) { comm::broadcast(data.data(), 5, is_odd ? 1 : 0, group); });
    expect_disagree(group, {"[exchange_counts] counts_per_peer=2 of rank", "counts_per_peer=1"},
                    [&](bool is_odd) {
                      const int64_t counts = is_odd ? 2 : 1;
                      const auto total = static_cast<size_t>(counts * group.size());
                      comm::exchange_counts(std::vector<int64_t>(total), counts, group);
                    });
    EXPECT_EQ(all, std::vector<char>(1000, 'y'));
  });
}

TEST(Mismatch, SubgroupOnly) {
  run_ranks([](const Group& world) {
    if (world.size() == 1) return;
    const Group group = world.split(0, 0);
    catch_error([&] { comm::barrier(group, {"work", -1, group.rank()}); });
    expect_failed(group, "RanksDisagree");
    expect_usable(world);
    expect_usable(world.split(0, 0));
  });
}

TEST(Mismatch, LowestOfSeveral) {
  run_ranks([](const Group& group) {
    if (group.size() < 4) return;
    Exchange exchange(group);
    if (group.rank() == 1) exchange.row.width = 9;
    if (group.rank() == 3) exchange.row.width = 8;
    const Caught caught = catch_error([&] { exchange.run(group); });
    expect_culprit(caught, "RanksDisagree", 1, group, {"width=9 of rank 1", "width=5;"});
  });
}

}  // namespace
}  // namespace perseid::testing
