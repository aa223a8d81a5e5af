#pragma once
#include <torch/arg.h>
#include <torch/nn/modules/container/any.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "moe/experts.h"

namespace perseid {

/// Makes the module of one expert. Called for the experts of this rank, with LibTorch's default
/// generator seeded from (seed, layer, expert id): the usual initialisers then give every rank
/// count the same weights. The generator's state is restored afterwards. On a rank without experts
/// it is called once, for expert 0, whose module only tells the names of its matrices.
using ExpertFactory = std::function<torch::nn::AnyModule(int64_t expert_id)>;

struct ModuleExpertsOptions {
  ModuleExpertsOptions(int64_t d_in, int64_t d_out) : d_in_(d_in), d_out_(d_out) {}
  TORCH_ARG(int64_t, d_in);  ///< a row is [d_in]; a module that wants another shape views it
  TORCH_ARG(int64_t, d_out);
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
};

/// Any torch::nn::Module as expert: forward takes [rows, d_in] and returns [rows, d_out]. A module
/// without rows is not called; its parameters get zero gradients, never undefined ones. The module
/// saves what its own autograd saves. Modules are registered as "expert_<global id>".
class ModuleExperts : public Experts {
 public:
  ModuleExperts(const ModuleExpertsOptions& options, const ExpertFactory& factory,
                const ExpertPlacement& placement, int ep_rank);
  at::Tensor forward(const at::Tensor& rows, const at::Tensor& weights,
                     const std::shared_ptr<const RoutingPlan>& plan) override;

 protected:
  /// The 2-D weights of each module, see sparse_units of moe/sparsifier.h, by their names in it.
  std::vector<SparseUnit> matrices() const override;
  std::vector<std::string> matrix_names() const override;  ///< all modules should have the same

 private:
  std::vector<torch::nn::AnyModule> modules_;
  std::vector<std::string> matrix_names_;  ///< of expert 0, on a rank without experts
};

}  // namespace perseid
