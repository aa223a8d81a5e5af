#include "comm/collectives.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "comm/collective.h"
#include "kernels/device_memory.h"
#include "kernels/dtype.h"

namespace perseid::comm {
namespace {

constexpr int64_t kUnitsMax = std::numeric_limits<int32_t>::max();
// Bytes of one round of all_reduce: bounds the scratch memory, and stays in the cache.
constexpr int64_t kRoundBytes = int64_t{1} << 19;
// Bytes of a device's data that are on the host at a time.
constexpr int64_t kStagedBytes = int64_t{1} << 24;

template <typename T>
constexpr kernels::DType dtype_of() {
  if (std::is_same_v<T, float>) return kernels::DType::kFloat32;
  return std::is_same_v<T, double> ? kernels::DType::kFloat64 : kernels::DType::kInt64;
}

template <typename T>
T sum(T x, T y) {
  if constexpr (std::is_integral_v<T>) {  // wraps around, as the hardware does
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(x) + static_cast<Unsigned>(y));
  } else {
    return x + y;
  }
}

// into[i] = op(into[i], from[i]). A NaN on either side stays, so that no rank can hide it.
template <typename T>
void fold(T* into, const T* from, int64_t count, ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      for (int64_t i = 0; i < count; ++i) into[i] = sum(into[i], from[i]);
      return;
    case ReduceOp::kMin:
      for (int64_t i = 0; i < count; ++i) {
        if (from[i] < into[i] || from[i] != from[i]) into[i] = from[i];
      }
      return;
    case ReduceOp::kMax:
      for (int64_t i = 0; i < count; ++i) {
        if (from[i] > into[i] || from[i] != from[i]) into[i] = from[i];
      }
      return;
  }
}

// Reduces data[0, count) in place: rank p gets everybody's shard p, folds the shards in rank order,
// and sends the result to all.
template <typename T>
void reduce_round(Collective& collective, T* data, int64_t count, ReduceOp op) {
  const int size = collective.size();
  const auto begin_of = [count, size](int p) { return count * p / size; };
  const int64_t begin = begin_of(collective.rank());
  const int64_t shard = begin_of(collective.rank() + 1) - begin;
  T* shards = reinterpret_cast<T*>(collective.state().scratch.data());

  std::vector<PeerBlock>& blocks = collective.clear_blocks();
  for (int p = 0; p < size; ++p) {
    blocks[static_cast<size_t>(p)] =
        PeerBlock{data + begin_of(p), begin_of(p + 1) - begin_of(p), shards + p * shard, shard};
  }
  collective.move_host(sizeof(T));
  for (int p = 1; p < size; ++p) fold(shards, shards + p * shard, shard, op);

  collective.clear_blocks();
  for (int p = 0; p < size; ++p) {
    blocks[static_cast<size_t>(p)] =
        PeerBlock{shards, shard, data + begin_of(p), begin_of(p + 1) - begin_of(p)};
  }
  collective.move_host(sizeof(T));
}

template <typename T>
void reduce_rounds(Collective& collective, T* data, int64_t count, int64_t round, ReduceOp op) {
  for (int64_t begin = 0; begin < count; begin += round) {
    reduce_round(collective, data + begin, std::min(round, count - begin), op);
  }
}

