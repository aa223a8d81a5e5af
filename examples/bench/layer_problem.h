#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace perseid::bench {

/// How tokens choose experts.
enum class Distribution : uint8_t {
  kBalanced,  ///< each expert gets T*K/E assignments (rounded up or down)
  kRandom,    ///< uniform, without replacement per token
  kZipf       ///< expert e with probability ~ 1 / (e+1), without replacement per token
};
const char* name_of(Distribution distribution);
const char* name_of(at::ScalarType dtype);  ///< float32, bfloat16 or float16
/// How far two ways to compute in this type may differ, relative to the largest value.
double tolerance_of(at::ScalarType dtype);

/// One case: sizes as in design.md (T, D, F, E, K), gated experts.
struct LayerCase {
  int64_t num_tokens = 4096;
  int64_t d_model = 512;
  int64_t d_ff = 1024;
  int64_t num_experts = 16;
  int64_t top_k = 2;
  at::ScalarType dtype = at::kFloat;
  Distribution routing = Distribution::kBalanced;
  std::string name = {};  ///< of the model that has this shape; empty: none

  int64_t num_assignments() const { return num_tokens * top_k; }  ///< A
  /// Gated experts forward and backward: 6 + 12 times A*D*F.
  double flops() const {
    return 18.0 * static_cast<double>(num_assignments()) * static_cast<double>(d_model) *
           static_cast<double>(d_ff);
  }
};

/// Values of a case, the same for all contenders.
struct LayerProblem {
  LayerCase shape;
  at::Tensor expert_idx;  ///< [T, K] int64, drawn
  at::Tensor tokens;      ///< [T, D]
  at::Tensor router;      ///< [E, D] float32, orthonormal rows
  at::Tensor grad_out;    ///< [T, D] gradient of the output
};

/// [T, K] int64 on the host, the experts of each token, drawn by the distribution of the case.
at::Tensor draw_routing(const LayerCase& shape, uint64_t seed, uint64_t draw = 0);

/// The gate computes its real product and top-k, and yet selects what was drawn: a token is noise
/// that the router does not see, plus multiples of router rows that give each logit a chosen value,
/// in [2, 3) for the experts drawn and in [-1, 0) for all others.
/// @param draw    number of the draw; the router is the same for all draws of a seed
/// @param device  where the tensors go and, but for the draw, are made
LayerProblem make_problem(const LayerCase& shape, uint64_t seed, uint64_t draw = 0,
                          at::Device device = at::kCPU);

}  // namespace perseid::bench
