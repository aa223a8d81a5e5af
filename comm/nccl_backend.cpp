// GPU ranks. Rows travel as bytes by one group of ncclSend and ncclRecv for each exchange; what
// ranks agree on before travels over the control group. The host never waits for a stream without
// asking NCCL for errors, and never without a deadline.
#include <sched.h>

#include "comm/agree.h"
#include "comm/collectives.h"
#include "comm/gpu_place.h"
#include "comm/nccl_comm.h"
#include "comm/nccl_group.h"
#include "kernels/device_memory.h"

namespace perseid::comm {
namespace {

constexpr CallSite kSite{"nccl_group"};

cudaStream_t native(const kernels::Stream& stream) {
  return static_cast<cudaStream_t>(stream.handle);
}

ncclDataType_t nccl_type(kernels::DType dtype) {
  switch (dtype) {
    case kernels::DType::kFloat32:
      return ncclFloat32;
    case kernels::DType::kFloat64:
      return ncclFloat64;
    default:
      PERSEID_INVARIANT(dtype == kernels::DType::kInt64);
      return ncclInt64;
  }
}

int version() {
  int number = 0;
  const ncclResult_t status = ncclGetVersion(&number);
  require(status == ncclSuccess, "nccl_group", "ncclGetVersion", ncclGetErrorString(status),
          "is NCCL's answer; look at which libnccl.so.2 is loaded");
  return number;
}

// Collective. A rank that NCCL refuses lets the others wait in NCCL until their deadline, and then
// for it here: it waits twice as long.
std::unique_ptr<NcclComm> make_comm(const Group& control) {
  struct {
    int64_t status = ncclSuccess;
    ncclUniqueId id{};
  } message;
  if (control.rank() == 0) message.status = ncclGetUniqueId(&message.id);
  broadcast(&message, sizeof(message), 0, control, kSite);
  const auto status = static_cast<ncclResult_t>(message.status);
  require(status == ncclSuccess, "nccl_group", "ncclGetUniqueId", ncclGetErrorString(status),
          "is NCCL's answer on rank 0; NCCL_DEBUG=WARN prints more");

  const int64_t timeout_ms = control.backend().state().timeout_ms;
  const auto deadline = Clock::now() + std::chrono::milliseconds(timeout_ms);
  std::unique_ptr<NcclComm> comm;
  control.set_timeout_ms(2 * timeout_ms);
  try {
    agree(control, kSite, [&] {
      comm = std::make_unique<NcclComm>(message.id, control.rank(), control.size(), deadline);
    });
  } catch (...) {
    if (comm != nullptr) comm->abandon();
    throw;
  }
  control.set_timeout_ms(timeout_ms);
  return comm;
}

class NcclBackend final : public Backend {
 public:
  /// Without a communicator it is a group of one, whose rows are copied.
  NcclBackend(Group control, std::unique_ptr<NcclComm> comm)
      : Backend(control.rank(), control.size()),
        control_(std::move(control)),
        comm_(std::move(comm)) {}

  const char* name() const override { return "nccl"; }
  TransferResult exchange(const Transfer& transfer) override {
    return control_.backend().exchange(transfer);
  }
  int64_t proposed_context() const override { return control_.backend().proposed_context(); }
  void leave(const std::string& why, int culprit) override {
    if (comm_ != nullptr) comm_->abandon();
    control_.backend().leave(why, culprit);
  }
  void reserve_device(int64_t, int64_t) override {}
  bool has_device_sum() const override { return comm_ != nullptr; }

  std::shared_ptr<Backend> split(const Subgroup& subgroup) override {
    Group control(control_.backend().split(subgroup));
    control.set_timeout_ms(state().timeout_ms);
    std::unique_ptr<NcclComm> comm;
    if (control.size() > 1) comm = make_comm(control);
    return std::make_shared<NcclBackend>(std::move(control), std::move(comm));
  }

