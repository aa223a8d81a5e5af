#include "moe/coupled_neurons.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "kernels/error.h"
#include "kernels/select_atoms.h"
#include "moe/sparse_structure.h"
#include "moe/sparse_unit.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

constexpr const char* kCoupledNeurons = "coupled_neurons";

/// Independent streams of one update.
enum class NeuronDraw : uint64_t { kFirst = 1, kDrop, kGrow, kW1, kW3 };
kernels::RandomKey neuron_stream(kernels::RandomKey key, NeuronDraw draw) {
  return key.with(static_cast<uint64_t>(draw));
}

std::vector<int64_t> places_of(const PackedMask& mask) {
  std::vector<int64_t> result;
  for (int64_t place = 0; place < mask.num_places(); ++place) {
    if (mask.test(place)) result.push_back(place);
  }
  return result;
}

int64_t num_non_finite(const at::Tensor& scores) {
  return scores.isfinite().logical_not().sum().item<int64_t>();
}

/// The k candidates of the largest or smallest scores.
PackedMask select_neurons(const at::Tensor& scores, const PackedMask& candidates, int64_t k,
                          kernels::AtomOrder order, kernels::RandomKey key) {
  PackedMask selected(candidates.rows(), candidates.cols());
  const kernels::AtomCells cells{1, candidates.num_places()};
  kernels::select_atoms(cells, order, scores.const_data_ptr<float>(), candidates.data(), &k, key,
                        selected.data());
  return selected;
}

at::Tensor uniform_rows(int64_t count, const at::Tensor& like, kernels::RandomKey key) {
  const int64_t width = like.size(1);
  const double bound = 1 / std::sqrt(static_cast<double>(width));
  const at::Tensor result = at::empty({count, width}, like.options().device(at::kCPU));
  kernels::fill_uniform(mutable_data_of(result), result.numel(), dtype_of(like, kCoupledNeurons),
                        -bound, bound, key);
  return result;
}

void check_neurons(const at::Tensor& up_proj, const at::Tensor& down_proj, bool gated) {
  require(up_proj.dim() == 3 && down_proj.dim() == 3 && up_proj.size(0) == down_proj.size(0) &&
              up_proj.size(1) == (gated ? 2 : 1) * down_proj.size(2),
          kCoupledNeurons, "up_proj", to_text(up_proj.sizes()),
          "does not go with down_proj=" + to_text(down_proj.sizes()) + "; they are [L, " +
              (gated ? "2F" : "F") + ", D] and [L, d_out, F]");
}

}  // namespace

ExpertWeights expert_weights(const at::Tensor& up_proj, const at::Tensor& down_proj, bool gated,
                             int64_t slot) {
  check_neurons(up_proj, down_proj, gated);
  require(slot >= 0 && slot < up_proj.size(0), kCoupledNeurons, "slot", slot,
          "is outside the " + to_text(up_proj.size(0)) + " experts");
  const int64_t width = down_proj.size(2);
  const at::Tensor up = up_proj.detach().select(0, slot);
  ExpertWeights expert;
  expert.w1 = up.narrow(0, 0, width);
  if (gated) expert.w3 = up.narrow(0, width, width);
  expert.w2 = down_proj.detach().select(0, slot);
  return expert;
}

at::Tensor neuron_scores(const ExpertWeights& expert) {
  at::Tensor squares = expert.w1.detach().to(at::kCPU, at::kDouble).square().sum(1) +
                       expert.w2.detach().to(at::kCPU, at::kDouble).square().sum(0);
  if (expert.w3.defined()) {
    squares = squares + expert.w3.detach().to(at::kCPU, at::kDouble).square().sum(1);
  }
  return squares.sqrt().to(at::kFloat).contiguous();
}

NeuronCandidates draw_neurons(int64_t count, const ExpertWeights& like, kernels::RandomKey key) {
  NeuronCandidates result;
  result.w1 = uniform_rows(count, like.w1, neuron_stream(key, NeuronDraw::kW1));
  if (like.w3.defined())
    result.w3 = uniform_rows(count, like.w3, neuron_stream(key, NeuronDraw::kW3));
  return result;
}

