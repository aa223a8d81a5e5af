#include "kernels/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <utility>

namespace perseid::kernels {
namespace {

struct Pool {
  ParallelFor run;
  std::function<int()> num_threads;
};

Pool& pool() {
  static Pool instance;
  return instance;
}

/// Our own mark rather than the pool's, so that nesting behaves alike on every pool.
thread_local bool is_inside_region = false;

class RegionMark {
 public:
  RegionMark() : was_inside_(is_inside_region) { is_inside_region = true; }
  ~RegionMark() { is_inside_region = was_inside_; }
  RegionMark(const RegionMark&) = delete;
  RegionMark& operator=(const RegionMark&) = delete;

 private:
  bool was_inside_;
};

/// Keeps the first exception of several threads: not every pool can pass one on.
class FirstException {
 public:
  template <typename Body>
  void guard(Body&& body) {
    if (has_failed_.load(std::memory_order_relaxed)) return;
    try {
      body();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      has_failed_.store(true, std::memory_order_relaxed);
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> has_failed_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace

void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body) {
  if (begin >= end) return;
  grain = std::max<int64_t>(grain, 1);
  if (end - begin <= grain || num_threads() == 1) {
    body(begin, end);
    return;
  }
  FirstException first;
  pool().run(begin, end, grain, [&](int64_t range_begin, int64_t range_end) {
    const RegionMark mark;
    first.guard([&] { body(range_begin, range_end); });
  });
  first.rethrow();
}

int num_threads() {
  if (is_inside_region || !pool().run || !pool().num_threads) return 1;
  return std::max(1, pool().num_threads());
}

void set_parallel_for(ParallelFor implementation, std::function<int()> num_threads) {
  pool() = Pool{std::move(implementation), std::move(num_threads)};
}

void parallel_tasks(int64_t num_tasks, const std::function<void(int64_t)>& body) {
  const int64_t num_workers = std::min<int64_t>(num_threads(), num_tasks);
  if (num_workers <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, num_workers, 1, [&](int64_t, int64_t) {
    // One loop even if the pool gives this thread several workers: it takes what is left.
    for (int64_t task = next.fetch_add(1); task < num_tasks; task = next.fetch_add(1)) {
      try {
        body(task);
      } catch (...) {
        next.store(num_tasks);  // the other workers stop after their present task
        throw;
      }
    }
  });
}

}  // namespace perseid::kernels
