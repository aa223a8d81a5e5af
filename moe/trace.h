#pragma once
#include <ATen/record_function.h>

// Internal: ranges that profilers show: LibTorch's (user scope), and Nsight's in builds with CUDA.

namespace perseid {

void push_range(const char* name);
void pop_range();

/// The stage `name` lasts as long as this lives. Costs some nanoseconds when nobody looks.
class Trace {
 public:
  explicit Trace(const char* name) : record_(at::RecordScope::USER_SCOPE) {
    if (record_.isActive()) record_.before(name);
    push_range(name);
  }
  ~Trace() { pop_range(); }
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

 private:
  at::RecordFunction record_;
};

}  // namespace perseid
