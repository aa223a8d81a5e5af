// Ranks are processes of one MPI job. All groups share one duplicate of MPI_COMM_WORLD and differ
// by tag, so a new group costs no call of MPI that could wait for ever. Messages are Irecv + Isend,
// and every wait is a loop of MPI_Testall with a deadline.
#include <mpi.h>
#include <sched.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "comm/backend.h"
#include "comm/mpi_runtime.h"
#include "comm/session.h"
#include "kernels/error.h"

namespace perseid::comm {
namespace {

constexpr int kFarewellTag = 0;
constexpr int64_t kFirstGroupTag = 1;
constexpr int kPollsBeforeYield = 100;
constexpr int64_t kSetUpTimeoutMs = 60000;

std::string failed_call(const char* call, int code) {
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(code, text.data(), &length);
  return std::string(call) + "=failed: " + text.data();
}

[[noreturn]] void throw_failed_call(const char* call, int code) {
  ErrorDetail detail;
  detail.operation = "mpi_group";
  detail.argument = call;
  detail.value = failed_call(call, code).substr(std::strlen(call) + 1);
  throw PeerLost(std::move(detail));
}

void check(const char* call, int code) {
  if (code != MPI_SUCCESS) throw_failed_call(call, code);
}

bool is_usable() {
  int is_initialised = 0;
  int is_finalised = 0;
  MPI_Initialized(&is_initialised);
  MPI_Finalized(&is_finalised);
  return is_initialised != 0 && is_finalised == 0;
}

/// The duplicate of MPI_COMM_WORLD, and the tags taken on it.
class World {
 public:
  World() {
    MPI_Request request = MPI_REQUEST_NULL;
    check("MPI_Comm_idup", MPI_Comm_idup(MPI_COMM_WORLD, &comm_, &request));
    const auto deadline = Clock::now() + std::chrono::milliseconds(kSetUpTimeoutMs);
    for (int is_done = 0; is_done == 0; sched_yield()) {
      check("MPI_Test", MPI_Test(&request, &is_done, MPI_STATUS_IGNORE));
      if (is_done == 0 && Clock::now() > deadline) {
        ErrorDetail detail;
        detail.operation = "mpi_group";
        detail.argument = "timeout_ms";
        detail.value = to_text(kSetUpTimeoutMs);
        detail.limit = "has passed; not all ranks of the job call mpi_group";
        throw PeerLost(std::move(detail));
      }
    }
    MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
    int* tag_max = nullptr;
    int has_tag_max = 0;
    MPI_Comm_get_attr(comm_, MPI_TAG_UB, &tag_max, &has_tag_max);
    tag_max_ = has_tag_max != 0 ? *tag_max : 32767;
  }
  ~World() {
    if (is_usable()) MPI_Comm_free(&comm_);
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  MPI_Comm comm() const { return comm_; }
  int64_t next_tag() const { return next_tag_.load(); }
  /// `tag` is agreed by all ranks that share a new group, and at least next_tag() of each.
  int take_tag(int64_t tag) {
    if (tag > tag_max_) {
      throw ConfigError(
          ErrorDetail{"split", "groups", to_text(tag),
                      "exceeds the tags of this MPI; split once and keep the groups"});
    }
    int64_t next = next_tag_.load();
    while (next <= tag && !next_tag_.compare_exchange_weak(next, tag + 1)) {
    }
    return static_cast<int>(tag);
  }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
  int64_t tag_max_ = 0;
  std::atomic<int64_t> next_tag_{kFirstGroupTag};
};

/// Rows of n bytes as one element each, so that counts are rows and fit an int. Keeps the last few.
class RowTypes {
 public:
  ~RowTypes() {
    if (!is_usable()) return;
    for (Entry& entry : entries_) {
      if (entry.bytes > 0) MPI_Type_free(&entry.type);
    }
  }
  MPI_Datatype get(int64_t bytes) {
    for (const Entry& entry : entries_) {
      if (entry.bytes == bytes) return entry.type;
    }
    Entry& entry = entries_[next_];
    next_ = (next_ + 1) % entries_.size();
    if (entry.bytes > 0) MPI_Type_free(&entry.type);
    entry.bytes = 0;
    check("MPI_Type_contiguous",
          MPI_Type_contiguous(static_cast<int>(bytes), MPI_BYTE, &entry.type));
    check("MPI_Type_commit", MPI_Type_commit(&entry.type));
    entry.bytes = bytes;
    return entry.type;
  }

 private:
  struct Entry {
    int64_t bytes = 0;
    MPI_Datatype type = MPI_DATATYPE_NULL;
  };
  std::array<Entry, 8> entries_;
  size_t next_ = 0;
};

class MpiBackend final : public Backend, public std::enable_shared_from_this<MpiBackend> {
 public:
  MpiBackend(std::shared_ptr<World> world, std::vector<int> world_ranks, int rank, int64_t tag)
      : Backend(rank, static_cast<int>(world_ranks.size())),
        world_(std::move(world)),
        world_ranks_(std::move(world_ranks)),
        tag_(world_->take_tag(tag)) {
    requests_.reserve(2 * world_ranks_.size());
    messages_.reserve(2 * world_ranks_.size());
    statuses_.resize(2 * world_ranks_.size());
  }

