#pragma once
#include <cstdint>

#include "comm/group.h"
#include "kernels/stream.h"

namespace perseid::comm {

enum class ReduceOp : uint8_t { kSum, kMin, kMax };

/// Returns when every rank has entered.
void barrier(const Group& group, CallSite site = {});

/// data[i] = op over ranks of data[i], in place, the same bits on every rank: sums are formed in
/// rank order (each rank reduces one shard, then all shards are gathered: 2 * (P-1)/P * bytes
/// sent).
/// @param count  elements, equal on all ranks; may be 0
/// @param stream  where `data` is; the same kind of device on all ranks. Data of a device goes by
/// way
///                of the host, which waits for the stream, and is reduced there as above. Only sums
///                of an nccl group stay on the device and are queued: their order is NCCL's choice,
///                not that of ranks; the bits are the same on every rank all the same.
void all_reduce(float* data, int64_t count, ReduceOp op, const Group& group, CallSite site = {},
                kernels::Stream stream = {});
void all_reduce(double* data, int64_t count, ReduceOp op, const Group& group, CallSite site = {},
                kernels::Stream stream = {});
void all_reduce(int64_t* data, int64_t count, ReduceOp op, const Group& group, CallSite site = {},
                kernels::Stream stream = {});

/// all[r * bytes ..] = the `bytes` bytes of rank r, in rank order. `bytes` is equal on all ranks.
/// @param all  [P * bytes] must not overlap `mine`
/// @param stream  where both are, as for exchange_rows
void all_gather(const void* mine, int64_t bytes, void* all, const Group& group, CallSite site = {},
                kernels::Stream stream = {});

/// data of rank `root` to every rank, in place. `bytes` and `root` are equal on all ranks.
/// @param stream  where it is, as for exchange_rows
void broadcast(void* data, int64_t bytes, int root, const Group& group, CallSite site = {},
               kernels::Stream stream = {});

}  // namespace perseid::comm