at::Tensor candidate_scores(const NeuronCandidates& candidates, kernels::Activation activation,
                            const at::Tensor& x, const at::Tensor& delta) {
  require(x.dim() == 2 && x.size(1) == candidates.w1.size(1), kCoupledNeurons, "x",
          to_text(x.sizes()), "is not [N, D=" + to_text(candidates.w1.size(1)) + "]");
  require(delta.dim() == 2 && delta.size(0) == x.size(0), kCoupledNeurons, "delta",
          to_text(delta.sizes()), "has not the rows of x, " + to_text(x.size(0)));
  const c10::NoGradGuard no_grad;
  const bool gated = candidates.w3.defined();
  const at::Tensor rows = x.detach().to(at::kCPU).contiguous();
  const int64_t count = candidates.w1.size(0);
  const at::Tensor fresh = gated ? at::cat({candidates.w1, candidates.w3}) : candidates.w1;
  const at::Tensor pre = rows.to(fresh.scalar_type()).mm(fresh.t()).contiguous();
  const at::Tensor hidden = at::empty({rows.size(0), count}, pre.options());
  kernels::activation_forward({rows.size(0), count, activation, gated},
                              dtype_of(pre, kCoupledNeurons), data_of(pre), nullptr,
                              mutable_data_of(hidden));
  const at::ScalarType type = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor gradient =
      delta.detach().to(at::kCPU, type).t().mm(hidden.to(type));  // [d_out, C]
  return gradient.to(at::kDouble).square().sum(0).sqrt().to(at::kFloat).contiguous();
}

NeuronUpdate update_neurons(const ExpertWeights& expert, const PackedMask& active,
                            const NeuronRule& rule, const at::Tensor& x, const at::Tensor& delta,
                            kernels::RandomKey key) {
  const int64_t width = expert.w1.size(0);
  require(active.rows() == 1 && active.cols() == width, kCoupledNeurons, "active",
          to_text(active.rows()) + "x" + to_text(active.cols()),
          "is not one row of F=" + to_text(width));
  require(rule.fraction >= 0 && rule.fraction <= 1, kCoupledNeurons, "fraction", rule.fraction,
          "is outside [0, 1]");
  require(rule.candidates_per_neuron >= 1, kCoupledNeurons, "candidates_per_neuron",
          rule.candidates_per_neuron, "is below 1");
  NeuronUpdate result;
  result.active = active;
  const int64_t num_active = active.count();
  const int64_t num_changed = std::min(
      static_cast<int64_t>(rule.fraction * static_cast<double>(num_active)), width - num_active);
  if (num_changed == 0) return result;
  const c10::NoGradGuard no_grad;
  const at::Tensor drop_scores = neuron_scores(expert);
  const NeuronCandidates candidates =
      draw_neurons(num_changed * rule.candidates_per_neuron, expert, key);
  const at::Tensor grow_scores = candidate_scores(candidates, rule.activation, x, delta);
  result.num_non_finite = num_non_finite(drop_scores) + num_non_finite(grow_scores);
  result.has_no_gradient = grow_scores.gt(0).sum().item<int64_t>() < num_changed;
  if (result.num_non_finite > 0 || result.has_no_gradient) return result;

  const PackedMask dropped =
      select_neurons(drop_scores, active, num_changed, kernels::AtomOrder::kSmallest,
                     neuron_stream(key, NeuronDraw::kDrop));
  const std::vector<int64_t> best = places_of(
      select_neurons(grow_scores, PackedMask::full(1, grow_scores.numel()), num_changed,
                     kernels::AtomOrder::kLargest, neuron_stream(key, NeuronDraw::kGrow)));
  result.dropped = places_of(dropped);
  for (int64_t j = 0; j < width && result.grown.size() < best.size(); ++j) {
    if (!active.test(j)) result.grown.push_back(j);
  }
  for (const int64_t j : result.dropped) {
    expert.w1[j].zero_();
    if (expert.w3.defined()) expert.w3[j].zero_();
    expert.w2.select(1, j).zero_();
    result.active.set(j, false);
  }
  for (size_t i = 0; i < best.size(); ++i) {
    const int64_t j = result.grown[i];
    expert.w1[j].copy_(candidates.w1[best[i]]);
    if (expert.w3.defined()) expert.w3[j].copy_(candidates.w3[best[i]]);
    expert.w2.select(1, j).zero_();
    result.active.set(j, true);
  }
  return result;
}

