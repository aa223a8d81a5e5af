#include "moe/layer_probe.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>

#include "comm/agree.h"
#include "comm/collectives.h"
#include "gates/device.h"
#include "kernels/combine.h"
#include "kernels/error.h"
#include "moe/layer_checks.h"
#include "moe/moe_layer.h"
#include "moe/selection.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

/// Pairs that run at once, so that their copies and hidden values stay small.
constexpr int64_t kPairsAtOnce = 8192;

/// Place of each selected pair among T * E: [A] int64.
at::Tensor places_of(const gates::Routing& routing, int64_t num_experts) {
  const at::Tensor offsets = gates::explicit_offsets(routing);
  // Not an int64_t, which would be a number of repeats.
  const std::optional<int64_t> num_assignments = routing.num_assignments();
  const at::Tensor token = at::repeat_interleave(
      offsets.slice(0, 1).sub(offsets.slice(0, 0, -1)).to(at::kLong), num_assignments);
  return token.mul(num_experts).add(routing.expert_idx);
}

/// The outputs of the selected experts, weighted and added up. @param outputs [T, E, d_out]
at::Tensor mix(const at::Tensor& outputs, const Selection& selection) {
  const int64_t T = outputs.size(0), E = outputs.size(1), width = outputs.size(2);
  const int64_t G = selection.weights.size(1);
  const gates::Routing& routing = selection.routing;
  const at::Tensor offsets = gates::explicit_offsets(routing).contiguous();
  const at::Tensor row = places_of(routing, E).to(at::kInt);
  const at::Tensor weights = selection.weights.detach().to(weight_type(outputs)).contiguous();
  at::Tensor mixed = at::empty({T, G * width}, outputs.options());
  kernels::combine(outputs.const_data_ptr(), {int32_data(offsets), 0, int32_data(row)},
                   weights.const_data_ptr(), G, mixed.mutable_data_ptr(), T, width,
                   dtype_of(outputs, kMoELayer), gates::stream_of(outputs, kMoELayer));
  return mixed;
}

}  // namespace

void MoELayer::run_pairs(const at::Tensor& tokens, const at::Tensor& places, KeptOutputs& kept,
                         comm::CallSite site) {
  const int64_t E = placement_.num_experts();
  // As many pieces on each rank.
  int64_t longest = places.numel();
  comm::all_reduce(&longest, 1, comm::ReduceOp::kMax, groups_.world, site);
  const at::Tensor rows = kept.rows.view({-1, experts_->d_out()});
  for (int64_t first = 0; first < longest; first += kPairsAtOnce) {
    const int64_t begin = std::min(first, places.numel());
    const int64_t count = std::min(places.numel() - begin, kPairsAtOnce);
    const at::Tensor piece = places.narrow(0, begin, count);
    // A copy of the token for each pair: count tokens with one expert each.
    Selection pairs;
    pairs.routing.num_tokens = count;
    pairs.routing.top_k = 1;
    pairs.routing.expert_idx = piece.remainder(E).to(at::kInt);
    pairs.routing.weights = at::ones({count}, tokens.options().dtype(weight_type(tokens)));
    pairs.weights = pairs.routing.weights.unsqueeze(1);
    const at::Tensor copies = tokens.index_select(0, piece.div(E, "floor"));
    rows.index_copy_(0, piece, run_experts(copies, pairs, nullptr, site));
  }
  kept.is_known.view({-1}).index_fill_(0, places, true);
}

KeptOutputs MoELayer::probe_every_expert(const at::Tensor& tokens, comm::CallSite site) {
  const int64_t T = tokens.size(0), E = placement_.num_experts();
  const comm::Group& world = groups_.world;
  KeptOutputs kept;
  comm::agree(world, site, [&] {
    const double bytes = static_cast<double>(T) * static_cast<double>(E * experts_->d_out()) *
                         static_cast<double>(tokens.element_size());
    require(bytes <= static_cast<double>(probe_->max_bytes), kMoELayer, "probe.bytes", bytes,
            "of outputs of all experts exceed max_bytes=" + to_text(probe_->max_bytes) +
                "; use fewer held tokens, a higher limit, or probe=selected");
    kept.rows = at::empty({T, E, experts_->d_out()}, tokens.options());
    kept.is_known = at::zeros({T, E}, tokens.options().dtype(at::kBool));
  });
  // Every n-th token by its number among those of all ranks, so that their count does not matter.
  std::vector<int64_t> counts(static_cast<size_t>(world.size()));
  comm::all_gather(&T, sizeof(T), counts.data(), world, site);
  const auto mine = counts.begin() + world.rank();
  const int64_t before = std::accumulate(counts.begin(), mine, int64_t{0});
  const int64_t total = std::accumulate(mine, counts.end(), before);
  const int64_t stride =
      std::max<int64_t>((total + probe_->max_tokens - 1) / probe_->max_tokens, 1);
  const at::TensorOptions integers = tokens.options().dtype(at::kLong);
  const int64_t first = (stride - before % stride) % stride;
  kept.probed = at::arange(std::min(first, T), T, stride, integers);
  kept.share =
      total == 0 ? 1
                 : static_cast<double>((total + stride - 1) / stride) / static_cast<double>(total);
  run_pairs(tokens, kept.probed.mul(E).unsqueeze(1).add(at::arange(E, integers)).flatten(), kept,
            site);
  return kept;
}

at::Tensor MoELayer::run_probed(const at::Tensor& tokens, const Selection& selection,
                                at::Tensor* shared_output, comm::CallSite site) {
  LayerProbe& probe = *probe_;
  ++probe.num_forwards;
  if (probe.clock) probe.last_forward = ++*probe.clock;
  const bool keeps_outputs = probe.replay || probe.collect;
  if (keeps_outputs) {
    const at::NoGradGuard no_grad;
    probe.kept.resize(std::max(probe.kept.size(), probe.batch + 1));
    KeptOutputs& kept = probe.kept[probe.batch];
    if (!kept.rows.defined()) kept = probe_every_expert(tokens.detach(), site);
    if (probe.replay && kept.share < 1) {
      const at::Tensor places = places_of(selection.routing, placement_.num_experts());
      const at::Tensor is_known = kept.is_known.view({-1}).index_select(0, places);
      run_pairs(tokens.detach(), places.masked_select(is_known.logical_not()), kept, site);
    }
  }
  at::Tensor mixed;
  if (probe.replay) {
    comm::agree(groups_.world, site, [&] {
      mixed = mix(probe.kept[probe.batch].rows, selection);
      *shared_output = run_shared(tokens);
    });
  } else if (probe.record && !keeps_outputs) {
    Selection watched = selection;
    probe.pairs = selection.routing;
    probe.delta = at::zeros_like(selection.weights).requires_grad_();
    watched.weights = selection.weights + probe.delta;
    return run_experts(tokens, watched, shared_output, site);
  } else {
    mixed = run_experts(tokens, selection, shared_output, site);
  }
  if (!probe.record) return mixed;
  probe.delta = at::zeros_like(mixed).requires_grad_();
  return mixed + probe.delta;
}

}  // namespace perseid