  const char* name() const override { return "mpi"; }
  int64_t proposed_context() const override { return world_->next_tag(); }

  TransferResult exchange(const Transfer& transfer) override {
    TransferResult result;
    start(transfer, tag_, result);
    if (result.state == TransferResult::State::kDone) {
      const PeerBlock& own = transfer.blocks[rank()];
      const int64_t own_bytes = own.recv_units * transfer.unit_bytes;
      if (own_bytes > 0) std::memcpy(own.recv, own.send, static_cast<size_t>(own_bytes));
      wait(transfer, result);
    }
    if (result.state != TransferResult::State::kDone) abandon(result);
    return result;
  }

  std::shared_ptr<Backend> split(const Subgroup& subgroup) override {
    std::vector<int> world_ranks;
    int new_rank = 0;
    for (const int member : subgroup.members) {
      if (member == rank()) new_rank = static_cast<int>(world_ranks.size());
      world_ranks.push_back(world_ranks_[static_cast<size_t>(member)]);
    }
    return std::make_shared<MpiBackend>(world_, std::move(world_ranks), new_rank, subgroup.context);
  }

  std::vector<Farewell> exchange_farewells(const Farewell& mine, int64_t timeout_ms) {
    std::vector<Farewell> all(world_ranks_.size());
    std::vector<PeerBlock> blocks(world_ranks_.size());
    for (size_t p = 0; p < all.size(); ++p) blocks[p] = PeerBlock{&mine, 1, &all[p], 1};
    const Transfer transfer{blocks.data(), sizeof(Farewell),
                            Clock::now() + std::chrono::milliseconds(timeout_ms)};
    all[static_cast<size_t>(rank())] = mine;
    TransferResult result;
    start(transfer, kFarewellTag, result);
    is_patient_ = true;
    if (result.state == TransferResult::State::kDone) wait(transfer, result);
    is_patient_ = false;
    if (result.state == TransferResult::State::kDone) return all;
    abandon(result);
    return {};
  }

 private:
  struct Message {
    int peer;
    int64_t recv_units;  // 0: a send
  };

  // Receives first, so that messages find their place; peers start behind this rank.
  void start(const Transfer& transfer, int tag, TransferResult& result) {
    requests_.clear();
    messages_.clear();
    const MPI_Datatype type = row_types_.get(transfer.unit_bytes);
    for (int k = 1; k < size(); ++k) {
      const int p = (rank() + size() - k) % size();
      const PeerBlock& block = transfer.blocks[p];
      if (block.recv_units == 0) continue;
      requests_.push_back(MPI_REQUEST_NULL);
      messages_.push_back({p, block.recv_units});
      const int code = MPI_Irecv(block.recv, static_cast<int>(block.recv_units), type,
                                 world_rank(p), tag, world_->comm(), &requests_.back());
      if (code != MPI_SUCCESS) return break_off(result, failed_call("MPI_Irecv", code), p);
    }
    for (int k = 1; k < size(); ++k) {
      const int p = (rank() + k) % size();
      const PeerBlock& block = transfer.blocks[p];
      if (block.send_units == 0) continue;
      requests_.push_back(MPI_REQUEST_NULL);
      messages_.push_back({p, 0});
      const int code = MPI_Isend(block.send, static_cast<int>(block.send_units), type,
                                 world_rank(p), tag, world_->comm(), &requests_.back());
      if (code != MPI_SUCCESS) return break_off(result, failed_call("MPI_Isend", code), p);
    }
  }

  void wait(const Transfer& transfer, TransferResult& result) {
    const auto num_requests = static_cast<int>(requests_.size());
    for (int64_t polls = 1;; ++polls) {
      int is_done = 0;
      const int code = MPI_Testall(num_requests, requests_.data(), &is_done, statuses_.data());
      if (code != MPI_SUCCESS) return report_failed(code, result);
      if (is_done != 0) return check_sizes(transfer, result);
      if (polls < kPollsBeforeYield) continue;
      if (Clock::now() > transfer.deadline) {
        result.state = TransferResult::State::kTimedOut;
        return;
      }
      if (is_patient_) {
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      } else {
        sched_yield();
      }
    }
  }

  // A message that is too short is no error of MPI.
  void check_sizes(const Transfer& transfer, TransferResult& result) {
    const MPI_Datatype type = row_types_.get(transfer.unit_bytes);
    for (size_t i = 0; i < messages_.size(); ++i) {
      if (messages_[i].recv_units == 0) continue;
      int units = 0;
      MPI_Get_count(&statuses_[i], type, &units);
      if (units == messages_[i].recv_units) continue;
      const int p = messages_[i].peer;
      const std::string got = units == MPI_UNDEFINED ? "a part of one" : to_text(units);
      return break_off(result,
                       "rows=" + got + " from rank " + to_text(p) + " instead of " +
                           to_text(messages_[i].recv_units),
                       p);
    }
  }

