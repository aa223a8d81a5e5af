#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "comm/group.h"
#include "kernels/dtype.h"
#include "kernels/stream.h"

namespace perseid::comm {

/// Rows this rank sends to and receives from each rank of a group. Rows are opaque: the plan does
/// not know their width, so one plan serves tokens, weights and gradients.
struct ExchangePlan {
  std::vector<int64_t> send_rows;  ///< [P] rows for rank p, in rank order
  std::vector<int64_t> recv_rows;  ///< [P] rows from rank p; their sum is R, which may be 0

  int64_t num_send_rows() const;
  int64_t num_recv_rows() const;
};

/// The way back: exchange_rows with reversed(plan) is the transpose of exchange_rows with plan.
ExchangePlan reversed(const ExchangePlan& plan);

/// Tells each rank how much it will get: recv[p*C + c] = what rank p passed as send[rank*C + c].
/// Collective. Counts are >= 0 and < 2^31, else all ranks throw.
/// @param counts_per_peer  C, equal on all ranks
std::vector<int64_t> exchange_counts(const std::vector<int64_t>& send, int64_t counts_per_peer,
                                     const Group& group, CallSite site = {});

/// A row of an exchange: `width` elements of `dtype`. Both are compared between ranks.
struct RowType {
  kernels::DType dtype = kernels::DType::kBytes;
  int64_t width = 0;
  int64_t bytes() const { return width * kernels::dtype_bytes(dtype); }
};

/// Moves rows: block p of `send` becomes this rank's block in rank p's `recv`. Collective: all
/// ranks of `group`, also with 0 rows. Does not reorder or convert.
/// @param send  [sum(send_rows), width] blocks in rank order without gaps; borrowed
/// @param recv  [R, width] blocks in rank order; borrowed, must not overlap `send`
/// @param stream  where the rows are; the same kind of device on all ranks
/// Moves num_send_rows() * row.bytes() bytes; the block for this rank is a local copy. Host memory:
/// complete on return. Device memory: in the order of `stream`, so what is queued before it fills
/// `send`, and what is queued after it may read `recv` and overwrite `send`. Headers are agreed on
/// the host at once; for the rows the host waits only in mpi and tcp groups, which stage them
/// through page-locked memory. Throws on every rank if ranks disagree about device, dtype, width or
/// rows, and then names the rank; `recv` is unspecified.
void exchange_rows(const void* send, void* recv, const RowType& row, const ExchangePlan& plan,
                   const Group& group, CallSite site = {}, kernels::Stream stream = {});

enum class NextExchange : uint8_t { kCounts, kRows };

/// Local work of an operation just before its exchange_counts or exchange_rows. If `work` throws on
/// this rank, it enters that exchange as one that refuses, so that no peer is left waiting: they
/// throw ConfigError, which names this rank, and this rank throws its own error. The group stays
/// usable. Costs nothing if nothing is thrown.
void before_exchange(NextExchange next, const Group& group, CallSite site,
                     const std::function<void()>& work);

}  // namespace perseid::comm
