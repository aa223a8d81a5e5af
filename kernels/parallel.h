#pragma once
#include <cstdint>
#include <functional>

namespace perseid::kernels {

/// Runs body(begin, end) over disjoint ranges that cover [begin, end), possibly on several threads;
/// ranges have at least `grain` elements where there are that many. Results must not depend on the
/// split. Called inside a body it runs on the calling thread. The first exception of a body is
/// rethrown to the caller.
using ParallelFor = std::function<void(int64_t begin, int64_t end, int64_t grain,
                                       const std::function<void(int64_t, int64_t)>& body)>;

void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body);

/// Threads that parallel_for may use at most, 1 or more.
int num_threads();

/// Replaces the pool behind parallel_for; moe sets LibTorch's, so that no second pool competes for
/// the cores. Without a call, or with null, everything runs on the calling thread. Not safe while
/// kernels run.
void set_parallel_for(ParallelFor implementation, std::function<int()> num_threads);

/// Runs body(task) for task = 0 .. num_tasks-1. Each thread takes the next task when it is done
/// with the last, so list long tasks first. Which thread runs a task must not matter.
void parallel_tasks(int64_t num_tasks, const std::function<void(int64_t)>& body);

}  // namespace perseid::kernels
