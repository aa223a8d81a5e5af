#pragma once
#include <nccl.h>

#include <string>

#include "comm/backend.h"

namespace perseid::comm {

/// Throws ConfigError unless the version (NCCL_VERSION_CODE) is one that works: 2.28.3 to 2.28.8
/// do not.
void check_nccl_version(int version);
std::string nccl_version_text(int version);  ///< "2.28.9"

/// A non-blocking communicator of NCCL on the current device. Never aborted: that may itself hang.
class NcclComm {
 public:
  /// Collective. Throws ConfigError with NCCL's answer, PeerLost at the deadline.
  NcclComm(const ncclUniqueId& id, int rank, int size, Clock::time_point deadline);
  /// Finalises and destroys it, unless it has failed or takes too long.
  ~NcclComm();
  NcclComm(const NcclComm&) = delete;
  NcclComm& operator=(const NcclComm&) = delete;

  ncclComm_t get() const { return comm_; }
  /// Waits until a call that answered `status` is no longer in progress. The result is kBroken with
  /// the call and NCCL's text if it failed, or at the deadline.
  TransferResult settle(const char* call, ncclResult_t status, Clock::time_point deadline) const;
  /// What has gone wrong since, without waiting.
  TransferResult check() const;
  /// It has failed: do not destroy it.
  void abandon() { is_abandoned_ = true; }

 private:
  ncclComm_t comm_ = nullptr;
  bool is_abandoned_ = false;
};

}  // namespace perseid::comm
