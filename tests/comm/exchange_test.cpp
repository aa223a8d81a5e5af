// Payload: value(s, r, i, c) in column c of row i from rank s to rank r; unique, so a mix-up is a
// mismatch. Receive buffers are NaN before, and have a guard behind.
//   CountsArrive       recv[p * C + c] = what rank p passed for this rank, for C = 0, 1, 3
//   RowsArrive         rank r reads value(s, r, i, c) in (s, i) order, for even and uneven rows, no
//                      rows for one rank, for all ranks, all rows to one rank, rows of no width
//   RowTypesArrive     rows of 1 to 5000 bytes of each dtype, more row types than are kept
//   ReversedIsInverse  exchange, then exchange with reversed(plan): the input, bit for bit
//   IsTranspose        <exchange(x), y> == <x, back(y)> summed over ranks, float64, to 1e-12
//   LargeRowsArrive    blocks far above the size at which MPI sends without waiting
#include "comm/exchange.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "comm/collectives.h"
#include "exchange_payload.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::ExchangePlan;
using comm::Group;
using comm::RowType;
using kernels::DType;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

ExchangePlan make_plan(Shape shape, const Group& group) {
  std::vector<int64_t> send_rows;
  for (int p = 0; p < group.size(); ++p) send_rows.push_back(rows_of(shape, group.rank(), p));
  return {send_rows, comm::exchange_counts(send_rows, 1, group)};
}

std::vector<double> payload(const ExchangePlan& plan, int64_t width, const Group& group) {
  std::vector<double> rows;
  for (int p = 0; p < group.size(); ++p) {
    for (int64_t i = 0; i < plan.send_rows[static_cast<size_t>(p)]; ++i) {
      for (int64_t c = 0; c < width; ++c) rows.push_back(value(group.rank(), p, i, c));
    }
  }
  return rows;
}

std::vector<double> expected(Shape shape, int64_t width, const Group& group) {
  std::vector<double> rows;
  for (int p = 0; p < group.size(); ++p) {
    for (int64_t i = 0; i < rows_of(shape, p, group.rank()); ++i) {
      for (int64_t c = 0; c < width; ++c) rows.push_back(value(p, group.rank(), i, c));
    }
  }
  return rows;
}

std::vector<double> exchanged(const std::vector<double>& rows, int64_t width,
                              const ExchangePlan& plan, const Group& group) {
  const auto num_values = static_cast<size_t>(plan.num_recv_rows() * width);
  std::vector<double> recv(num_values + 1, kNaN);
  comm::exchange_rows(rows.data(), recv.data(), {DType::kFloat64, width}, plan, group,
                      {"dispatch", 3, 41});
  EXPECT_TRUE(std::isnan(recv.back())) << "wrote behind the buffer";
  recv.pop_back();
  return recv;
}

// Any values in [-1, 1); the same on each platform.
double noise(int64_t key) {
  const auto mixed = static_cast<uint64_t>(key + 1) * 0x9E3779B97F4A7C15ull;
  return static_cast<double>((mixed ^ (mixed >> 29)) % 2000003) / 1000001.5 - 1;
}

TEST(Exchange, CountsArrive) {
  run_ranks([](const Group& group) {
    for (const int64_t counts : {0, 1, 3}) {
      std::vector<int64_t> send;
      std::vector<int64_t> want;
      for (int p = 0; p < group.size(); ++p) {
        for (int64_t c = 0; c < counts; ++c) {
          send.push_back((group.rank() * 100 + p) * 10 + c);
          want.push_back((p * 100 + group.rank()) * 10 + c);
        }
      }
      EXPECT_EQ(comm::exchange_counts(send, counts, group), want);
    }
    const std::vector<int64_t> largest(static_cast<size_t>(group.size()), 2147483647);
    EXPECT_EQ(comm::exchange_counts(largest, 1, group), largest);
  });
}

TEST(Exchange, RowsArrive) {
  run_ranks([](const Group& group) {
    for (const Shape shape : kShapes) {
      for (const int64_t width : {0, 1, 7}) {
        const ExchangePlan plan = make_plan(shape, group);
        EXPECT_EQ(exchanged(payload(plan, width, group), width, plan, group),
                  expected(shape, width, group));
      }
    }
  });
}

