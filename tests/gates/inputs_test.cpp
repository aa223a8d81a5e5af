// Every field that a gate, a routing or a loss is given, made wrong: an error with operation,
// argument, value, limit.
//   Fields        each field of GateInput, for every gate
//   NaN, halves   are no error of a gate: they are counted, or computed in float32
//   Parameters    of another shape, as a checkpoint of another layer leaves them
//   State, Keys   what after_step is given; keys of a hash gate
//   Routings, Losses, Schedules
#include <cmath>
#include <limits>

#include "gates/baseline_gates.h"
#include "gates/comet_gate.h"
#include "gates/gshard_gate.h"
#include "gates/hash_gate.h"
#include "gates/noisy_top_k_gate.h"
#include "gates/remoe_gate.h"
#include "gates/schedule.h"
#include "tests/gates/gate_test.h"
#include "tests/refused.h"

namespace perseid::testing {
namespace {

using namespace gates;

constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
at::TensorOptions meta(at::ScalarType type) { return at::TensorOptions(type).device(at::kMeta); }

struct Named {
  const char* operation;
  std::shared_ptr<Gate> gate;
  bool has_router = true;
};

/// Every gate, for tokens of width 4 and 8 experts.
std::vector<Named> all_gates() {
  return {
      {"top_k_gate", std::make_shared<TopKGate>(TopKGateOptions(4, 8))},
      {"noisy_top_k_gate", std::make_shared<NoisyTopKGate>(NoisyTopKGateOptions(4, 8))},
      {"gshard_gate", std::make_shared<GShardGate>(GShardGateOptions(4, 8))},
      {"remoe_gate", std::make_shared<ReMoEGate>(ReMoEGateOptions(4, 8))},
      {"comet_gate", std::make_shared<CometGate>(CometGateOptions(4, 8))},
      {"comet_gate", std::make_shared<CometGate>(CometGateOptions(4, 8).per_token(false))},
      {"top_k_gate", std::make_shared<DenseGate>(TopKGateOptions(4, 8))},
      {"hash_gate", std::make_shared<HashGate>(HashGateOptions(8)), false},
      {"single_gate", std::make_shared<SingleGate>(8), false},
  };
}

GateInput three_tokens() {
  GateInput input = input_of(at::ones({3, 4}));
  input.keys = at::arange(3);
  return input;
}

TEST(GateInputs, Fields) {
  for (const Named& named : all_gates()) {
    std::vector<Refused> rows;
    const auto add = [&](const std::function<void(GateInput&)>& change, const char* argument,
                         const char* value, const char* limit) {
      rows.push_back({[change, gate = named.gate] {
                        GateInput input = three_tokens();
                        change(input);
                        gate->forward(input);
                      },
                      named.operation, argument, value, limit});
    };
    const char* const floating = "is not a floating [T, D] tensor";
    add([](auto& i) { i.tokens = Tensor(); }, "tokens", "undefined", floating);
    add([](auto& i) { i.tokens = at::ones({3}); }, "tokens", "Float[3]", floating);
    add([](auto& i) { i.tokens = at::ones({3, 4, 1}); }, "tokens", "Float[3, 4, 1]", floating);
    for (const auto type : {at::kInt, at::kLong, at::kBool, at::kByte, at::kComplexFloat}) {
      const std::string value = std::string(toString(type)) + "[3, 4]";
      add([=](auto& i) { i.tokens = at::ones({3, 4}, type); }, "tokens", value.c_str(), floating);
    }
    add([](auto& i) { i.tokens = i.tokens.to_sparse(); }, "tokens.layout", "Sparse", "Strided");
    add(
        [](auto& i) {
          i.tokens = at::ones({1, 1}).expand({int64_t{1} << 31, 4});
        },
        "num_tokens", "2147483648", "exceeds 2147483647; split the batch");
    if (named.has_router) {
      const char* const width = "has another width than d_model=4";
      add([](auto& i) { i.tokens = at::ones({3, 5}); }, "tokens", "Float[3, 5]", width);
      add([](auto& i) { i.tokens = at::ones({3, 0}); }, "tokens", "Float[3, 0]", width);
    }

    add([](auto& i) { i.valid = Tensor(); }, "valid", "undefined", "is not Bool[3]");
    add([](auto& i) { i.valid = at::ones({2}, at::kBool); }, "valid", "Bool[2]", "is not Bool[3]");
    add([](auto& i) { i.valid = at::ones({3, 1}, at::kBool); }, "valid", "Bool[3, 1]", "Bool[3]");
    add([](auto& i) { i.valid = at::ones({3}); }, "valid", "Float[3]", "is not Bool[3]");
    add([](auto& i) { i.valid = at::empty({3}, meta(at::kBool)); }, "valid.device", "meta",
        "differs from tokens.device=cpu");
    add([](auto& i) { i.keys = Tensor(); }, "keys", "undefined", "is not Long[3]");
    add([](auto& i) { i.keys = at::ones({3}, at::kInt); }, "keys", "Int[3]", "is not Long[3]");
    add([](auto& i) { i.keys = at::ones({4}, at::kLong); }, "keys", "Long[4]", "is not Long[3]");
    add([](auto& i) { i.keys = at::empty({3}, meta(at::kLong)); }, "keys.device", "meta",
        "differs from tokens.device=cpu");
    add([](auto& i) { i.sequence = Tensor(); }, "sequence", "undefined", "is not Long[3]");
    add([](auto& i) { i.sequence = at::ones({3}); }, "sequence", "Float[3]", "is not Long[3]");
    add(
        [](auto& i) {
          i.sequence = at::ones({3, 1}, at::kLong);
        },
        "sequence", "Long[3, 1]", "one entry for each token");
    add([](auto& i) { i.sequence = at::empty({3}, meta(at::kLong)); }, "sequence.device", "meta",
        "differs from tokens.device=cpu");
    add([](auto& i) { i.tokens_global = -1; }, "tokens_global", "-1", "is negative");
    add([](auto& i) { i.first_token = -1; }, "first_token", "-1", "is outside [0, 4294967295]");
    add([](auto& i) { i.first_token = kLargest; }, "first_token", "9223372036854775807",
        "is outside [0, 4294967295]");
    add([](auto& i) { i.progress = NAN; }, "progress", "nan", "is not a number");
    SCOPED_TRACE(named.operation);
    expect_refused(rows);
  }
}

TEST(GateInputs, Device) {
  for (const Named& named : all_gates()) {
    SCOPED_TRACE(named.operation);
    GateInput input = input_of(at::empty({3, 4}, meta(at::kFloat)));
    input.keys = at::empty({3}, meta(at::kLong));
    const auto forward = [&] { named.gate->forward(input); };
    if (!named.has_router) {
      expect_refused({{forward, named.operation, "device", "meta", "has no kernels"}});
    } else {
      expect_refused({{forward, named.operation, "tokens.device", "meta", ".device=cpu"}});
    }
  }
  TopKGate gate(TopKGateOptions(4, 8));
  gate.weight = at::zeros({8, 4}, at::kMeta);
  expect_refused({{[&] {
                     gate.forward(input_of(at::zeros({3, 4}, at::kMeta)));
                   },
                   "top_k_gate", "device", "meta", "has no kernels"}});
}

TEST(GateInputs, NonFiniteTokensAreCounted) {
  for (const Named& named : all_gates()) {
    for (const double bad : {double(NAN), double(INFINITY), -double(INFINITY)}) {
      GateInput input = three_tokens();
      input.tokens[1].fill_(bad);
      input.training = true;
      const GateOutput output = named.gate->forward(input);
      const bool reads_tokens = named.has_router && !named.gate->named_parameters().is_empty() &&
                                named.gate->parameters()[0].size(-1) == 4;
      EXPECT_EQ(output.stats.non_finite_tokens, reads_tokens ? 1 : 0) << named.operation << bad;
      gates::validate(output.routing, 8, named.operation);
      // Their neighbours have the bits that they have without them.
      input.tokens[1].fill_(1);
      const GateOutput clean = named.gate->forward(input);
      for (const int64_t t : {0, 2}) {
        EXPECT_TRUE(same_bits(dense_weights(output.routing, 8)[t].detach(),
                              dense_weights(clean.routing, 8)[t].detach()))
            << named.operation << bad;
      }
    }
  }
}

TEST(GateInputs, NarrowTypesAreComputedInFloat32) {
  for (const auto type : {at::kHalf, at::kBFloat16}) {
    for (const Named& named : all_gates()) {
      GateInput input = three_tokens();
      const Tensor expected = dense_weights(named.gate->forward(input).routing, 8).detach();
      input.tokens = input.tokens.to(type);
      EXPECT_EQ(named.gate->forward(input).routing.weights.scalar_type(), at::kFloat);
      EXPECT_TRUE(
          close_to(dense_weights(named.gate->forward(input).routing, 8).detach(), expected, 1e-6))
          << named.operation << type;
      named.gate->to(type);
      const Tensor weights = named.gate->forward(input).routing.weights;
      EXPECT_EQ(weights.scalar_type(), at::kFloat) << named.operation << type;
      EXPECT_TRUE(weights.isfinite().all().item<bool>()) << named.operation << type;
    }
  }
}

TEST(GateInputs, Parameters) {
  for (const Named& named : all_gates()) {
    for (auto& parameter : named.gate->named_parameters()) {
      const std::string name = parameter.key().substr(parameter.key().rfind('.') + 1);
      const Tensor before = parameter.value().detach().clone();
      std::vector<int64_t> wide = before.sizes().vec();
      wide[0] += 8;
      std::vector<Tensor> wrong = {before.slice(0, 0, before.size(0) - 1), at::zeros(wide),
                                   at::zeros({}), before.unsqueeze(0)};
      if (before.dim() == 2) wrong.push_back(before.slice(1, 0, 3));
      for (const Tensor& other : wrong) {
        parameter.value().set_data(other.clone());
        expect_refused({{[&] { named.gate->forward(three_tokens()); }, named.operation, name,
                         "Float" + to_text(other.sizes()),
                         "is not " + to_text(before.sizes()) + ", the shape that the options"}});
      }
      parameter.value().set_data(before);
      named.gate->forward(three_tokens());
    }
  }
  TopKGate biased(TopKGateOptions(4, 8).bias(true).bias_update_rate(1e-3));
  biased.expert_bias.set_data(at::zeros({7}));
  const auto forward = [&] { biased.forward(three_tokens()); };
  expect_refused({{forward, "top_k_gate", "expert_bias", "Float[7]", "is not [8]"}});
  biased.bias.set_data(at::zeros({9}));
  expect_refused({{forward, "top_k_gate", "bias", "Float[9]", "is not [8]"}});
}

TEST(GateInputs, State) {
  TopKGate top_k(TopKGateOptions(4, 8).bias_update_rate(1));
  ReMoEGate remoe(ReMoEGateOptions(4, 8));
  TopKGate by_sequence(TopKGateOptions(4, 8).aux_scope(AuxScope::kSequence));
  GateStats other, negative;
  other.tokens_per_expert = at::zeros({7}, at::kLong);
  negative.num_tokens = -3;
  expect_refused({
      {[&] { top_k.after_step({}); }, "top_k_gate", "tokens_per_expert", "undefined",
       "is not [num_experts=8]; pass statistics of this gate"},
      {[&] { top_k.after_step(other); }, "top_k_gate", "tokens_per_expert", "Long[7]",
       "is not [num_experts=8]"},
      {[&] { remoe.after_step(negative); }, "remoe_gate", "num_assignments", "0",
       "of num_tokens=-3 tokens is no statistic"},
      {[&] { by_sequence.forward(three_tokens()); }, "top_k_gate", "sequence", "none",
       "is needed with aux_scope=sequence"},
  });
}

TEST(GateInputs, Keys) {
  HashGate hash(HashGateOptions(8));
  HashGate table(HashGateOptions(8)
                     .mode(HashMode::kTable)
                     .table(at::tensor({5, 6}, at::kLong))
                     .oov(OutOfTable::kError));
  const auto with_keys = [&](const std::vector<int64_t>& keys) {
    return [&table, keys] {
      GateInput input = three_tokens();
      input.keys = at::tensor(keys);
      table.forward(input);
    };
  };
  expect_refused({{[&] {
                     hash.forward(input_of(at::ones({3, 4})));
                   },
                   "hash_gate", "keys", "none", "give an int64 key for each token"}});
  expect_refused<DataError>({
      {with_keys({0, 2, 1}), "hash_gate", "keys[1]", "2", "is outside the table [0, 2)"},
      {with_keys({0, 1, -1}), "hash_gate", "keys[2]", "-1", "choose oov=hash or extend it"},
      {with_keys({kLargest, 1, 1}), "hash_gate", "keys[0]", "9223372036854775807", "[0, 2)"},
  });
}

TEST(GateInputs, Tables) {
  const Tensor experts = at::tensor({0, 1, 2, 3}, at::kLong).view({2, 2});
  const Tensor weights = at::ones({2, 2});
  const char* const table = "routing_from_table";
  const char* const dense = "routing_from_dense";
  const auto from = [](const Tensor& ids, const Tensor& values, int64_t num_experts) {
    return [=] { routing_from_table(ids, values, num_experts); };
  };
  expect_refused({
      {from({}, weights, 4), table, "expert_idx", "undefined", "is not an integer [T, K] table"},
      {from(weights, weights, 4), table, "expert_idx", "Float[2, 2]", "integer [T, K]"},
      {from(experts[0], weights, 4), table, "expert_idx", "Long[2]", "integer [T, K]"},
      {from(experts, {}, 4), table, "weights", "undefined", "expert_idx=Long[2, 2]"},
      {from(experts, weights[0], 4), table, "weights", "Float[2]", "expert_idx=Long[2, 2]"},
      {from(experts, experts, 4), table, "weights", "Long[2, 2]", "is not a floating table"},
      {from(experts, weights, 1), table, "expert_idx", "Long[2, 2]", "[1, num_experts=1]"},
      {from(experts, weights, -1), table, "expert_idx", "Long[2, 2]", "[1, num_experts=-1]"},
      {from(experts, weights, 3), table, "expert_idx", "3", "is outside [0, num_experts=3)"},
      {from(experts - 1, weights, 4), table, "expert_idx", "-1", "is outside [0, num_experts=4)"},
      {from(experts * 0, weights, 4), table, "expert_idx", "Long[2, 2]", "twice in a row"},
      {[] { routing_from_dense({}); }, dense, "weights", "undefined", "floating [T, E] table"},
      {[&] { routing_from_dense(experts); }, dense, "weights", "Long[2, 2]", "floating [T, E]"},
      {[&] { routing_from_dense(weights[0]); }, dense, "weights", "Float[2]", "floating [T, E]"},
  });
}

TEST(GateInputs, Routings) {
  const Routing good =
      routing_from_table(at::tensor({0, 1, 2, 3}, at::kLong).view({2, 2}), at::ones({2, 2}), 4);
  Routing no_offsets = good, high = good, empty, ragged = good, many = good;
  no_offsets.top_k = 0;
  high.expert_idx = good.expert_idx.add(1);
  ragged.top_k = 0;
  ragged.token_offsets = at::tensor({0, 9, 4}, at::kInt);
  many.num_tokens = kLargest;
  const char* const count = "count_assignments";
  const auto counted = [](const Routing& routing, int64_t E = 4) {
    return [=] { count_assignments(routing, E, 2); };
  };
  expect_refused({
      {[&] { without_invalid(good, at::ones({3}, at::kBool)); }, "without_invalid", "valid",
       "Bool[3]", "is not bool[num_tokens=2]"},
      {[&] { without_invalid(good, {}); }, "without_invalid", "valid", "undefined", "bool["},
      {[&] { without_invalid(good, at::ones({2})); }, "without_invalid", "valid", "Float[2]",
       "bool"},
      {[&] { without_invalid(empty, at::ones({0}, at::kBool)); }, "without_invalid", "expert_idx",
       "undefined", "is not int32 [A]"},
      {[&] { explicit_offsets(no_offsets); }, "routing", "token_offsets", "undefined", "top_k=0"},
      {[&] { explicit_offsets(many); }, "routing", "num_tokens", "9223372036854775807",
       "2147483647"},
      {[&] { dense_weights(high, 4); }, "dense_weights", "expert_idx", "4", "[0, num_experts=4)"},
      {[&] { dense_weights(good, 0); }, "dense_weights", "num_experts", "0", "[1, 2147483647]"},
      {[&] { dense_weights(empty, 4); }, "dense_weights", "expert_idx", "undefined", "int32 [A]"},
      {[&] { weight_per_expert(high, 4); }, "weight_per_expert", "expert_idx", "4", "experts=4)"},
      {counted(high), count, "expert_idx", "4", "is outside [0, num_experts=4)"},
      {counted(good, -1), count, "num_experts", "-1", "is outside [1, 2147483647]"},
      {counted(empty), count, "expert_idx", "undefined", "is not int32 [A]"},
      {counted(no_offsets), count, "token_offsets", "undefined", "is not int32 [num_tokens + 1"},
      {counted(ragged), count, "token_offsets", "9", "does not follow 0 within 4 assignments"},
      {counted(many), count, "num_tokens", "9223372036854775807", "is outside [0, 2147483647]"},
  });
}

TEST(GateInputs, Losses) {
  const auto terms = [](Tensor score_sum, double coeff = 1, int64_t top_k = 1) {
    BalanceTerms result;
    result.score_sum = std::move(score_sum);
    result.aux_loss_coeff = coeff;
    result.top_k = top_k;
    return result;
  };
  const Tensor four = at::zeros({4}), counts = at::zeros({4}, at::kLong);
  const char* const load = "load_balance_loss";
  expect_refused({
      {[&] { load_balance_loss({}, counts, 2); }, load, "score_sum", "undefined", "[num_experts]"},
      {[&] {
         load_balance_loss(terms(at::zeros({2, 2})), counts, 2);
       },
       load, "score_sum", "[2, 2]", "is not [num_experts]"},
      {[&] { load_balance_loss(terms(four), at::zeros({5}, at::kLong), 2); }, load,
       "global_tokens_per_expert", "[5]", "differs from score_sum=[4]"},
      {[&] { load_balance_loss(terms(four), {}, 2); }, load, "global_tokens_per_expert",
       "undefined", "differs from score_sum=[4]"},
      {[&] { load_balance_loss(terms(four), counts, -2); }, load, "tokens_global", "-2",
       "negative"},
      {[&] { load_balance_loss(terms(four, 1, 0), counts, 2); }, load, "top_k", "0", "is below 1"},
      {[&] { load_balance_loss(terms(four, NAN), counts, 2); }, load, "aux_loss_coeff", "nan",
       "is not a finite number from 0 on"},
      {[] { z_loss(at::zeros({2}), 1, 2); }, "z_loss", "lse_square_sum", "[2]", "not a scalar"},
      {[] { z_loss({}, 1, 2); }, "z_loss", "lse_square_sum", "undefined", "not a scalar"},
      {[] { z_loss(at::zeros({}), 1, -2); }, "z_loss", "tokens_global", "-2", "is negative"},
      {[] { z_loss(at::zeros({}), INFINITY, 2); }, "z_loss", "coeff", "inf", "finite"},
      {[] { balance_entropy_loss({}, 1); }, "balance_loss", "weight_sum", "undefined", "floating"},
      {[&] { balance_entropy_loss(four, NAN); }, "balance_loss", "coeff", "nan", "finite"},
      {[&] { cv_squared_loss("load_loss", counts, 1); }, "load_loss", "sum", "Long[4]", "floating"},
      {[&] { cv_squared_loss("load_loss", four, -1); }, "load_loss", "coeff", "-1", "finite"},
  });
}

TEST(GateInputs, SequenceLoss) {
  const Tensor shares = at::zeros({2, 4}), ids = at::zeros({2, 1}, at::kInt);
  const Tensor sequence = at::zeros({2}, at::kLong);
  const auto loss = [](const Tensor& s, const Tensor& e, const Tensor& q, double c, int64_t n) {
    return [=] { sequence_balance_loss(s, e, q, c, true, n); };
  };
  const char* const name = "sequence_balance_loss";
  expect_refused({
      {loss(shares, ids, sequence, 1, -1), name, "tokens_global", "-1", "is negative"},
      {loss({}, ids, sequence, 1, 2), name, "score_shares", "undefined", "floating [T, E]"},
      {loss(shares[0], ids, sequence, 1, 2), name, "score_shares", "Float[4]", "floating [T, E]"},
      {loss(shares, {}, sequence, 1, 2), name, "expert_idx", "undefined", "integer [T, K]"},
      {loss(shares, ids[0], sequence, 1, 2), name, "expert_idx", "Int[1]", "Float[2, 4]"},
      {loss(shares, ids.add(4), sequence, 1, 2), name, "expert_idx", "4", "num_experts=4)"},
      {loss(shares, ids, {}, 1, 2), name, "sequence", "undefined", "is not Long[2]"},
      {loss(shares, ids, at::zeros({3}, at::kLong), 1, 2), name, "sequence", "Long[3]", "Long[2]"},
      {loss(shares, ids, sequence, NAN, 2), name, "coeff", "nan", "finite number from 0 on"},
  });
}

TEST(GateInputs, GlobalLosses) {
  const Tensor four = at::zeros({4});
  const auto finish = [](const GlobalLoss& loss, const Tensor& sum, int64_t tokens, int ranks) {
    return [=] { finish_global_loss(loss, sum, tokens, ranks); };
  };
  GlobalLoss good = balance_entropy_loss(four, 1), no_function = good, nan = good, no_sum = good;
  no_function.loss = nullptr;
  nan.coeff = NAN;
  no_sum.local_sum = Tensor();
  const char* const name = "balance_loss";
  expect_refused({
      {finish(good, {}, 2, 1), name, "global_sum", "undefined", "differs from the local sum"},
      {finish(good, at::zeros({5}), 2, 1), name, "global_sum", "[5]", "differs from the local sum"},
      {finish(no_sum, four, 2, 1), name, "global_sum", "[4]", "differs from the local sum"},
      {finish(good, four, -1, 1), name, "tokens_global", "-1", "is negative"},
      {finish(good, four, 2, 0), name, "num_ranks", "0", "is below 1"},
      {finish(nan, four, 2, 1), name, "coeff", "nan", "is not a finite number"},
      {finish(no_function, four, 2, 1), name, "loss", "empty", "must be a function"},
  });
}

TEST(GateInputs, Schedules) {
  expect_refused({
      {[] { CoefficientSchedule{.5}.at(NAN); }, "coefficient_schedule", "progress", "nan",
       "is not a number"},
      {[] { CoefficientSchedule{-1}.validate("my_gate"); }, "my_gate", "schedule.ramp_until", "-1",
       "is outside [0, 1]"},
  });
}

}  // namespace
}  // namespace perseid::testing
