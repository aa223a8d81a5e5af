#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <ostream>
#include <vector>

#include "gates/baseline_gates.h"
#include "gates/comet_gate.h"
#include "gates/dselect_k_gate.h"
#include "gates/gshard_gate.h"
#include "gates/hash_gate.h"
#include "gates/noisy_top_k_gate.h"
#include "gates/remoe_gate.h"
#include "gates/statistical_top_k_gate.h"
#include "gates/top_k_gate.h"
#include "tests/closed_form.h"
#include "tests/moe/layer_fixture.h"

// The gates that gate_conformance_test.cpp runs through a layer. To add one, add a line to
// conforming_gates().

namespace perseid::testing {

/// What a gate is asked for. Gates that choose the number of experts themselves do not read top_k.
struct GateSizes {
  int64_t num_experts = 6;
  int64_t top_k = 2;
  int64_t gate_id = 0;
};

struct ConformingGate {
  const char* name;
  std::function<std::shared_ptr<gates::Gate>(const GateSizes&)> make;  ///< float64, width kDModel
};

inline void PrintTo(const ConformingGate& gate, std::ostream* out) { *out << gate.name; }

/// A float64 gate whose parameters are random numbers in [-scale, scale).
template <typename GateType, typename Options>
std::shared_ptr<gates::Gate> random_gate(const Options& options, double scale = 1) {
  const auto gate = std::make_shared<GateType>(options);
  gate->to(at::kDouble);
  uint64_t seed = 40 + static_cast<uint64_t>(gate->num_experts());
  for (const at::Tensor& parameter : gate->parameters()) {
    parameter.set_data(random_tensor(parameter.sizes(), seed++, -scale, scale));
  }
  return gate;
}

inline gates::TopKGateOptions top_k_options(const GateSizes& sizes) {
  return gates::TopKGateOptions(kDModel, sizes.num_experts)
      .top_k(sizes.top_k)
      .gate_id(sizes.gate_id);
}

/// Three groups, as many used as K needs and one more if there is one.
inline gates::TopKGateOptions group_options(const GateSizes& sizes) {
  if (sizes.num_experts % 3 != 0) return top_k_options(sizes);
  const int64_t width = sizes.num_experts / 3;
  return top_k_options(sizes).num_groups(3).topk_groups(
      std::min<int64_t>(3, sizes.top_k / width + 1));
}

inline gates::CometGateOptions comet_options(const GateSizes& sizes) {
  return gates::CometGateOptions(kDModel, sizes.num_experts)
      .top_k(sizes.top_k)
      .balance_coeff(.2)
      .gate_id(sizes.gate_id);
}

/// A selection bias that changes what the scores alone would choose.
inline std::shared_ptr<gates::Gate> biased_gate(const GateSizes& sizes) {
  auto gate = random_gate<gates::TopKGate>(
      top_k_options(sizes).score_function(kernels::ScoreFunction::kSigmoid).bias_update_rate(1e-3));
  auto& bias = dynamic_cast<gates::TopKGate&>(*gate).expert_bias;
  bias.copy_(random_tensor(bias.sizes(), 8, -.3, .3, at::kFloat));
  return gate;
}

template <typename GateType, typename MakeOptions>
ConformingGate gate_of(const char* name, MakeOptions options) {
  return {name, [options](const GateSizes& s) { return random_gate<GateType>(options(s)); }};
}

inline const std::vector<ConformingGate>& conforming_gates() {
  using namespace gates;
  using kernels::ScoreFunction;
  using S = const GateSizes&;
  constexpr auto all = Normalization::kAll;
  constexpr auto layer_norm = InputNorm::kLayerNorm;
  constexpr auto sigmoid = ScoreFunction::kSigmoid;
  constexpr auto softplus = ScoreFunction::kSqrtSoftplus;
  constexpr auto fixed = RouterNoise::kFixed;
  const auto& top_k = top_k_options;
  const auto& comet = comet_options;
  const auto noisy = [](S s) {
    return NoisyTopKGateOptions(kDModel, s.num_experts).top_k(s.top_k);
  };
  const auto gshard = [](S s) { return GShardGateOptions(kDModel, s.num_experts); };
  const auto remoe = [](S s) {
    return ReMoEGateOptions(kDModel, s.num_experts).top_k(s.top_k).l1_coeff_start(.1);
  };
  const auto dselect = [](S s) {
    return DSelectKGateOptions(kDModel, s.num_experts).top_k(s.top_k).balance_coeff(.2);
  };
  const auto statistical = [](S s) {  // K is an average below E
    const int64_t K = std::max<int64_t>(1, std::min(s.top_k, s.num_experts - 1));
    return StatisticalTopKGateOptions(kDModel, s.num_experts).top_k(K);
  };
  static const std::vector<ConformingGate> list = {
      gate_of<TopKGate>("top_k_softmax", [=](S s) { return top_k(s).z_loss_coeff(.1); }),
      gate_of<TopKGate>("top_k_all", [=](S s) { return top_k(s).normalization(all).bias(true); }),
      gate_of<TopKGate>("top_k_sigmoid", [=](S s) { return top_k(s).score_function(sigmoid); }),
      gate_of<TopKGate>("top_k_softplus", [=](S s) { return top_k(s).score_function(softplus); }),
      gate_of<TopKGate>("top_k_scaled", [=](S s) { return top_k(s).route_scale(2); }),
      gate_of<TopKGate>("top_k_jitter", [=](S s) { return top_k(s).jitter_eps(.1); }),
      gate_of<TopKGate>("top_k_balance", [=](S s) { return top_k(s).balance_coeff(.3); }),
      gate_of<TopKGate>("top_k_layer_norm", [=](S s) { return top_k(s).input_norm(layer_norm); }),
      gate_of<TopKGate>("top_k_groups", group_options),
      {"top_k_expert_bias", biased_gate},
      gate_of<NoisyTopKGate>("noisy_top_k", noisy),
      gate_of<NoisyTopKGate>("v_moe", [=](S s) { return noisy(s).noise(fixed); }),
      gate_of<GShardGate>("gshard", [=](S s) { return gshard(s).z_loss_coeff(.1); }),
      gate_of<GShardGate>("gshard_gumbel", [=](S s) { return gshard(s).gumbel_second(true); }),
      gate_of<GShardGate>("gshard_rest", [=](S s) { return gshard(s).normalize_after_drop(true); }),
      gate_of<ReMoEGate>("remoe", remoe),
      gate_of<ReMoEGate>("remoe_l1", [=](S s) { return remoe(s).l1_balance(false); }),
      gate_of<CometGate>("comet", comet),
      gate_of<CometGate>("comet_open", [=](S s) { return comet(s).gamma(50); }),
      gate_of<CometGate>("comet_min_weight", [=](S s) { return comet(s).min_weight(.03); }),
      gate_of<CometGate>("comet_hard_eval", [=](S s) { return comet(s).hard_eval(true); }),
      gate_of<CometGate>("comet_static", [=](S s) { return comet(s).per_token(false); }),
      gate_of<DSelectKGate>("dselect_k", dselect),
      gate_of<DSelectKGate>("dselect_k_renorm", [=](S s) { return dselect(s).renormalize(true); }),
      gate_of<DSelectKGate>("dselect_k_hard_eval", [=](S s) { return dselect(s).hard_eval(true); }),
      gate_of<DSelectKGate>("dselect_k_static", [=](S s) { return dselect(s).per_token(false); }),
      gate_of<StatisticalTopKGate>("statistical_top_k", statistical),
      gate_of<StatisticalTopKGate>("statistical_cap", [=](S s) { return statistical(s).cap(2); }),
      gate_of<HashGate>(
          "hash_2",
          [](S s) {
            return HashGateOptions(s.num_experts).num_hashes(std::min<int64_t>(2, s.num_experts));
          }),
      gate_of<HashGate>("hash", [](S s) { return HashGateOptions(s.num_experts); }),
      gate_of<DenseGate>("dense", top_k),
      {"single",
       [](S s) { return std::make_shared<SingleGate>(s.num_experts, s.num_experts - 1); }},
  };
  return list;
}

}  // namespace perseid::testing
