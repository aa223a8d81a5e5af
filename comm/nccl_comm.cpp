#include "comm/nccl_comm.h"

#include <sched.h>

#include <exception>

#include "kernels/error.h"

namespace perseid::comm {
namespace {

constexpr int kFaultyFirst = 22803;
constexpr int kFaultyLast = 22808;
constexpr auto kFinaliseTime = std::chrono::seconds(5);
constexpr const char* kWayOut =
    "; NCCL_DEBUG=WARN prints more, NCCL_SOCKET_IFNAME picks the network, --comm mpi does without";

TransferResult broken(const std::string& text) {
  TransferResult result;
  result.state = TransferResult::State::kBroken;
  result.text = text;
  return result;
}

std::string answer(const char* call, ncclResult_t status, ncclComm_t comm) {
  std::string text = std::string(call) + "=" + ncclGetErrorString(status);
  const char* last = comm != nullptr || status != ncclSuccess ? ncclGetLastError(comm) : nullptr;
  if (last != nullptr && *last != '\0') text += std::string(" (") + last + ")";
  return text + kWayOut;
}

}  // namespace

std::string nccl_version_text(int version) {
  return to_text(version / 10000) + "." + to_text(version / 100 % 100) + "." +
         to_text(version % 100);
}

void check_nccl_version(int version) {
  const bool is_faulty = version >= kFaultyFirst && version <= kFaultyLast;
  require(!is_faulty, "nccl_group", "nccl_version", nccl_version_text(version),
          "has a known fault, as have all of 2.28.3 to 2.28.8; install 2.28.9 or newer, or choose "
          "--comm mpi");
}

NcclComm::NcclComm(const ncclUniqueId& id, int rank, int size, Clock::time_point deadline) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  const char* call = "ncclCommInitRankConfig";
  const ncclResult_t status = ncclCommInitRankConfig(&comm_, size, id, rank, &config);
  const TransferResult result = settle(call, status, deadline);
  if (result.state == TransferResult::State::kDone) return;
  ErrorDetail detail;
  detail.operation = "nccl_group";
  detail.argument = call;
  detail.value = result.text.substr(result.text.find('=') + 1);
  detail.rank = rank;
  if (Clock::now() > deadline) throw PeerLost(std::move(detail));
  throw ConfigError(std::move(detail));
}

NcclComm::~NcclComm() {
  if (comm_ == nullptr || is_abandoned_ || std::uncaught_exceptions() > 0) return;
  const ncclResult_t status = ncclCommFinalize(comm_);
  const TransferResult result = settle("ncclCommFinalize", status, Clock::now() + kFinaliseTime);
  if (result.state == TransferResult::State::kDone) (void)ncclCommDestroy(comm_);
}

TransferResult NcclComm::settle(const char* call, ncclResult_t status,
                                Clock::time_point deadline) const {
  while (status == ncclInProgress && comm_ != nullptr) {
    const ncclResult_t asked = ncclCommGetAsyncError(comm_, &status);
    if (asked != ncclSuccess) return broken(answer("ncclCommGetAsyncError", asked, comm_));
    if (status != ncclInProgress) break;
    if (Clock::now() > deadline) {
      return broken(std::string(call) +
                    "=in progress at the deadline: a rank has not made this call, or its network "
                    "or GPU hangs" +
                    kWayOut);
    }
    sched_yield();
  }
  return status == ncclSuccess ? TransferResult{} : broken(answer(call, status, comm_));
}

TransferResult NcclComm::check() const {
  ncclResult_t status = ncclSuccess;
  const ncclResult_t asked = ncclCommGetAsyncError(comm_, &status);
  if (asked != ncclSuccess) return broken(answer("ncclCommGetAsyncError", asked, comm_));
  if (status == ncclSuccess || status == ncclInProgress) return {};
  return broken(answer("ncclCommGetAsyncError", status, comm_));
}

}  // namespace perseid::comm
