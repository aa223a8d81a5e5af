#include "comm/exchange.h"

#include <limits>
#include <numeric>

#include "comm/collective.h"

namespace perseid::comm {
namespace {

constexpr int64_t kUnitsMax = std::numeric_limits<int32_t>::max();

bool is_valid(int64_t count) { return count >= 0 && count <= kUnitsMax; }

void check_rows(Collective& collective, const std::vector<int64_t>& rows, Code code) {
  const auto size = static_cast<size_t>(collective.size());
  collective.refuse_unless(rows.size() == size, Code::kPlanSize, static_cast<int64_t>(rows.size()),
                           collective.size());
  for (size_t p = 0; p < rows.size(); ++p) {
    collective.refuse_unless(is_valid(rows[p]), code, rows[p], static_cast<int64_t>(p));
  }
}

// Bytes of a row; refuses what is no row.
int64_t check_row(Collective& collective, const RowType& row) {
  const bool is_dtype = row.dtype <= kernels::kLastDType;
  collective.refuse_unless(is_dtype, Code::kDType, static_cast<int64_t>(row.dtype));
  if (!is_dtype) return 0;
  const int64_t element_bytes = kernels::dtype_bytes(row.dtype);
  const bool fits = row.width >= 0 && row.width <= kUnitsMax / element_bytes;
  const int64_t bytes = is_valid(row.width) ? row.bytes() : 0;
  collective.refuse_unless(fits, Code::kWidth, row.width, bytes);
  return fits ? bytes : 0;
}

// Bytes of rows, at most 2^62: a wrong plan must not overflow the check that finds it.
int64_t bytes_of(int64_t rows, int64_t row_bytes) {
  constexpr int64_t kBytesMax = int64_t{1} << 62;
  return row_bytes > 0 && rows > kBytesMax / row_bytes ? kBytesMax : rows * row_bytes;
}

bool overlap(const void* x, int64_t x_bytes, const void* y, int64_t y_bytes) {
  const auto a = reinterpret_cast<uintptr_t>(x);
  const auto b = reinterpret_cast<uintptr_t>(y);
  return x_bytes > 0 && y_bytes > 0 && a < b + static_cast<uintptr_t>(y_bytes) &&
         b < a + static_cast<uintptr_t>(x_bytes);
}

void check_buffers(Collective& collective, const void* send, const void* recv, int64_t row_bytes,
                   const ExchangePlan& plan) {
  if (collective.has_refused()) return;  // sums of refused rows mean nothing
  const int64_t send_rows = plan.num_send_rows();
  const int64_t recv_rows = plan.num_recv_rows();
  const bool needs_send = send_rows > 0 && row_bytes > 0;
  const bool needs_recv = recv_rows > 0 && row_bytes > 0;
  collective.refuse_unless(send != nullptr || !needs_send, Code::kSendBuffer, send_rows);
  collective.refuse_unless(recv != nullptr || !needs_recv, Code::kRecvBuffer, recv_rows);
  const int64_t send_bytes = bytes_of(send_rows, row_bytes);
  const int64_t recv_bytes = bytes_of(recv_rows, row_bytes);
  collective.refuse_unless(!overlap(send, send_bytes, recv, recv_bytes), Code::kOverlap, recv_bytes,
                           send_bytes);
}

}  // namespace

int64_t ExchangePlan::num_send_rows() const {
  return std::accumulate(send_rows.begin(), send_rows.end(), int64_t{0});
}

int64_t ExchangePlan::num_recv_rows() const {
  return std::accumulate(recv_rows.begin(), recv_rows.end(), int64_t{0});
}

ExchangePlan reversed(const ExchangePlan& plan) {
  return ExchangePlan{plan.recv_rows, plan.send_rows};
}

std::vector<int64_t> exchange_counts(const std::vector<int64_t>& send, int64_t counts_per_peer,
                                     const Group& group, CallSite site) {
  Collective collective(group, OpCode::kExchangeCounts, site);
  collective.set_width(counts_per_peer);
  collective.refuse_unless(is_valid(counts_per_peer), Code::kCountsPerPeer, counts_per_peer);
  const int64_t needed = collective.size() * (is_valid(counts_per_peer) ? counts_per_peer : 0);
  const auto given = static_cast<int64_t>(send.size());
  collective.refuse_unless(given == needed, Code::kCountsSize, given, needed);
  for (size_t i = 0; i < send.size(); ++i) {
    collective.refuse_unless(is_valid(send[i]), Code::kCountValue, send[i],
                             static_cast<int64_t>(i));
  }
  std::vector<int64_t> recv;
  collective.allocate(needed * 8, [&] { recv.resize(send.size()); });
  collective.agree();
  if (send.empty()) return recv;
  std::vector<PeerBlock>& blocks = collective.clear_blocks();
  for (size_t p = 0; p < blocks.size(); ++p) {
    const int64_t begin = static_cast<int64_t>(p) * counts_per_peer;
    blocks[p] =
        PeerBlock{send.data() + begin, counts_per_peer, recv.data() + begin, counts_per_peer};
  }
  collective.move(sizeof(int64_t));
  return recv;
}

void exchange_rows(const void* send, void* recv, const RowType& row, const ExchangePlan& plan,
                   const Group& group, CallSite site, kernels::Stream stream) {
  Collective collective(group, OpCode::kExchangeRows, site);
  const int64_t row_bytes = check_row(collective, row);
  collective.set_dtype(static_cast<uint8_t>(row.dtype));
  collective.set_width(row.width);
  check_rows(collective, plan.send_rows, Code::kSendRows);
  check_rows(collective, plan.recv_rows, Code::kRecvRows);
  const auto self = static_cast<size_t>(collective.rank());
  if (plan.send_rows.size() > self && plan.recv_rows.size() > self) {
    collective.refuse_unless(plan.send_rows[self] == plan.recv_rows[self], Code::kOwnRows,
                             plan.send_rows[self], plan.recv_rows[self]);
  }
  collective.set_stream(stream);
  check_buffers(collective, send, recv, row_bytes, plan);
  if (!collective.has_refused()) {
    collective.reserve_device(bytes_of(plan.num_send_rows() - plan.send_rows[self], row_bytes),
                              bytes_of(plan.num_recv_rows() - plan.recv_rows[self], row_bytes));
  }
  collective.set_rows(plan.send_rows, plan.recv_rows);
  collective.agree();
  if (row_bytes == 0) return;

  std::vector<PeerBlock>& blocks = collective.clear_blocks();
  const auto* from = static_cast<const std::byte*>(send);
  auto* into = static_cast<std::byte*>(recv);
  for (size_t p = 0; p < blocks.size(); ++p) {
    blocks[p] = PeerBlock{from, plan.send_rows[p], into, plan.recv_rows[p]};
    if (plan.send_rows[p] > 0) from += plan.send_rows[p] * row_bytes;
    if (plan.recv_rows[p] > 0) into += plan.recv_rows[p] * row_bytes;
  }
  collective.move(row_bytes);
}

void before_exchange(NextExchange next, const Group& group, CallSite site,
                     const std::function<void()>& work) {
  try {
    work();
  } catch (const std::exception&) {
    try {
      Collective collective(
          group, next == NextExchange::kCounts ? OpCode::kExchangeCounts : OpCode::kExchangeRows,
          site);
      collective.refuse(Code::kCaller, 0);
      collective.agree();
    } catch (const Error&) {  // what the peers are told; the reason is what `work` threw
    }
    throw;
  }
}

}  // namespace perseid::comm
