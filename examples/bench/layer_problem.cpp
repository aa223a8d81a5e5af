#include "examples/bench/layer_problem.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "kernels/random.h"

namespace perseid::bench {
namespace {

/// Numbers of one stream, one after the other.
class Draws {
 public:
  explicit Draws(kernels::RandomKey key) : key_(key) {}
  double uniform() { return kernels::random_uniform(key_, next_++); }
  int64_t below(int64_t n) {
    return static_cast<int64_t>(kernels::random_below(key_, next_++, static_cast<uint64_t>(n)));
  }

 private:
  kernels::RandomKey key_;
  uint64_t next_ = 0;
};

/// Deals the experts out in turn, then swaps choices of random tokens where no token would get an
/// expert twice.
std::vector<int64_t> draw_balanced(const LayerCase& shape, Draws& draws) {
  const int64_t K = shape.top_k;
  std::vector<int64_t> experts(static_cast<size_t>(shape.num_assignments()));
  for (size_t a = 0; a < experts.size(); ++a) {
    experts[a] = static_cast<int64_t>(a) % shape.num_experts;
  }
  const auto token_has = [&](int64_t token, int64_t expert) {
    const auto first = experts.begin() + token * K;
    return std::find(first, first + K, expert) != first + K;
  };
  for (int64_t swap = 0; swap < 4 * shape.num_assignments(); ++swap) {
    const int64_t a = draws.below(shape.num_assignments());
    const int64_t b = draws.below(shape.num_assignments());
    int64_t& first = experts[static_cast<size_t>(a)];
    int64_t& second = experts[static_cast<size_t>(b)];
    if (!token_has(a / K, second) && !token_has(b / K, first)) std::swap(first, second);
  }
  return experts;
}

/// K experts per token one after the other, each with probability ~ weights[e] among those left.
std::vector<int64_t> draw_weighted(const LayerCase& shape, const std::vector<double>& weights,
                                   Draws& draws) {
  std::vector<int64_t> experts;
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    std::vector<double> left = weights;
    for (int64_t k = 0; k < shape.top_k; ++k) {
      double total = 0;
      for (const double weight : left) total += weight;
      double rest = draws.uniform() * total;
      size_t chosen = left.size();
      for (size_t e = 0; e < left.size() && (chosen == left.size() || rest >= 0); ++e) {
        if (left[e] == 0) continue;
        chosen = e;
        rest -= left[e];
      }
      experts.push_back(static_cast<int64_t>(chosen));
      left[chosen] = 0;
    }
  }
  return experts;
}

std::vector<int64_t> draw_experts(const LayerCase& shape, Draws& draws) {
  if (shape.routing == Distribution::kBalanced) return draw_balanced(shape, draws);
  std::vector<double> weights(static_cast<size_t>(shape.num_experts), 1.0);
  if (shape.routing == Distribution::kZipf) {
    for (size_t e = 0; e < weights.size(); ++e) weights[e] = 1.0 / static_cast<double>(e + 1);
  }
  return draw_weighted(shape, weights, draws);
}

}  // namespace

const char* name_of(Distribution distribution) {
  switch (distribution) {
    case Distribution::kBalanced:
      return "balanced";
    case Distribution::kRandom:
      return "random";
    case Distribution::kZipf:
      return "zipf";
  }
  return "unknown";
}

const char* name_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "bfloat16" : dtype == at::kHalf ? "float16" : "float32";
}

double tolerance_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? 3e-2 : dtype == at::kHalf ? 4e-3 : 1e-4;
}

at::Tensor draw_routing(const LayerCase& shape, uint64_t seed, uint64_t draw) {
  Draws draws(kernels::random_key(seed).with(draw));
  return at::tensor(draw_experts(shape, draws), at::kLong).view({shape.num_tokens, shape.top_k});
}

LayerProblem make_problem(const LayerCase& shape, uint64_t seed, uint64_t draw, at::Device device) {
  const int64_t T = shape.num_tokens, D = shape.d_model, E = shape.num_experts, K = shape.top_k;
  const kernels::RandomKey key = kernels::random_key(seed).with(draw);
  // In double on the host; on a GPU that would take long, and what float32 loses is far below what
  // separates the logits.
  const auto wide = at::TensorOptions(device.is_cpu() ? at::kDouble : at::kFloat).device(device);
  at::manual_seed(seed);
  const at::Tensor basis =
      std::get<0>(at::linalg_qr(at::randn({D, E}, at::kDouble))).to(wide.device(), wide.dtype());
  at::manual_seed(key.value);
  LayerProblem problem;
  problem.shape = shape;
  problem.expert_idx = draw_routing(shape, seed, draw).to(device);
  const at::Tensor logits =
      (at::rand({T, E}, wide) - 1).scatter(1, problem.expert_idx, at::rand({T, K}, wide) + 2);
  const at::Tensor noise = at::randn({T, D}, wide);
  problem.tokens = (noise + (logits - noise.mm(basis)).mm(basis.t())).to(shape.dtype);
  problem.router = basis.t().contiguous().to(at::kFloat);
  problem.grad_out = at::randn({T, D}, wide.dtype(at::kFloat)).to(shape.dtype);
  return problem;
}

}  // namespace perseid::bench
