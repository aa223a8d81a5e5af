#pragma once
#include <functional>
#include <iosfwd>
#include <string>
#include <vector>

#include "examples/bench/layer_problem.h"
#include "examples/bench/place.h"

namespace perseid::bench {

/// One operation, ready to be run again and again, with what it cannot do without.
struct Work {
  std::string name;
  double bytes = 0;  ///< least traffic: what must be read and written once
  double flops = 0;
  size_t reference = 0;  ///< place among the works of the case of what LibTorch does for the same
  std::function<void()> run;
};

struct KernelBenchOptions {
  std::string bench;  ///< router, permute, combine or search
  std::vector<LayerCase> cases;
  kernels::Device device = kernels::Device::kCpu;
  int threads = 1;
  int64_t repeats = 15;  ///< rounds; in each one everything runs once
  uint64_t seed = 0;
  std::string json;  ///< file; empty: none
};

/// The operations of a case. They were run once, and their results compared with LibTorch's:
/// InternalError if they differ.
/// route and route_backward beside softmax + topk and its autograd, on the same float32 logits.
std::vector<Work> router_works(const LayerCase& shape, const Place& place, uint64_t seed);
/// counting_sort beside a stable sort, permute beside index_select.
std::vector<Work> permute_works(const LayerCase& shape, const Place& place, uint64_t seed);
/// combine and combine_backward beside index_select + sum and its transpose.
std::vector<Work> combine_works(const LayerCase& shape, const Place& place, uint64_t seed);

/// doubly_stochastic and its backward beside the same steps of LibTorch in float64 and its
/// autograd, for matrices of E x E.
std::vector<Work> search_works(const LayerCase& shape, const Place& place, uint64_t seed);
/// Its cases, and the iterations of each.
std::vector<LayerCase> search_cases();
inline constexpr int64_t kSearchIterations = 150;

/// Measures the copy limit, then each case, and prints tables.
void run_kernel_bench(const KernelBenchOptions& options, std::ostream& out);

/// Throws InternalError if the largest error, relative to the largest value, exceeds `tolerance`.
void require_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance,
                   const std::string& operation, const std::string& what);

}  // namespace perseid::bench
