#include "gates/relaxed_permutation.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "gates/device.h"
#include "gates/kernel_types.h"
#include "kernels/doubly_stochastic.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kRelaxedPermutation = "relaxed_permutation";

struct RelaxedPermutation : torch::autograd::Function<RelaxedPermutation> {
  static Tensor forward(AutogradContext* ctx, const Tensor& scores, double temperature,
                        int64_t iterations) {
    const Tensor rows = at::empty({scores.size(0), iterations, scores.size(2)},
                                  scores.options().dtype(at::kDouble).requires_grad(false));
    const Tensor columns = at::empty_like(rows);
    Tensor relaxed = at::empty_like(scores);
    kernels::doubly_stochastic({scores.size(0), scores.size(1)}, {temperature, iterations},
                               kernel_type(scores.scalar_type()), scores.const_data_ptr(),
                               relaxed.mutable_data_ptr(), rows.mutable_data_ptr<double>(),
                               columns.mutable_data_ptr<double>(),
                               stream_of(scores, kRelaxedPermutation));
    ctx->save_for_backward({scores, rows, columns});
    ctx->saved_data["temperature"] = temperature;
    return relaxed;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    require(!c10::GradMode::is_enabled(), kRelaxedPermutation, "create_graph", true,
            "is not supported: the relaxation has no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &scores = saved[0], &rows = saved[1], &columns = saved[2];
    const Tensor grad = gradients[0].to(scores.scalar_type()).contiguous();
    Tensor grad_scores = at::empty_like(scores);
    kernels::doubly_stochastic_backward(
        {scores.size(0), scores.size(1)}, {ctx->saved_data["temperature"].toDouble(), rows.size(1)},
        kernel_type(scores.scalar_type()), scores.const_data_ptr(), rows.const_data_ptr<double>(),
        columns.const_data_ptr<double>(), grad.const_data_ptr(), grad_scores.mutable_data_ptr(),
        stream_of(scores, kRelaxedPermutation));
    return {grad_scores, Tensor(), Tensor()};
  }
};

}  // namespace

Tensor relaxed_permutation(const Tensor& scores, double temperature, int64_t iterations) {
  return RelaxedPermutation::apply(scores.contiguous(), temperature, iterations);
}

}  // namespace perseid::gates