template <typename T>
void all_reduce_of(T* data, int64_t count, ReduceOp op, const Group& group, const CallSite& site,
                   const kernels::Stream& stream) {
  Collective collective(group, OpCode::kAllReduce, site);
  collective.set_stream(stream);
  const int64_t round = std::min(count, kRoundBytes / int64_t{sizeof(T)});
  const auto op_bits = static_cast<uint32_t>(op) << 4;
  collective.set_dtype(static_cast<uint8_t>(static_cast<uint32_t>(dtype_of<T>()) | op_bits));
  collective.set_width(count);
  collective.refuse_unless(count >= 0 && count <= kUnitsMax, Code::kCount, count);
  collective.refuse_unless(data != nullptr || count <= 0, Code::kBuffer,
                           count * int64_t{sizeof(T)});
  // NCCL's minima and maxima may lose a NaN.
  const bool stays_on_device = op == ReduceOp::kSum && collective.has_device_sum();
  const bool is_staged = collective.is_on_device() && !stays_on_device;
  const int64_t staged = std::min(count, kStagedBytes / int64_t{sizeof(T)});
  if (collective.size() > 1 && !stays_on_device && !collective.has_refused()) {
    const int64_t scratch_bytes = (round + collective.size()) * int64_t{sizeof(T)};
    collective.allocate(scratch_bytes, [&] {
      std::vector<std::byte>& scratch = collective.state().scratch;
      if (static_cast<int64_t>(scratch.size()) < scratch_bytes) {
        scratch.resize(static_cast<size_t>(scratch_bytes));
      }
      if (is_staged) collective.state().staging.reserve(staged * int64_t{sizeof(T)}, 0);
    });
  }
  collective.agree();
  if (collective.size() == 1 || count == 0) return;
  if (stays_on_device) return collective.sum_device(data, count, dtype_of<T>());
  if (!is_staged) return reduce_rounds(collective, data, count, round, op);
  T* host = reinterpret_cast<T*>(collective.state().staging.send());
  for (int64_t begin = 0; begin < count; begin += staged) {
    const int64_t now = std::min(staged, count - begin);
    const auto bytes = now * int64_t{sizeof(T)};
    collective.copy_and_wait(
        [&](const kernels::Stream& on) { kernels::copy_bytes(host, data + begin, bytes, on); });
    reduce_rounds(collective, host, now, round, op);
    collective.copy_and_wait(
        [&](const kernels::Stream& on) { kernels::copy_bytes(data + begin, host, bytes, on); });
  }
}

}  // namespace

void barrier(const Group& group, CallSite site) {
  Collective collective(group, OpCode::kBarrier, site);
  collective.agree();
}

void all_reduce(float* data, int64_t count, ReduceOp op, const Group& group, CallSite site,
                kernels::Stream stream) {
  all_reduce_of(data, count, op, group, site, stream);
}
void all_reduce(double* data, int64_t count, ReduceOp op, const Group& group, CallSite site,
                kernels::Stream stream) {
  all_reduce_of(data, count, op, group, site, stream);
}
void all_reduce(int64_t* data, int64_t count, ReduceOp op, const Group& group, CallSite site,
                kernels::Stream stream) {
  all_reduce_of(data, count, op, group, site, stream);
}

void all_gather(const void* mine, int64_t bytes, void* all, const Group& group, CallSite site,
                kernels::Stream stream) {
  Collective collective(group, OpCode::kAllGather, site);
  collective.set_stream(stream);
  collective.set_width(bytes);
  collective.refuse_unless(bytes >= 0 && bytes <= kUnitsMax, Code::kBytes, bytes);
  const bool has_buffers = (mine != nullptr && all != nullptr) || bytes <= 0;
  collective.refuse_unless(has_buffers, Code::kBuffer, bytes);
  if (!collective.has_refused()) {
    const int64_t num_peers = collective.size() - 1;
    collective.reserve_device(num_peers * bytes, num_peers * bytes);
  }
  collective.agree();
  if (bytes == 0) return;
  std::vector<PeerBlock>& blocks = collective.clear_blocks();
  for (size_t p = 0; p < blocks.size(); ++p) {
    void* target = static_cast<std::byte*>(all) + static_cast<int64_t>(p) * bytes;
    blocks[p] = PeerBlock{mine, bytes, target, bytes};
  }
  collective.move(1);
}

void broadcast(void* data, int64_t bytes, int root, const Group& group, CallSite site,
               kernels::Stream stream) {
  Collective collective(group, OpCode::kBroadcast, site);
  collective.set_stream(stream);
  collective.set_width(bytes);
  collective.set_root(root);
  collective.refuse_unless(bytes >= 0 && bytes <= kUnitsMax, Code::kBytes, bytes);
  collective.refuse_unless(root >= 0 && root < collective.size(), Code::kRoot, root,
                           collective.size());
  collective.refuse_unless(data != nullptr || bytes <= 0, Code::kBuffer, bytes);
  if (!collective.has_refused()) {
    const bool is_root = collective.rank() == root;
    collective.reserve_device(is_root ? (collective.size() - 1) * bytes : 0, is_root ? 0 : bytes);
  }
  collective.agree();
  if (bytes == 0) return;
  std::vector<PeerBlock>& blocks = collective.clear_blocks();
  const int rank = collective.rank();
  for (int p = 0; p < collective.size(); ++p) {
    PeerBlock& block = blocks[static_cast<size_t>(p)];
    if (rank == root && p != root) block = PeerBlock{data, bytes, nullptr, 0};
    if (rank != root && p == root) block = PeerBlock{nullptr, 0, data, bytes};
  }
  collective.move(1);
}

}  // namespace perseid::comm
