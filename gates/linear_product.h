#pragma once
#include <ATen/core/Tensor.h>

// Internal: the products of a linear layer on tokens, without a graph. On the host by
// kernels/router_linear.h, on a GPU by LibTorch's product.

namespace perseid::gates {

/// features weight^T + bias. [T, N] in the type of `weight`.
/// @param features  [T, D] of the type of `weight`, or bfloat16 with a float32 weight
/// @param weight    [N, D] float32 or float64
/// @param bias      [N] or undefined
/// All contiguous.
at::Tensor linear_product(const at::Tensor& features, const at::Tensor& weight,
                          const at::Tensor& bias);

/// Zeros for tokens that are not valid, whose rows may hold anything: 0 * NaN is not 0.
/// @param valid  [T] bool or undefined: all are
at::Tensor clean_rows(const at::Tensor& rows, const at::Tensor& valid);

struct LinearWanted {
  bool features = false, weight = false, bias = false;
};
/// Of the arguments of the same names, undefined where not wanted; `features` in its own type.
struct LinearGradients {
  at::Tensor features, weight, bias;
};

/// @param features  as above; may be undefined if the gradient of the weight is not wanted
/// @param weight    as above; may be undefined if the gradient of the features is not wanted
/// @param valid     [T] bool or undefined: rows of other tokens get 0 and add nothing
/// @param grad      [T, N] contiguous
LinearGradients linear_product_backward(const at::Tensor& features, const at::Tensor& weight,
                                        const at::Tensor& valid, const at::Tensor& grad,
                                        LinearWanted wanted);

}  // namespace perseid::gates