  void report_failed(int code, TransferResult& result) {
    int peer = -1;
    for (size_t i = 0; i < messages_.size() && code == MPI_ERR_IN_STATUS; ++i) {
      const int status = statuses_[i].MPI_ERROR;
      if (status == MPI_SUCCESS || status == MPI_ERR_PENDING) continue;
      code = status;
      peer = messages_[i].peer;
    }
    break_off(result, failed_call("MPI_Testall", code), peer);
  }

  void break_off(TransferResult& result, const std::string& text, int peer) {
    result.state = TransferResult::State::kBroken;
    result.text = text;
    if (peer < 0) return;
    result.text += " (peer " + to_text(peer) + ")";
    result.missing = {peer};
  }

  // Finds out who is missing, and gives up what is open. MPI may still read our messages: this
  // backend is kept for ever. Blocks of the caller stay readable for as long as he keeps them.
  void abandon(TransferResult& result) {
    std::vector<bool> is_silent(world_ranks_.size());
    std::vector<bool> is_stuck(world_ranks_.size());
    bool any_silent = false;
    for (size_t i = 0; i < requests_.size(); ++i) {
      if (requests_[i] == MPI_REQUEST_NULL) continue;
      int is_done = 0;
      MPI_Test(&requests_[i], &is_done, MPI_STATUS_IGNORE);
      if (is_done != 0 || requests_[i] == MPI_REQUEST_NULL) continue;
      const bool is_recv = messages_[i].recv_units > 0;
      (is_recv ? is_silent : is_stuck)[static_cast<size_t>(messages_[i].peer)] = true;
      any_silent = any_silent || is_recv;
      if (is_recv) MPI_Cancel(&requests_[i]);
      MPI_Request_free(&requests_[i]);
    }
    requests_.clear();
    static auto* kept = new std::vector<std::shared_ptr<MpiBackend>>;  // never destroyed
    kept->push_back(shared_from_this());
    if (result.state != TransferResult::State::kTimedOut) return;
    result.is_silent = any_silent;
    for (int p = 0; p < size(); ++p) {
      const auto i = static_cast<size_t>(p);
      if (any_silent ? is_silent[i] : is_stuck[i]) result.missing.push_back(p);
    }
  }

  int world_rank(int p) const { return world_ranks_[static_cast<size_t>(p)]; }

  std::shared_ptr<World> world_;
  std::vector<int> world_ranks_;  // [P]
  int tag_;
  RowTypes row_types_;
  bool is_patient_ = false;  // peers may come much later: sleep between polls
  std::vector<MPI_Request> requests_;
  std::vector<Message> messages_;  // one for each request
  std::vector<MPI_Status> statuses_;
};

}  // namespace

bool has_mpi() { return true; }

bool initialise_mpi() {
  int is_initialised = 0;
  int granted = MPI_THREAD_SINGLE;
  MPI_Initialized(&is_initialised);
  if (is_initialised == 0) {
    const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &granted);
    if (code != MPI_SUCCESS) throw_failed_call("MPI_Init_thread", code);
  } else {
    MPI_Query_thread(&granted);
  }
  require(granted >= MPI_THREAD_SERIALIZED, "mpi_group", "thread_level", granted,
          "is below MPI_THREAD_SERIALIZED=" + to_text(int{MPI_THREAD_SERIALIZED}) +
              "; use an MPI that allows calls from several threads");
  return is_initialised == 0;
}

void finalise_mpi() { MPI_Finalize(); }

void abort_mpi(int exit_code) {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

std::vector<Farewell> exchange_farewells(const Group& world, const Farewell& mine,
                                         int64_t timeout_ms) {
  auto* backend = dynamic_cast<MpiBackend*>(&world.backend());
  PERSEID_INVARIANT(backend != nullptr);
  return backend->exchange_farewells(mine, timeout_ms);
}

Group mpi_group() {
  if (!is_usable()) {
    ErrorDetail detail;
    detail.operation = "mpi_group";
    detail.limit = "needs MPI, which is not initialised; use run_session or call MPI_Init_thread";
    throw ConfigError(std::move(detail));
  }
  auto world = std::make_shared<World>();
  int rank = 0;
  int size = 1;
  check("MPI_Comm_rank", MPI_Comm_rank(world->comm(), &rank));
  check("MPI_Comm_size", MPI_Comm_size(world->comm(), &size));
  std::vector<int> world_ranks;
  for (int r = 0; r < size; ++r) world_ranks.push_back(r);
  return Group(
      std::make_shared<MpiBackend>(std::move(world), std::move(world_ranks), rank, kFirstGroupTag));
}

std::string mpi_version() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  MPI_Get_library_version(text.data(), &length);
  const std::string all(text.data());
  // Open MPI says "Open MPI v4.1.4, package: ...", MPICH "MPICH Version:\t4.0.2\n...".
  const std::string first = all.substr(0, all.find_first_of(",\n"));
  const size_t v = first.find(" v");
  return v == std::string::npos ? first : first.substr(0, v + 1) + first.substr(v + 2);
}

}  // namespace perseid::comm
