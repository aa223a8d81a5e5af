#pragma once
#include <torch/arg.h>

#include "kernels/activation.h"
#include "moe/activation_sparsity.h"
#include "moe/effective_parts.h"
#include "moe/experts.h"

namespace perseid {

struct GroupedMLPOptions {
  GroupedMLPOptions(int64_t d_model, int64_t d_ff) : d_model_(d_model), d_ff_(d_ff) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, d_ff);       ///< F, the width of one of gate and up
  TORCH_ARG(int64_t, d_out) = 0;  ///< 0: d_model
  TORCH_ARG(kernels::Activation, activation) = kernels::Activation::kSilu;
  TORCH_ARG(bool, gated) = true;  ///< SwiGLU, GEGLU; false: plain, f(x W1) W2
  TORCH_ARG(bool, bias) = false;
  TORCH_ARG(ActivationSparsity, activation_sparsity) = {};  ///< others than none: CPU only
  TORCH_ARG(double, init_bound) = 0;  ///< weights uniform in +-init_bound; 0: 1/sqrt(fan in)
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
};

/// Two-layer experts of one shape. Rows are handled expert by expert, no padding.
/// Parameters, in the fused layout of transformers 5:
///   gate_up_proj [L, 2F, D] (gate rows first; plain experts: up_proj [L, F, D]), down_proj [L,
///   d_out, F] and with bias: gate_up_bias [L, 2F] (up_bias [L, F]), down_bias [L, d_out]
/// Initialised by (seed, layer_id, global expert id): any rank count starts from the same weights.
/// Saves for the backward: the rows and the pre-activation, N*D + 2*R*F elements (plain: R*F),
/// since the routing weight is applied to the activation (specified in kernels/activation.h).
class GroupedMLP : public Experts {
 public:
  GroupedMLP(const GroupedMLPOptions& options, const ExpertPlacement& placement, int ep_rank);
  at::Tensor forward(const at::Tensor& rows, const at::Tensor& weights,
                     const std::shared_ptr<const RoutingPlan>& plan) override;
  /// Hidden values that are not 0, of the num_rows * F of each expert: how lazy neurons are, with
  /// or without activation_sparsity. Runs the first half of the experts once; on the CPU.
  /// @param rows  as for forward
  /// @return [L] int64
  at::Tensor active_hidden(const at::Tensor& rows, const std::shared_ptr<const RoutingPlan>& plan);
  const GroupedMLPOptions& options() const { return options_; }

  at::Tensor up_proj;    ///< [L, 2F or F, D]
  at::Tensor up_bias;    ///< [L, 2F or F] or undefined
  at::Tensor down_proj;  ///< [L, d_out, F]
  at::Tensor down_bias;  ///< [L, d_out] or undefined

 protected:
  /// "w1" (gate, or up of plain experts), "w3" (up of gated ones), "w2" (down)
  std::vector<SparseUnit> matrices() const override;
  std::vector<std::string> matrix_names() const override;

 private:
  void require_parameters() const;
  GroupedMLPOptions options_;
  std::shared_ptr<EffectiveParts> up_parts_ = std::make_shared<EffectiveParts>();
  std::shared_ptr<EffectiveParts> down_parts_ = std::make_shared<EffectiveParts>();
};

struct GroupedLinearOptions {
  GroupedLinearOptions(int64_t d_in, int64_t d_out) : d_in_(d_in), d_out_(d_out) {}
  TORCH_ARG(int64_t, d_in);
  TORCH_ARG(int64_t, d_out);
  TORCH_ARG(bool, bias) = true;       ///< starts at 0
  TORCH_ARG(double, init_bound) = 0;  ///< weights uniform in +-init_bound; 0: 1/sqrt(d_in)
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
};

/// Linear experts, y = W x + b. Parameters: weight [L, d_out, d_in], bias [L, d_out].
class GroupedLinear : public Experts {
 public:
  GroupedLinear(const GroupedLinearOptions& options, const ExpertPlacement& placement, int ep_rank);
  at::Tensor forward(const at::Tensor& rows, const at::Tensor& weights,
                     const std::shared_ptr<const RoutingPlan>& plan) override;

  at::Tensor weight;
  at::Tensor bias;  ///< or undefined

 protected:
  std::vector<SparseUnit> matrices() const override;  ///< "w1"
  std::vector<std::string> matrix_names() const override;

 private:
  GroupedLinearOptions options_;
  std::shared_ptr<EffectiveParts> parts_ = std::make_shared<EffectiveParts>();
};

}  // namespace perseid