TEST(Exchange, RowTypesArrive) {
  run_ranks([](const Group& group) {
    const RowType types[] = {{DType::kBytes, 1},    {DType::kBytes, 13},  {DType::kBFloat16, 5},
                             {DType::kFloat32, 3},  {DType::kInt32, 9},   {DType::kInt64, 2},
                             {DType::kFloat64, 11}, {DType::kBytes, 100}, {DType::kBytes, 333},
                             {DType::kBytes, 5000}, {DType::kBytes, 13},  {DType::kBytes, 77}};
    const ExchangePlan plan = make_plan(Shape::kUneven, group);
    for (const RowType& type : types) {
      const auto byte = [&](int s, int r, int64_t k) {
        return static_cast<char>((s * 53 + r * 31 + k * 7 + 1) % 251);
      };
      std::vector<char> send;
      std::vector<char> want;
      for (int p = 0; p < group.size(); ++p) {
        const auto peer = static_cast<size_t>(p);
        for (int64_t k = 0; k < plan.send_rows[peer] * type.bytes(); ++k) {
          send.push_back(byte(group.rank(), p, k));
        }
        for (int64_t k = 0; k < plan.recv_rows[peer] * type.bytes(); ++k) {
          want.push_back(byte(p, group.rank(), k));
        }
      }
      std::vector<char> recv(want.size(), '\xFF');
      comm::exchange_rows(send.data(), recv.data(), type, plan, group);
      EXPECT_EQ(recv, want);
    }
  });
}

TEST(Exchange, ReversedIsInverse) {
  run_ranks([](const Group& group) {
    for (const Shape shape : kShapes) {
      const ExchangePlan plan = make_plan(shape, group);
      const std::vector<double> rows = payload(plan, 5, group);
      const std::vector<double> there = exchanged(rows, 5, plan, group);
      EXPECT_EQ(exchanged(there, 5, comm::reversed(plan), group), rows);
    }
  });
}

TEST(Exchange, IsTranspose) {
  run_ranks([](const Group& group) {
    for (const Shape shape : kShapes) {
      const ExchangePlan plan = make_plan(shape, group);
      std::vector<double> x(static_cast<size_t>(plan.num_send_rows() * 3));
      std::vector<double> y(static_cast<size_t>(plan.num_recv_rows() * 3));
      for (size_t i = 0; i < x.size(); ++i) x[i] = noise(group.rank() * 1000 + int64_t(i));
      for (size_t i = 0; i < y.size(); ++i) y[i] = noise(group.rank() * 1000 + 500 + int64_t(i));
      const std::vector<double> there = exchanged(x, 3, plan, group);
      const std::vector<double> back = exchanged(y, 3, comm::reversed(plan), group);
      double sums[2] = {std::inner_product(there.begin(), there.end(), y.begin(), 0.0),
                        std::inner_product(x.begin(), x.end(), back.begin(), 0.0)};
      comm::all_reduce(sums, 2, comm::ReduceOp::kSum, group);
      EXPECT_NEAR(sums[0], sums[1], 1e-12 * (1 + std::abs(sums[0])));
    }
  });
}

TEST(Exchange, LargeRowsArrive) {
  run_ranks([](const Group& group) {
    const auto size = static_cast<size_t>(group.size());
    const ExchangePlan plan{std::vector<int64_t>(size, 257), std::vector<int64_t>(size, 257)};
    constexpr int64_t kWidth = 1031;
    std::vector<int32_t> send(size * 257 * kWidth);
    std::vector<int32_t> recv(send.size(), -1);
    for (size_t i = 0; i < send.size(); ++i) {
      send[i] = static_cast<int32_t>(i) * 8 + group.rank();
    }
    comm::exchange_rows(send.data(), recv.data(), {DType::kInt32, kWidth}, plan, group);
    int64_t num_wrong = 0;
    const size_t block = 257 * kWidth;
    for (size_t i = 0; i < recv.size(); ++i) {
      const size_t from = i / block;
      const size_t there = static_cast<size_t>(group.rank()) * block + i % block;
      num_wrong += recv[i] != static_cast<int32_t>(there * 8 + from) ? 1 : 0;
    }
    EXPECT_EQ(num_wrong, 0);
  });
}

}  // namespace
}  // namespace perseid::testing
