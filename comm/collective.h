#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "comm/backend.h"
#include "comm/group.h"
#include "comm/verdict.h"
#include "kernels/stream.h"

namespace perseid::comm {

/// One collective of one rank: refuse() what is wrong, agree() with the peers, then move() payload.
///   1  headers to all peers; what all can see is judged alike on each rank
///   2  verdicts to all peers, which also covers what one rank alone can see
///   3  payload, only if all ranks say go
/// Throws at construction if the group has failed.
class Collective {
 public:
  Collective(const Group& group, OpCode op, const CallSite& site);

  int rank() const { return backend_.rank(); }
  int size() const { return backend_.size(); }
  GroupState& state() const { return backend_.state(); }
  uint32_t sequence() const { return header_.sequence; }

  /// What peers compare. Call before agree().
  void set_dtype(uint8_t dtype) {
    header_.dtype = static_cast<uint8_t>((header_.dtype & kDeviceBit) | dtype);
  }
  /// Payload is in the memory of the stream's device. Refuses a GPU where there is none.
  void set_stream(const kernels::Stream& stream);
  void set_width(int64_t width) { header_.width = static_cast<uint32_t>(width); }
  void set_root(int root) { header_.rows = static_cast<uint32_t>(root); }
  void set_config_hash(uint32_t hash) { header_.config_hash = hash; }
  void set_rows(const std::vector<int64_t>& send_rows, const std::vector<int64_t>& recv_rows);

  /// This rank cannot take part. The first refusal counts; all ranks throw it out of agree().
  void refuse(Code code, int64_t a, int64_t b = 0);
  void refuse_unless(bool holds, Code code, int64_t a, int64_t b = 0) {
    if (!holds) refuse(code, a, b);
  }
  bool has_refused() const { return refusal_.code != Code::kGo; }
  /// Memory of `bytes` bytes is needed: calls allocate() and refuses if there is none.
  template <typename Allocate>
  void allocate(int64_t bytes, const Allocate& allocate_bytes) {
    if (has_refused()) return;
    try {
      allocate_bytes();
    } catch (const std::exception&) {  // bad_alloc, or length_error for an absurd size
      refuse(Code::kOutOfMemory, bytes);
    }
  }

  void agree();

  /// [size] empty blocks, to be filled for move().
  std::vector<PeerBlock>& clear_blocks();
  void move(int64_t unit_bytes);       ///< of the stream's device
  void move_host(int64_t unit_bytes);  ///< in host memory, whatever the stream is
  /// Queues copy(stream) and waits for it.
  void copy_and_wait(const std::function<void(const kernels::Stream&)>& copy);
  void sum_device(void* data, int64_t count, kernels::DType dtype);
  bool is_on_device() const { return stream_.device == kernels::Device::kCuda; }
  bool has_device_sum() const { return is_on_device() && backend_.has_device_sum(); }
  void reserve_device(int64_t send_bytes, int64_t recv_bytes);

 private:
  void run(const std::function<TransferResult()>& transfer);
  Verdict exchange_headers();
  Verdict exchange_verdicts(const Verdict& mine);
  void exchange_words();
  [[noreturn]] void lose_peers(const TransferResult& result);
  void fail(const std::string& text, bool is_by_peer, int culprit);
  const char* name() const { return site_.operation != nullptr ? site_.operation : op_name(op_); }

  Backend& backend_;
  OpCode op_;
  CallSite site_;
  Header header_;
  Verdict refusal_;
  kernels::Stream stream_;
  const std::vector<int64_t>* send_rows_ = nullptr;
  const std::vector<int64_t>* recv_rows_ = nullptr;
  std::vector<Words> headers_;  // only kept when there is something to report
  Clock::time_point deadline_;
};

/// "1, 2, 5", cut after 8 entries with the count.
std::string list_text(const std::vector<int>& ranks);

}  // namespace perseid::comm
