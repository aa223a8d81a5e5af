// Threads of one process as ranks. A receiver copies straight out of the sender's buffer, which the
// sender therefore keeps until the copy is done: exchange() returns when all its blocks were taken
// or taken back. A rank that leaves (its body ended, or its group failed) sets a flag, and whoever
// waits for it stops waiting.
#include <cstring>
#include <exception>
#include <thread>

#include "comm/group.h"
#include "comm/local_board.h"
#include "comm/local_device.h"
#include "kernels/error.h"

namespace perseid::comm {
namespace {

constexpr int kRanksMax = 1024;

class LocalBackend final : public Backend {
 public:
  LocalBackend(std::shared_ptr<Board> board, int rank)
      : Backend(rank, board->size()), board_(std::move(board)) {
    open_.reserve(static_cast<size_t>(size()));
  }

  const char* name() const override { return "local"; }

  TransferResult exchange(const Transfer& transfer) override {
    offer(transfer);
    const PeerBlock& own = transfer.blocks[rank()];
    const int64_t own_bytes = own.recv_units * transfer.unit_bytes;
    if (own_bytes > 0) std::memcpy(own.recv, own.send, static_cast<size_t>(own_bytes));

    TransferResult result;
    while (result.state == TransferResult::State::kDone) {
      take(transfer, result);
      if (result.state != TransferResult::State::kDone) break;
      if (open_.empty() && are_taken()) return result;
      const bool in_time = board_->job().wait([this] { return can_go_on(); }, transfer.deadline);
      if (!in_time) {
        result.state = TransferResult::State::kTimedOut;
      } else if (const int gone = find_gone(); gone >= 0) {
        result.state = TransferResult::State::kGone;
        const int culprit = board_->culprit(gone);
        result.gone = gone;
        result.missing = {culprit >= 0 && culprit != rank() ? culprit : gone};
        result.text = board_->why(gone);
      }
    }
    if (result.state == TransferResult::State::kTimedOut) list_missing(result);
    take_back();
    return result;
  }

  TransferResult exchange_device(const Transfer& transfer, const kernels::Stream& stream) override {
    return exchange_events(*this, board_->events(), transfer, stream);
  }
  void reserve_device(int64_t, int64_t) override {}

  std::shared_ptr<Backend> split(const Subgroup& subgroup) override {
    int new_rank = 0;
    while (subgroup.members[static_cast<size_t>(new_rank)] != rank()) ++new_rank;
    return std::make_shared<LocalBackend>(board_->join(subgroup), new_rank);
  }

  void leave(const std::string& why, int culprit) override { board_->leave(rank(), why, culprit); }

 private:
  Slot& incoming(int p) { return board_->slot(p, rank()); }
  Slot& outgoing(int p) { return board_->slot(rank(), p); }

  // Shows all blocks to the peers; peers start behind this rank, so that not all read one buffer.
  void offer(const Transfer& transfer) {
    open_.clear();
    for (int k = 1; k < size(); ++k) {
      const int p = (rank() + k) % size();
      const PeerBlock& block = transfer.blocks[p];
      if (block.recv_units * transfer.unit_bytes > 0) open_.push_back(p);
      if (block.send_units * transfer.unit_bytes == 0) continue;
      Slot& slot = outgoing(p);
      slot.data = block.send;
      slot.bytes = block.send_units * transfer.unit_bytes;
      slot.state.store(Slot::kFull);
    }
    board_->job().wake();
  }

  // Copies every block that is there.
  void take(const Transfer& transfer, TransferResult& result) {
    size_t num_open = 0;
    for (const int p : open_) {
      Slot& slot = incoming(p);
      int expected = Slot::kFull;
      if (!slot.state.compare_exchange_strong(expected, Slot::kCopying)) {
        open_[num_open++] = p;
        continue;
      }
      const PeerBlock& block = transfer.blocks[p];
      const int64_t bytes = block.recv_units * transfer.unit_bytes;
      if (slot.bytes == bytes) {
        std::memcpy(block.recv, slot.data, static_cast<size_t>(bytes));
      } else {
        result.state = TransferResult::State::kBroken;
        result.missing = {p};
        result.text = "bytes=" + to_text(slot.bytes) + " from rank " + to_text(p) + " instead of " +
                      to_text(bytes);
      }
      slot.state.store(Slot::kEmpty);
      board_->job().wake();
    }
    open_.resize(num_open);
  }

