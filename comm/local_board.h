#pragma once
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/backend.h"
#include "comm/local_device.h"

namespace perseid::comm {

constexpr int kPollsBeforeSleep = 200;

/// What all threads of a run share: how they sleep, and which of them have ended.
class Job {
 public:
  explicit Job(int size) : has_ended_(static_cast<size_t>(size)), why_(has_ended_.size()) {}

  /// Returns false if is_ready() did not hold until the deadline.
  template <typename IsReady>
  bool wait(const IsReady& is_ready, Clock::time_point deadline) {
    for (int poll = 0; poll < kPollsBeforeSleep; ++poll) {
      if (is_ready()) return true;
      std::this_thread::yield();
    }
    std::unique_lock lock(mutex_);
    // Announced before is_ready() looks, and both are sequentially consistent: either we see the
    // change, or the one who makes it sees us.
    num_sleepers_.fetch_add(1);
    const bool in_time = changed_.wait_until(lock, deadline, is_ready);
    num_sleepers_.fetch_sub(1);
    return in_time;
  }

  /// Call after each change that is_ready() may look at.
  void wake() {
    if (num_sleepers_.load() == 0) return;
    { const std::lock_guard lock(mutex_); }
    changed_.notify_all();
  }

  void end(int job_rank, const std::string& why) {
    {
      const std::lock_guard lock(mutex_);
      why_[static_cast<size_t>(job_rank)] = why;
    }
    has_ended_[static_cast<size_t>(job_rank)].store(true);
    wake();
  }
  bool has_ended(int job_rank) const { return has_ended_[static_cast<size_t>(job_rank)].load(); }
  std::string why(int job_rank) {
    const std::lock_guard lock(mutex_);
    return why_[static_cast<size_t>(job_rank)];
  }
  std::mutex& mutex() { return mutex_; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<int> num_sleepers_{0};
  std::vector<std::atomic<bool>> has_ended_;  // [P of the job]
  std::vector<std::string> why_;
};

/// A block on its way. Empty and full are set by the sender, copying and empty by the receiver.
struct alignas(64) Slot {
  enum State : int { kEmpty, kFull, kCopying };
  std::atomic<int> state{kEmpty};
  const void* data = nullptr;
  int64_t bytes = 0;
};

/// What the ranks of one group share.
class Board {
 public:
  Board(std::shared_ptr<Job> job, std::vector<int> job_ranks)
      : job_(std::move(job)),
        job_ranks_(std::move(job_ranks)),
        slots_(job_ranks_.size() * job_ranks_.size()),
        has_left_(job_ranks_.size()),
        events_(job_ranks_.size()),
        why_(job_ranks_.size()),
        culprits_(job_ranks_.size(), -1) {}

  Job& job() { return *job_; }
  int size() const { return static_cast<int>(job_ranks_.size()); }
  Slot& slot(int source, int target) {
    return slots_[static_cast<size_t>(source) * job_ranks_.size() + static_cast<size_t>(target)];
  }

  /// [P] of device exchanges. They live as long as the last rank of the group.
  std::vector<RankEvents>& events() { return events_; }

  bool is_gone(int rank) const {
    return has_left_[static_cast<size_t>(rank)].load() || job_->has_ended(job_rank(rank));
  }
  void leave(int rank, const std::string& why, int culprit) {
    {
      const std::lock_guard lock(job_->mutex());
      why_[static_cast<size_t>(rank)] = why;
      culprits_[static_cast<size_t>(rank)] = culprit;
    }
    has_left_[static_cast<size_t>(rank)].store(true);
    job_->wake();
  }
  std::string why(int rank) {
    if (!has_left_[static_cast<size_t>(rank)].load()) return job_->why(job_rank(rank));
    const std::lock_guard lock(job_->mutex());
    return why_[static_cast<size_t>(rank)];
  }
  int culprit(int rank) {
    const std::lock_guard lock(job_->mutex());
    return culprits_[static_cast<size_t>(rank)];
  }

  /// The board of a new group; the first member to come makes it, the last one to come drops it
  /// from the list.
  std::shared_ptr<Board> join(const Subgroup& subgroup) {
    const std::lock_guard lock(job_->mutex());
    Joining& joining = joining_[{subgroup.sequence, subgroup.color}];
    if (joining.board == nullptr) {
      std::vector<int> job_ranks;
      for (const int member : subgroup.members) job_ranks.push_back(job_rank(member));
      joining.board = std::make_shared<Board>(job_, std::move(job_ranks));
    }
    std::shared_ptr<Board> board = joining.board;
    if (++joining.num_joined == board->size()) joining_.erase({subgroup.sequence, subgroup.color});
    return board;
  }

 private:
  struct Joining {
    std::shared_ptr<Board> board;
    int num_joined = 0;
  };
  struct JoinKey {
    uint32_t sequence;
    int color;
    auto operator<=>(const JoinKey&) const = default;
  };
  int job_rank(int rank) const { return job_ranks_[static_cast<size_t>(rank)]; }

  std::shared_ptr<Job> job_;
  std::vector<int> job_ranks_;  // [P of the group]
  std::vector<Slot> slots_;     // [source, target]
  std::vector<std::atomic<bool>> has_left_;
  std::vector<RankEvents> events_;
  std::vector<std::string> why_;
  std::vector<int> culprits_;
  std::map<JoinKey, Joining> joining_;
};

}  // namespace perseid::comm
