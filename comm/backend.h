#pragma once
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/header.h"
#include "comm/staging.h"
#include "kernels/dtype.h"
#include "kernels/stream.h"

namespace perseid::comm {

using Clock = std::chrono::steady_clock;

/// What goes to and comes from one peer, in units of a transfer. 0 units: no message.
struct PeerBlock {
  const void* send = nullptr;
  int64_t send_units = 0;
  void* recv = nullptr;
  int64_t recv_units = 0;
};

/// Blocks for all peers at once. Both sides know all sizes; the block for this rank is copied.
struct Transfer {
  const PeerBlock* blocks = nullptr;  ///< [size]
  int64_t unit_bytes = 1;             ///< below 2^31, as are the units of a block
  Clock::time_point deadline;
};

struct TransferResult {
  enum class State : uint8_t {
    kDone,
    kTimedOut,  ///< `missing` sent nothing, or else took nothing, until the deadline
    kGone,      ///< rank `gone` left the group, because of `missing` or itself; `text` says why
    kBroken     ///< `text` is the failing call and its error
  };
  State state = State::kDone;
  int gone = -1;
  std::vector<int> missing;  ///< in rank order
  bool is_silent = true;     ///< nothing came from `missing`; else it did not take what we sent
  std::string text;
};

/// Members of a new group: ranks of the old one, in the order of the new one.
struct Subgroup {
  std::vector<int> members;
  int color = 0;
  uint32_t sequence = 0;  ///< of the split in the old group
  int64_t context = 0;    ///< highest proposed_context() of all ranks of the old group
};

/// What a group knows besides its backend. Used by comm/collective.h only.
struct GroupState {
  uint32_t sequence = 0;
  uint32_t config_hash = 0;
  int64_t timeout_ms = 60000;
  bool is_failed = false;
  bool is_failed_by_peer = false;  ///< by PeerLost; else by a disagreement about the order of calls
  int failed_culprit = -1;
  std::string failed_text;
  std::vector<Words> sent, received;  ///< [size] messages, kept so that a call allocates nothing
  std::vector<PeerBlock> blocks;      ///< [size]
  std::vector<std::byte> scratch;
  Staging staging;
};

/// One rank's end of a group: how bytes get to the peers. Everything that ranks agree on is written
/// once above it, in comm/collective.h.
class Backend {
 public:
  Backend(int rank, int size);
  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  GroupState& state() { return state_; }

  virtual const char* name() const = 0;
  /// All ranks call it. On return the send blocks may be reused, also when it failed on the host.
  virtual TransferResult exchange(const Transfer& transfer) = 0;
  virtual std::shared_ptr<Backend> split(const Subgroup& subgroup) = 0;

  /// exchange() of blocks in device memory, in the order of `stream`: it reads what was queued
  /// before, and what is queued later finds the blocks there. Here by way of the host, which waits
  /// for the stream; other backends queue it. Throws what CUDA says.
  virtual TransferResult exchange_device(const Transfer& transfer, const kernels::Stream& stream);
  /// Makes room for an exchange_device() of so many bytes with the peers. Throws OutOfMemory.
  virtual void reserve_device(int64_t send_bytes, int64_t recv_bytes);
  /// The host waits until the stream has done its work.
  virtual TransferResult wait_device(const kernels::Stream& stream, Clock::time_point deadline);
  /// Can sum_device() be called? Else sums go by way of the host.
  virtual bool has_device_sum() const { return false; }
  /// data[i] = sum over ranks of data[i], in place, queued on the stream.
  virtual TransferResult sum_device(void* /*data*/, int64_t /*count*/, kernels::DType /*dtype*/,
                                    const kernels::Stream& /*stream*/,
                                    Clock::time_point /*deadline*/) {
    return {};
  }

  /// A number that no group of this rank uses yet; what split() gets is agreed from these.
  virtual int64_t proposed_context() const { return 0; }
  /// This rank makes no further call, because of `culprit` (-1: nobody). Peers that wait for it
  /// need not wait longer, where they can be told.
  virtual void leave(const std::string& /*why*/, int /*culprit*/) {}

 private:
  int rank_;
  int size_;
  GroupState state_;
};

}  // namespace perseid::comm
