// Every error a user of the gates can reach: type and text, with operation, argument, value, limit.
#include <c10/util/Exception.h>

#include <cmath>
#include <functional>

#include "gates/baseline_gates.h"
#include "gates/hash_gate.h"
#include "tests/gates/gate_test.h"

namespace perseid::testing {
namespace {

struct Case {
  std::function<void()> call;
  const char* text;
};

void expect_errors(const std::vector<Case>& cases) {
  for (const Case& item : cases) EXPECT_EQ(error_text<ConfigError>(item.call), item.text);
}

Case option(const std::function<void(TopKGateOptions&)>& change, const char* text) {
  return {[change] {
            TopKGateOptions options(4, 8);
            change(options);
            TopKGate gate(options);
          },
          text};
}

Case input(const std::function<void(GateInput&)>& change, const char* text) {
  return {[change] {
            TopKGate gate(TopKGateOptions(4, 8));
            GateInput given = input_of(at::zeros({3, 4}));
            change(given);
            gate.forward(given);
          },
          text};
}

TEST(GateErrors, Options) {
  expect_errors({
      option([](auto& o) { o.top_k(9); },
             "[top_k_gate] top_k=9 exceeds num_experts=8; choose top_k in [1, 8]"),
      option([](auto& o) { o.top_k(0); },
             "[top_k_gate] top_k=0 is below 1; choose top_k in [1, 8]"),
      option([](auto& o) { o.num_experts(0); },
             "[top_k_gate] num_experts=0 is below 1; a gate needs an expert"),
      option([](auto& o) { o.num_experts(int64_t{1} << 31); },
             "[top_k_gate] num_experts=2147483648 exceeds 2147483647"),
      option([](auto& o) { o.d_model(0); },
             "[top_k_gate] d_model=0 is below 1; give the width of the tokens"),
      option([](auto& o) { o.route_scale(0); },
             "[top_k_gate] route_scale=0 is not a finite number above 0; choose 1 for weights that "
             "are not scaled"),
      option([](auto& o) { o.route_scale(NAN); },
             "[top_k_gate] route_scale=nan is not a finite number above 0; choose 1 for weights "
             "that are not scaled"),
      option([](auto& o) { o.aux_loss_coeff(-1); },
             "[top_k_gate] aux_loss_coeff=-1 is not a finite number from 0 on; choose 0 to switch "
             "the loss off"),
      option([](auto& o) { o.aux_loss_coeff(NAN); },
             "[top_k_gate] aux_loss_coeff=nan is not a finite number from 0 on; choose 0 to switch "
             "the loss off"),
      option([](auto& o) { o.z_loss_coeff(INFINITY); },
             "[top_k_gate] z_loss_coeff=inf is not a finite number from 0 on; choose 0 to switch "
             "the loss off"),
      option([](auto& o) { o.balance_coeff(-2); },
             "[top_k_gate] balance_coeff=-2 is not a finite number from 0 on; choose 0 to switch "
             "the loss off"),
      option(
          [](auto& o) { o.bias_update_rate(NAN); },
          "[top_k_gate] bias_update_rate=nan is not a finite number from 0 on; choose 0 to route "
          "without expert_bias"),
      option([](auto& o) { o.jitter_eps(1); },
             "[top_k_gate] jitter_eps=1 is outside [0, 1); choose 0 to switch jitter off"),
      option([](auto& o) { o.num_groups(3); },
             "[top_k_gate] num_groups=3 does not divide num_experts=8 into equal groups"),
      option([](auto& o) { o.num_groups(4).topk_groups(5); },
             "[top_k_gate] topk_groups=5 is outside [1, num_groups=4]"),
      option([](auto& o) { o.top_k(5).num_groups(4).topk_groups(2); },
             "[top_k_gate] top_k=5 exceeds the 4 experts of topk_groups=2 groups; use more groups"),
      option([](auto& o) { o.num_groups(8).topk_groups(2).bias_update_rate(1e-3); },
             "[top_k_gate] num_groups=8 leaves 1 expert in a group, but the two best rank it; "
             "choose at most 4"),
  });
}

TEST(GateErrors, Input) {
  expect_errors({
      input([](auto& i) { i.tokens = Tensor(); },
            "[top_k_gate] tokens=undefined is not a floating [T, D] tensor"),
      input([](auto& i) { i.tokens = at::zeros({3}); },
            "[top_k_gate] tokens=Float[3] is not a floating [T, D] tensor"),
      input(
          [](auto& i) {
            i.tokens = at::zeros({3, 4}, at::kInt);
          },
          "[top_k_gate] tokens=Int[3, 4] is not a floating [T, D] tensor"),
      input(
          [](auto& i) {
            i.tokens = at::zeros({3, 5});
          },
          "[top_k_gate] tokens=Float[3, 5] has another width than d_model=4"),
      input([](auto& i) { i.valid = at::ones({2}, at::kBool); },
            "[top_k_gate] valid=Bool[2] is not Bool[3], one entry for each token"),
      input([](auto& i) { i.valid = at::ones({3}); },
            "[top_k_gate] valid=Float[3] is not Bool[3], one entry for each token"),
      input([](auto& i) { i.valid = Tensor(); },
            "[top_k_gate] valid=undefined is not Bool[3], one entry for each token"),
      input([](auto& i) { i.keys = at::ones({3}, at::kInt); },
            "[top_k_gate] keys=Int[3] is not Long[3], one entry for each token"),
      input(
          [](auto& i) {
            i.sequence = at::ones({3, 1}, at::kLong);
          },
          "[top_k_gate] sequence=Long[3, 1] is not Long[3], one entry for each token"),
      input([](auto& i) { i.tokens_global = -1; },
            "[top_k_gate] tokens_global=-1 is negative; give the valid tokens of all ranks, or 0 "
            "for those of this call"),
      input([](auto& i) { i.progress = NAN; },
            "[top_k_gate] progress=nan is not a number; give the finished share of the training, "
            "in [0, 1]"),
      input([](auto& i) { i.tokens = i.tokens.to(at::kMeta); },
            "[top_k_gate] tokens.device=meta differs from weight.device=cpu"),
      {[] {
         TopKGate gate(TopKGateOptions(4, 8));
         gate.weight = at::zeros({8, 4}, at::kMeta);
         gate.forward(input_of(at::zeros({3, 4}, at::kMeta)));
       },
       "[top_k_gate] device=meta has no router kernel; move the gate and its input to the CPU"},
  });
}

TEST(GateErrors, TopKState) {
  expect_errors({
      {[] {
         TopKGate(TopKGateOptions(4, 8).aux_scope(gates::AuxScope::kSequence))
             .forward(input_of(at::zeros({3, 4})));
       },
       "[top_k_gate] sequence=none is needed with aux_scope=sequence; give the int64 sequence "
       "number of each token"},
      {[] { TopKGate(TopKGateOptions(4, 8).bias_update_rate(1)).after_step({}); },
       "[top_k_gate] tokens_per_expert=undefined is not [num_experts=8]; pass statistics of this "
       "gate"},
      {[] {
         gates::sequence_balance_loss(at::zeros({2, 4}), at::zeros({2, 1}, at::kInt),
                                      at::zeros({2}, at::kLong), 1, true, -1);
       },
       "[sequence_balance_loss] tokens_global=-1 is negative"},
  });
}

TEST(GateErrors, FixedGates) {
  using gates::HashGate;
  using gates::HashGateOptions;
  const auto forward = [](const GateInput& given) { HashGate(HashGateOptions(8)).forward(given); };
  const auto table = [](const Tensor& values) {
    HashGate(HashGateOptions(8).mode(gates::HashMode::kTable).table(values));
  };
  expect_errors({
      {[&] {
         forward(input_of(at::zeros({3, 4})));
       },
       "[hash_gate] keys=none are needed: features are never hashed; give an int64 key for each "
       "token"},
      {[&] {
         GateInput given = input_of(at::zeros({3, 4}));
         given.keys = at::zeros({3});
         forward(given);
       },
       "[hash_gate] keys=Float[3] is not Long[3], one entry for each token"},
      {[&] {
         GateInput given = input_of(at::zeros({3, 4}));
         given.keys = at::zeros({4}, at::kLong);
         forward(given);
       },
       "[hash_gate] keys=Long[4] is not Long[3], one entry for each token"},
      {[&] { table({}); },
       "[hash_gate] table=undefined is needed with mode=table; give the expert of each key"},
      {[&] { table(at::zeros({0}, at::kLong)); },
       "[hash_gate] table=Long[0] is not an integer [V] tensor with V >= 1"},
      {[&] { table(at::zeros({3})); },
       "[hash_gate] table=Float[3] is not an integer [V] tensor with V >= 1"},
      {[&] {
         table(at::tensor({0, 9, 1}, at::kLong));
       },
       "[hash_gate] table[1]=9 is outside [0, num_experts=8)"},
      {[&] {
         table(at::tensor({0, 7, -1}, at::kLong));
       },
       "[hash_gate] table[2]=-1 is outside [0, num_experts=8)"},
      {[] { HashGate(HashGateOptions(8).table(at::zeros({3}, at::kLong))); },
       "[hash_gate] table=1 is given, but mode=random does not read it; choose mode=table"},
      {[] { HashGate(HashGateOptions(8).num_hashes(0)); },
       "[hash_gate] num_hashes=0 is outside [1, num_experts=8]: the experts of a token are "
       "distinct"},
      {[] { HashGate(HashGateOptions(8).num_hashes(9)); },
       "[hash_gate] num_hashes=9 is outside [1, num_experts=8]: the experts of a token are "
       "distinct"},
      {[] { HashGate(HashGateOptions(0)); },
       "[hash_gate] num_experts=0 is below 1; a gate needs an expert"},
      {[] { gates::SingleGate(5, 5); }, "[single_gate] expert=5 is outside [0, num_experts=5)"},
      {[] { gates::SingleGate(5, -1); }, "[single_gate] expert=-1 is outside [0, num_experts=5)"},
      {[] { gates::DenseGate(TopKGateOptions(4, 0)); },
       "[dense_gate] num_experts=0 is below 1; a gate needs an expert"},
  });
}

TEST(GateErrors, RoutingsAndLosses) {
  const Tensor experts = at::tensor({0, 1, 2, 3}, at::kLong).view({2, 2});
  const Tensor weights = at::ones({2, 2});
  const Routing routing = gates::routing_from_table(experts, weights, 4);
  gates::BalanceTerms terms;
  expect_errors({
      {[&] { gates::routing_from_table(weights, weights, 4); },
       "[routing_from_table] expert_idx=Float[2, 2] is not an integer [T, K] table"},
      {[&] { gates::routing_from_table(experts, weights[0], 4); },
       "[routing_from_table] weights=Float[2] is not a floating table of the shape of "
       "expert_idx=Long[2, 2]"},
      {[&] { gates::routing_from_table(experts, weights, 1); },
       "[routing_from_table] expert_idx=Long[2, 2] has K outside [1, num_experts=1]"},
      {[&] { gates::routing_from_table(experts, weights, 3); },
       "[routing_from_table] expert_idx=3 is outside [0, num_experts=3)"},
      {[&] { gates::routing_from_table(experts - 1, weights, 4); },
       "[routing_from_table] expert_idx=-1 is outside [0, num_experts=4)"},
      {[&] { gates::routing_from_table(experts * 0, weights, 4); },
       "[routing_from_table] expert_idx=Long[2, 2] has an expert twice in a row; merge the two by "
       "adding weights"},
      {[&] { gates::routing_from_dense(experts); },
       "[routing_from_dense] weights=Long[2, 2] is not a floating [T, E] table"},
      {[&] { gates::without_invalid(routing, at::ones({3}, at::kBool)); },
       "[without_invalid] valid=Bool[3] is not bool[num_tokens=2]"},
      {[&] { gates::load_balance_loss(terms, at::zeros({4}, at::kLong), 2); },
       "[load_balance_loss] score_sum=undefined is not [num_experts]; call it for gates that fill "
       "their balance terms"},
      {[&] {
         terms.score_sum = at::zeros({4});
         gates::load_balance_loss(terms, at::zeros({5}, at::kLong), 2);
       },
       "[load_balance_loss] global_tokens_per_expert=[5] differs from score_sum=[4]; sum the "
       "tokens_per_expert of the same gate over ranks"},
      {[&] { gates::load_balance_loss(terms, at::zeros({4}, at::kLong), -2); },
       "[load_balance_loss] tokens_global=-2 is negative"},
      {[&] {
         terms.top_k = 0;
         gates::load_balance_loss(terms, at::zeros({4}, at::kLong), 2);
       },
       "[load_balance_loss] top_k=0 is below 1"},
      {[&] { gates::z_loss(at::zeros({2}), 1, 2); }, "[z_loss] lse_square_sum=[2] is not a scalar"},
      {[&] { gates::z_loss(at::zeros({}), 1, -2); }, "[z_loss] tokens_global=-2 is negative"},
  });
}

struct Warnings : c10::WarningHandler {
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
  std::vector<std::string> texts;
};

TEST(GateErrors, WarnsOfConstantWeights) {
  Warnings warnings;
  c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  const bool always = c10::WarningUtils::get_warnAlways();
  c10::WarningUtils::set_warnAlways(true);  // another test may have used up the one warning
  TopKGate(TopKGateOptions(4, 8).top_k(1));
  TopKGate(TopKGateOptions(4, 8).top_k(1).normalization(Normalization::kAll));
  TopKGate(TopKGateOptions(4, 8).top_k(2).normalization(Normalization::kSelected));
  EXPECT_TRUE(warnings.texts.empty());
  TopKGate(TopKGateOptions(4, 8).top_k(1).normalization(Normalization::kSelected));
  c10::WarningUtils::set_warnAlways(always);
  ASSERT_EQ(warnings.texts.size(), 1u);
  EXPECT_NE(warnings.texts[0].find("[top_k_gate] top_k=1 with normalization=selected"),
            std::string::npos);
}

}  // namespace
}  // namespace perseid::testing
