#pragma once
#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "moe/placement.h"
#include "moe/routing_plan.h"

namespace perseid {

struct RowCounts;
struct SparseUnit;

/// The experts of one rank. Parameters belong to this rank unless they are replicated(): a trainer
/// must not sum their gradients over ranks that hold other experts (moe/gradients.h does it right).
class Experts : public torch::nn::Module {
 public:
  /// @param name        operation that errors name
  /// @param expert_ids  ascending global ids; may be empty
  Experts(std::string name, std::vector<int64_t> expert_ids, int64_t d_in, int64_t d_out);

  /// out[n, g, :] = sum over the assignments a of row n, in order, of
  ///                weights[a, g] * f_expert(a)(rows[n])
  /// @param rows     [N, d_in]
  /// @param weights  [R, G] float32 (float64 for float64 rows), differentiable; each selected
  ///                 expert runs once per row whatever G is
  /// @param plan     plan->local is used
  /// @return [N, G * d_out]; rows without assignment are 0, and experts without rows get gradient 0
  virtual at::Tensor forward(const at::Tensor& rows, const at::Tensor& weights,
                             const std::shared_ptr<const RoutingPlan>& plan) = 0;

  const std::vector<int64_t>& expert_ids() const { return expert_ids_; }  ///< global ids, by slot
  int64_t num_local_experts() const { return static_cast<int64_t>(expert_ids_.size()); }
  int64_t d_in() const { return d_in_; }
  int64_t d_out() const { return d_out_; }

  /// The matrices that a Sparsifier can keep sparse (include moe/sparsifier.h), with the names
  /// "layer<layer>.expert<id>.<matrix>", "layer<layer>.shared<id>.<matrix>" if replicated(). Their
  /// gradients are those of the parameters, and rows are counted. Throws ConfigError for experts
  /// without such matrices and for a pattern that no matrix of theirs fits, on every rank: one
  /// without experts knows their names (matrix_names).
  /// @param layer    tells the layers of a model apart
  /// @param pattern  of the names of matrices, * stands for any text
  std::vector<SparseUnit> sparse_units(int64_t layer, const std::string& pattern = "*") const;

  /// True: every rank holds the same experts (shared experts of a layer), so their parameters count
  /// as dense and their gradients are summed over all ranks. Set before training.
  bool replicated() const { return replicated_; }
  void set_replicated(bool replicated) { replicated_ = replicated; }

 protected:
  /// Throws ConfigError unless rows and weights have the shapes and types of forward and fit plan.
  void require_inputs(const at::Tensor& rows, const at::Tensor& weights,
                      const std::shared_ptr<const RoutingPlan>& plan) const;

  /// For sparse_units, without names of layers and experts: name is that of the matrix, key.expert
  /// the global id, key.matrix and the place in its parameter are set. By default none. Experts
  /// that have any must call row_counts()->add(plan->local) once in each backward.
  virtual std::vector<SparseUnit> matrices() const;
  /// Names of the matrices of one expert, from what every rank knows, so that a rank without
  /// experts refuses a pattern as the others do. By default those of the first expert here; without
  /// one there are none, and every pattern is taken.
  virtual std::vector<std::string> matrix_names() const;
  const std::shared_ptr<RowCounts>& row_counts() const { return row_counts_; }

 private:
  std::vector<int64_t> expert_ids_;
  int64_t d_in_;
  int64_t d_out_;
  bool replicated_ = false;
  std::shared_ptr<RowCounts> row_counts_;
};

}  // namespace perseid