  TransferResult exchange_device(const Transfer& transfer, const kernels::Stream& stream) override {
    const PeerBlock& own = transfer.blocks[rank()];
    kernels::copy_bytes(own.recv, own.send, own.recv_units * transfer.unit_bytes, stream);
    if (size() == 1) return {};
    TransferResult result = comm_->check();
    if (result.state != TransferResult::State::kDone) return result;

    const char* failed = "ncclGroupStart";
    ncclResult_t status = ncclGroupStart();
    // No two ranks start on the same peer. 0 bytes are no call on either side.
    for (int k = 1; k < size() && is_under_way(status); ++k) {
      const int to = (rank() + k) % size();
      const int from = (rank() - k + size()) % size();
      const PeerBlock& out = transfer.blocks[to];
      const PeerBlock& in = transfer.blocks[from];
      const auto send_bytes = static_cast<size_t>(out.send_units * transfer.unit_bytes);
      const auto recv_bytes = static_cast<size_t>(in.recv_units * transfer.unit_bytes);
      if (send_bytes > 0) {
        failed = "ncclSend";
        status = ncclSend(out.send, send_bytes, ncclUint8, to, comm_->get(), native(stream));
      }
      if (recv_bytes > 0 && is_under_way(status)) {
        failed = "ncclRecv";
        status = ncclRecv(in.recv, recv_bytes, ncclUint8, from, comm_->get(), native(stream));
      }
    }
    const ncclResult_t ended = ncclGroupEnd();  // also after a failure: the group is open
    if (!is_under_way(status)) return comm_->settle(failed, status, transfer.deadline);
    return comm_->settle("ncclGroupEnd", ended, transfer.deadline);
  }

  TransferResult sum_device(void* data, int64_t count, kernels::DType dtype,
                            const kernels::Stream& stream, Clock::time_point deadline) override {
    TransferResult result = comm_->check();
    if (result.state != TransferResult::State::kDone) return result;
    const ncclResult_t status =
        ncclAllReduce(data, data, static_cast<size_t>(count), nccl_type(dtype), ncclSum,
                      comm_->get(), native(stream));
    return comm_->settle("ncclAllReduce", status, deadline);
  }

  TransferResult wait_device(const kernels::Stream& stream, Clock::time_point deadline) override {
    while (!kernels::is_done(stream)) {
      TransferResult result = comm_ == nullptr ? TransferResult{} : comm_->check();
      if (result.state != TransferResult::State::kDone) return result;
      if (Clock::now() > deadline) return Backend::wait_device(stream, deadline);
      sched_yield();
    }
    return {};
  }

 private:
  static bool is_under_way(ncclResult_t status) {
    return status == ncclSuccess || status == ncclInProgress;
  }

  Group control_;
  std::unique_ptr<NcclComm> comm_;
};

}  // namespace

bool has_nccl() { return true; }
std::string nccl_version() { return "NCCL " + nccl_version_text(version()); }

void require_nccl() {
  const std::string problem = kernels::device_problem();
  require(problem.empty(), "nccl_group", "device", "none",
          "can be used: " + problem + "; or choose --comm mpi, tcp, local or self");
}

Group nccl_group(const Group& control) {
  const Group own = control.split(0, control.rank());
  int64_t lowest = 0;
  agree(own, kSite, [&] {
    require_nccl();
    lowest = version();
    check_nccl_version(static_cast<int>(lowest));
  });
  int64_t highest = lowest;
  all_reduce(&lowest, 1, ReduceOp::kMin, own, kSite);
  all_reduce(&highest, 1, ReduceOp::kMax, own, kSite);
  require(lowest == highest, "nccl_group", "nccl_version",
          nccl_version_text(static_cast<int>(lowest)),
          "of one rank differs from " + nccl_version_text(static_cast<int>(highest)) +
              " of another; load one libnccl.so.2 on all hosts");
  std::optional<ErrorDetail> problem =
      place_problem(gather_places(own_place(kernels::current_device()), own));
  if (problem.has_value()) {
    problem->rank = own.rank();
    throw ConfigError(std::move(*problem));
  }
  std::unique_ptr<NcclComm> comm = make_comm(own);
  Group group(std::make_shared<NcclBackend>(own, std::move(comm)));
  group.set_timeout_ms(own.backend().state().timeout_ms);
  group.backend().state().config_hash = own.backend().state().config_hash;
  return group;
}

}  // namespace perseid::comm