  bool is_taken(int p) { return p == rank() || outgoing(p).state.load() == Slot::kEmpty; }
  bool are_taken() {
    bool all = true;
    for (int p = 0; p < size(); ++p) all = all && is_taken(p);
    return all;
  }

  // A peer that we need and that will not come. Its flag is read first: what it left behind counts.
  int find_gone() {
    for (int p = 0; p < size(); ++p) {
      const bool is_gone = p != rank() && board_->is_gone(p);
      if (!is_gone) continue;
      for (const int q : open_) {
        if (q == p && incoming(p).state.load() != Slot::kFull) return p;
      }
      if (!is_taken(p)) return p;
    }
    return -1;
  }

  bool can_go_on() {
    for (const int p : open_) {
      if (incoming(p).state.load() == Slot::kFull) return true;
    }
    return (open_.empty() && are_taken()) || find_gone() >= 0;
  }

  void list_missing(TransferResult& result) {
    result.is_silent = !open_.empty();
    for (int p = 0; p < size(); ++p) {
      bool is_missing = open_.empty() && !is_taken(p);
      for (const int q : open_) is_missing = is_missing || q == p;
      if (is_missing) result.missing.push_back(p);
    }
  }

  // After a failure: nobody may read our buffers any more.
  void take_back() {
    for (int p = 0; p < size(); ++p) {
      if (p == rank()) continue;
      int expected = Slot::kFull;
      outgoing(p).state.compare_exchange_strong(expected, Slot::kEmpty);
      while (outgoing(p).state.load() == Slot::kCopying) std::this_thread::yield();
    }
  }

  std::shared_ptr<Board> board_;
  std::vector<int> open_;  // peers whose block has not come yet
};

bool is_peer_lost(const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const PeerLost&) {
    return true;
  } catch (...) {
    return false;
  }
}

std::string text_of(const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "unknown exception";
  }
}

void rethrow_cause(const std::vector<std::exception_ptr>& failures) {
  for (const std::exception_ptr& failure : failures) {
    if (failure != nullptr && !is_peer_lost(failure)) std::rethrow_exception(failure);
  }
  for (const std::exception_ptr& failure : failures) {
    if (failure != nullptr) std::rethrow_exception(failure);
  }
}

}  // namespace

void run_local(int size, const std::function<void(const Group&)>& body) {
  require(size >= 1 && size <= kRanksMax, "run_local", "size", size,
          "is outside [1, " + to_text(kRanksMax) + "]; choose the number of threads in it");
  auto job = std::make_shared<Job>(size);
  std::vector<int> job_ranks;
  for (int r = 0; r < size; ++r) job_ranks.push_back(r);
  auto board = std::make_shared<Board>(job, std::move(job_ranks));

  std::vector<std::exception_ptr> failures(static_cast<size_t>(size) + 1);  // last: no thread
  const auto run_rank = [&](int rank) {
    std::string why = "its body has returned";
    try {
      body(Group(std::make_shared<LocalBackend>(board, rank)));
    } catch (...) {
      failures[static_cast<size_t>(rank)] = std::current_exception();
      why = text_of(std::current_exception());
    }
    job->end(rank, why);
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(size));
  try {
    for (int r = 0; r < size; ++r) threads.emplace_back(run_rank, r);
  } catch (const std::exception&) {
    failures.back() = std::current_exception();
    for (auto r = static_cast<int>(threads.size()); r < size; ++r) {
      job->end(r, "its thread could not be started");
    }
  }
  for (std::thread& thread : threads) thread.join();
  rethrow_cause(failures);
}

}  // namespace perseid::comm