CompactExperts compact_experts(const at::Tensor& up_proj, const at::Tensor& down_proj, bool gated,
                               const std::vector<PackedMask>& active, int64_t multiple) {
  check_neurons(up_proj, down_proj, gated);
  require(multiple >= 1, kCoupledNeurons, "multiple", multiple, "is below 1");
  require(static_cast<int64_t>(active.size()) == up_proj.size(0), kCoupledNeurons, "active",
          active.size(), "masks are not one for each of " + to_text(up_proj.size(0)) + " experts");
  const int64_t num_experts = up_proj.size(0), width = down_proj.size(2);
  int64_t compact = 0;
  for (const PackedMask& mask : active) compact = std::max(compact, mask.count());
  compact = std::min((compact + multiple - 1) / multiple * multiple, width);
  CompactExperts result;
  result.up_proj =
      at::zeros({num_experts, (gated ? 2 : 1) * compact, up_proj.size(2)}, up_proj.options());
  result.down_proj = at::zeros({num_experts, down_proj.size(1), compact}, down_proj.options());
  result.units = at::full({num_experts, compact}, -1, at::kLong);
  for (int64_t slot = 0; slot < num_experts; ++slot) {
    const std::vector<int64_t> units = places_of(active[static_cast<size_t>(slot)]);
    const auto count = static_cast<int64_t>(units.size());
    const at::Tensor mine = result.units.select(0, slot).narrow(0, 0, count);
    std::copy(units.begin(), units.end(), mine.mutable_data_ptr<int64_t>());
    const at::Tensor places = mine.to(up_proj.device());
    const ExpertWeights from = expert_weights(up_proj, down_proj, gated, slot);
    const ExpertWeights to = expert_weights(result.up_proj, result.down_proj, gated, slot);
    to.w1.narrow(0, 0, count).copy_(from.w1.index_select(0, places));
    if (gated) to.w3.narrow(0, 0, count).copy_(from.w3.index_select(0, places));
    to.w2.narrow(1, 0, count).copy_(from.w2.index_select(1, places));
  }
  return result;
}

CoupledNeurons::CoupledNeurons(const at::Tensor& up_proj, const at::Tensor& down_proj,
                               CoupledNeuronsOptions options)
    : up_proj_(up_proj), down_proj_(down_proj), options_(std::move(options)) {
  check_neurons(up_proj, down_proj, options_.gated);
  const int64_t num_experts = up_proj.size(0), width = down_proj.size(2);
  require(options_.num_active >= 1 && options_.num_active <= width, kCoupledNeurons, "num_active",
          options_.num_active, "is outside [1, F=" + to_text(width) + "]");
  require(static_cast<int64_t>(options_.expert_ids.size()) == num_experts, kCoupledNeurons,
          "expert_ids", options_.expert_ids.size(),
          "are not one for each of " + to_text(num_experts) + " experts");
  const AtomLayout neurons = make_layout(Structure::unstructured(), 1, width, "neurons");
  for (const int64_t id : options_.expert_ids) {
    const UnitKey key{options_.layer_id, id, Matrix::kWeight};
    active_.push_back(random_mask(
        neurons, options_.num_active,
        neuron_stream(draw_key(options_.seed, 0, key, UnitDraw::kFirstMask), NeuronDraw::kFirst)));
  }
  const c10::NoGradGuard no_grad;
  for (int64_t slot = 0; slot < num_experts; ++slot) {
    const auto inactive = [](const PackedMask& positions) {
      const AtomLayout layout =
          make_layout(Structure::unstructured(), positions.rows(), positions.cols(), "neurons");
      return position_mask(layout, positions).logical_not_();
    };
    up_proj_.detach().select(0, slot).masked_fill_(inactive(up_positions(slot)), 0);
    down_proj_.detach().select(0, slot).masked_fill_(inactive(down_positions(slot)), 0);
  }
}

