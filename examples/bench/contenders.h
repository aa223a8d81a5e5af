#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "examples/bench/layer_problem.h"
#include "examples/bench/place.h"
#include "moe/grouped_mlp.h"
#include "moe/moe_layer.h"

namespace perseid::bench {

/// What one forward and backward leaves behind.
struct Outcome {
  at::Tensor out;
  std::vector<at::Tensor> grads;  ///< each contender names its own
};

/// Forward and backward of one case, ready to be run again and again. Where there are several
/// problems, each run takes the next one.
class Contender {
 public:
  explicit Contender(std::string name) : name_(std::move(name)) {}
  virtual ~Contender() = default;
  virtual Outcome run() = 0;
  const std::string& name() const { return name_; }

 private:
  std::string name_;
};

/// The layer of this library, its gate and load-balance loss included, where its tokens are.
/// Gradients: tokens, up_proj, down_proj, router.
class LayerContender : public Contender {
 public:
  /// @param problems  draws of one case
  explicit LayerContender(const std::vector<LayerProblem>& problems);
  Outcome run() override;
  const GroupedMLP& experts() const { return *experts_; }
  const gates::GateStats& last_stats() const { return stats_.gates.front(); }

 private:
  std::shared_ptr<GroupedMLP> experts_;
  at::Tensor router_;
  std::shared_ptr<MoELayer> layer_;
  std::vector<at::Tensor> tokens_;  ///< [problem]
  std::vector<at::Tensor> grad_outs_;
  size_t turn_ = 0;
  MoEStats stats_;
};

/// A chain of equal FLOPs with one expert for all A = T*K rows: at::mm and the library's own fused
/// activation, all outputs allocated before. No gate, no order of rows, no routing weights.
/// Gradients: rows, up, down.
class DenseContender : public Contender {
 public:
  DenseContender(const LayerCase& shape, const Place& place);
  Outcome run() override;
  const at::Tensor& rows() const { return rows_; }
  const at::Tensor& up() const { return up_; }
  const at::Tensor& down() const { return down_; }
  const at::Tensor& grad_out() const { return grad_out_; }

 private:
  LayerCase shape_;
  kernels::Stream stream_;
  at::Tensor rows_, up_, down_, grad_out_;                            // inputs
  at::Tensor pre_, act_, out_;                                        // forward
  at::Tensor grad_act_, grad_pre_, grad_rows_, grad_up_, grad_down_;  // backward
};

/// What the two peers start from: they are given the routing and do not pay for a gate. Parameters
/// of several inputs are the same tensors.
struct PeerInput {
  at::Tensor tokens;      ///< [T, D]
  at::Tensor expert_idx;  ///< [T, K] int64
  at::Tensor weights;     ///< [T*K] in the type of the tokens
  at::Tensor up;          ///< [E, 2F, D] gate rows first
  at::Tensor down;        ///< [E, D, F]
  at::Tensor grad_out;    ///< [T, D] gradient of the output
};
using PeerForward = at::Tensor (*)(const PeerInput& input);

/// One expert after the other: index_select, mm, silu, mul, mm, mul, index_add_.
at::Tensor loop_forward(const PeerInput& input);
/// Rows sorted by expert, at::_grouped_mm for all experts at once, index_add.
at::Tensor grouped_mm_forward(const PeerInput& input);

/// A forward of LibTorch operations with the backward of its autograd.
/// Gradients: tokens, up, down, weights.
class PeerContender : public Contender {
 public:
  PeerContender(std::string name, PeerForward forward, const std::vector<PeerInput>& inputs);
  Outcome run() override;

 private:
  PeerForward forward_;
  std::vector<PeerInput> inputs_;
  size_t turn_ = 0;
};

/// A top-k gate of LibTorch operations, for the comparison of results: [T*K] softmax over the
/// selected logits (one: over all), and the load-balance loss.
struct PlainGateOutput {
  at::Tensor weights;
  at::Tensor loss;
};
PlainGateOutput plain_gate(const at::Tensor& tokens, const at::Tensor& router,
                           const at::Tensor& expert_idx, double aux_loss_coeff);

}  // namespace perseid::bench
