#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// The COMET gate (Ibrahim et al. 2023, "COMET: Learning Cardinality Constrained Mixture of Experts
// with Trees and Local Search"): K binary trees of smooth-step switches over the experts, joined by
// one softmax. Once the switches of a token are saturated it has at most K experts.

namespace perseid::kernels {

/// Every tree has E-1 split nodes and E leaves. Nodes are in heap order: node q has the children
/// 2q+1 (left) and 2q+2, nodes E-1 .. 2E-2 are the leaves. Leaves are in the order of a left-first
/// depth-first walk; the two orders differ unless E is a power of two.
struct CometShape {
  int64_t num_tokens = 0;   ///< T >= 0
  int64_t num_experts = 0;  ///< E >= 1, any number
  int64_t num_trees = 0;    ///< 1 <= K <= E
};

struct CometOptions {
  double gamma = 1;  ///< width of the switches, above 0
  /// Weights below it become 0, the others stay as they are; 0: exact.
  double min_weight = 0;
  /// Each tree counts as one-hot on its leaf of the largest v, equal ones on the smaller leaf: at
  /// most K experts. The entropy and its gradient stay those of the soft tree.
  bool hard_eval = false;
};

/// Inputs; floating ones are float32 or float64, as `dtype` says.
struct CometInput {
  const void* split_logits = nullptr;  ///< [T, K, E-1] z
  const void* leaf_logits = nullptr;   ///< [T, K, E] a
  /// [K, E] expert of each leaf, in [0, E); null: leaf l is expert l. Two leaves of a tree may
  /// share an expert.
  const int32_t* expert_map = nullptr;
  const uint8_t* valid = nullptr;  ///< [T] 1 = a real token; null = all are. Others get zeros
};

/// Outputs; a null pointer is not written.
struct CometOutput {
  void* weights = nullptr;               ///< [T, E] g
  double* entropy_sum = nullptr;         ///< [1] sum over valid tokens, trees, leaves of
                                         ///< -v log(v + 1e-6)
  double* removed_weight = nullptr;      ///< [1] sum of the weights below min_weight
  int64_t* reached_nodes = nullptr;      ///< [1] split nodes of valid tokens with a reach above 0
  int64_t* saturated_nodes = nullptr;    ///< [1] of these, at exactly 0 or 1
  int64_t* non_finite_tokens = nullptr;  ///< [1] valid tokens with a NaN or an infinity in z or a
};

/// h_q = S(z_q; gamma) goes to the left child, 1 - h_q to the right one (kernels/smooth_step.h);
/// v_l is the product on the path to leaf l, and 0 where it is below the smallest normal number;
/// w_l = e^(a_l - amax) v_l / Z over all leaves of all trees, amax the largest a of a leaf with
/// v > 0; g_m = sum of w over the leaves of expert m. So g is exactly 0 where every v is, and a
/// leaf with v = 0 has no influence, whatever its a. Leaves with a = +inf share all weight in
/// proportion to v; if all reached leaves have -inf, w = v / K. A NaN in z or a: experts 0 .. K-1
/// get NaN, the others 0, and the sums become NaN.
/// Arithmetic in `dtype`, sums over tokens in double over fixed blocks of tokens: same bits for any
/// thread count. Reads T*K*(2E-1), writes T*E elements.
void comet(const CometShape& shape, const CometOptions& options, DType dtype,
           const CometInput& input, const CometOutput& output, Stream stream = {});
void comet_reference(const CometShape& shape, const CometOptions& options, DType dtype,
                     const CometInput& input, const CometOutput& output);

/// Gradients that reach the gate; a null pointer means zero.
struct CometGradInput {
  const void* weights = nullptr;             ///< [T, E] of the forward
  const void* grad_weights = nullptr;        ///< [T, E] read only where `weights` is above 0
  const double* grad_entropy_sum = nullptr;  ///< [1]
};

/// Writes both gradients whole. With r = grad_weights where g > 0, else 0, and rbar = sum_m g_m
/// r_m: grad a_l = w_l (r_l - rbar), dL/dv_l = (e^(a_l - amax) / Z)(r_l - rbar) + c (-log(v_l +
/// eps) - v_l / (v_l + eps)) with eps = 1e-6 and c = grad_entropy_sum, 0 where v_l = 0; then
/// bottom-up G(q) = h G(left) + (1 - h) G(right) and grad z_q = S'(z_q) reach(q) (G(left) -
/// G(right)), without a division. Exact though r is not read where g = 0: such a leaf has a
/// saturated node on its path. With hard_eval v does not depend on z in g. Where amax is infinite
/// the weights are a convention and have no gradient. Invalid tokens get 0, tokens with a NaN get
/// NaN. Same inputs as the forward; reads and writes T*K*(2E-1). Deterministic.
void comet_backward(const CometShape& shape, const CometOptions& options, DType dtype,
                    const CometInput& input, const CometGradInput& grad, void* grad_split_logits,
                    void* grad_leaf_logits, Stream stream = {});
void comet_backward_reference(const CometShape& shape, const CometOptions& options, DType dtype,
                              const CometInput& input, const CometGradInput& grad,
                              void* grad_split_logits, void* grad_leaf_logits);

}  // namespace perseid::kernels