void CoupledNeurons::attach(CompressedStates& optimizer, GrownSecondMoment policy) {
  require(policy != GrownSecondMoment::kGradient, kCoupledNeurons, "second_moment", "gradient",
          "is not known for new rows; choose zero, mean or age");
  for (int64_t slot = 0; slot < up_proj_.size(0); ++slot) {
    const bool keeps_age = policy == GrownSecondMoment::kAge;
    optimizer.compress(up_proj_, slot, up_positions(slot), keeps_age);
    optimizer.compress(down_proj_, slot, down_positions(slot), keeps_age);
  }
  optimizer_ = &optimizer;
  policy_ = policy;
}

void CoupledNeurons::mask_gradients() const {
  const c10::NoGradGuard no_grad;
  for (int64_t slot = 0; slot < up_proj_.size(0); ++slot) {
    const PackedMask& mask = active(slot);
    for (const at::Tensor& parameter : {up_proj_, down_proj_}) {
      if (!parameter.grad().defined()) continue;
      const at::Tensor gradient = parameter.grad().select(0, slot);
      for (int64_t j = 0; j < mask.cols(); ++j) {
        if (mask.test(j)) continue;
        if (parameter.is_same(down_proj_)) {
          gradient.select(1, j).zero_();
        } else {
          for (int64_t row = j; row < gradient.size(0); row += mask.cols()) gradient[row].zero_();
        }
      }
    }
  }
}

NeuronUpdate CoupledNeurons::update(int64_t slot, int64_t step, const at::Tensor& x,
                                    const at::Tensor& delta) {
  const ExpertWeights expert = expert_weights(up_proj_, down_proj_, options_.gated, slot);
  const UnitKey key{options_.layer_id, options_.expert_ids[static_cast<size_t>(slot)],
                    Matrix::kWeight};
  NeuronUpdate result = update_neurons(expert, active(slot), options_.rule, x, delta,
                                       draw_key(options_.seed, step, key, UnitDraw::kFill));
  if (result.num_non_finite > 0) {
    ErrorDetail detail{kCoupledNeurons, "scores of expert " + to_text(key.expert),
                       to_text(result.num_non_finite),
                       "are NaN or infinite; the training has diverged"};
    detail.layer = static_cast<int>(options_.layer_id);
    detail.step = step;
    throw Diverged(detail);
  }
  active_[static_cast<size_t>(slot)] = result.active;
  if (optimizer_ != nullptr && !result.grown.empty()) {
    optimizer_->change_mask(up_proj_, slot, {up_positions(slot), policy_});
    optimizer_->change_mask(down_proj_, slot, {down_positions(slot), policy_});
  }
  return result;
}

const PackedMask& CoupledNeurons::active(int64_t slot) const {
  require(slot >= 0 && slot < static_cast<int64_t>(active_.size()), kCoupledNeurons, "slot", slot,
          "is outside the " + to_text(active_.size()) + " experts");
  return active_[static_cast<size_t>(slot)];
}

PackedMask CoupledNeurons::up_positions(int64_t slot) const {
  const PackedMask& mask = active(slot);
  PackedMask result(up_proj_.size(1), up_proj_.size(2));
  for (int64_t row = 0; row < result.rows(); ++row) {
    if (!mask.test(row % mask.cols())) continue;
    for (int64_t col = 0; col < result.cols(); ++col) result.set(row * result.cols() + col, true);
  }
  return result;
}

PackedMask CoupledNeurons::down_positions(int64_t slot) const {
  const PackedMask& mask = active(slot);
  PackedMask result(down_proj_.size(1), down_proj_.size(2));
  for (int64_t place = 0; place < result.num_places(); ++place) {
    result.set(place, mask.test(place % mask.cols()));
  }
  return result;
}

CompactExperts CoupledNeurons::compact(int64_t multiple) const {
  return compact_experts(up_proj_, down_proj_, options_.gated, active_, multiple);
}

}  // namespace perseid
