// What a layer is given, made wrong: an error with operation, argument, value, limit.
//   Construction    gates, experts, placement, groups, shared module
//   Fields          each field of MoEInput, in one process
//   OneRank         the same on one rank of 2: it throws that error, its peer one of the same type
//                   that quotes it, nobody waits, and the next step works
//   Settings        ranks that were built or called differently: all throw RanksDisagree
//   UserGates, UserExperts  that return something wrong on one rank: as OneRank
//   Options         of the layer
//   Statistics      those that are added or passed to after_step
//   AfterAnError    a failed group refuses each later call at once
#include <ATen/Parallel.h>

#include <cmath>

#include "comm/collectives.h"
#include "gates/baseline_gates.h"
#include "gates/hash_gate.h"
#include "tests/moe/layer_fixture.h"
#include "tests/refused.h"

namespace perseid::testing {
namespace {

at::TensorOptions meta(at::ScalarType type) { return at::TensorOptions(type).device(at::kMeta); }

MoEInput good_input() {
  MoEInput input(case_tokens(3));
  input.keys = at::arange(3);
  return input;
}

MoEStats stats_of(int64_t num_experts, size_t num_gates = 1) {
  MoEStats stats;
  stats.gates.resize(num_gates);
  for (gates::GateStats& gate : stats.gates) {
    gate.tokens_per_expert = at::zeros({num_experts}, at::kLong);
  }
  return stats;
}

struct Row {
  std::function<void(MoEInput&)> change;
  std::string operation, argument, value, limit;
};

/// Every field of the input of a layer of 5 experts, width 6, float64.
std::vector<Row> wrong_inputs() {
  const char* const name = "moe_layer";
  const auto tokens = [](const at::Tensor& wrong) {
    return [wrong](MoEInput& input) { input.tokens = wrong; };
  };
  const auto features = [](const at::Tensor& wrong) {
    return [wrong](MoEInput& input) { input.features = wrong; };
  };
  const auto earlier = [](const MoEStats& wrong) {
    return [wrong](MoEInput& input) { input.earlier = wrong; };
  };
  MoEStats undefined = stats_of(5, 2), negative = stats_of(5, 2);
  undefined.gates[0].tokens_per_expert = at::Tensor();
  negative.gates[0].num_tokens = -4;
  return {
      {tokens({}), name, "tokens.dim", "-1", "is not 2; pass [tokens, d_model]"},
      {tokens(at::zeros({3}, at::kDouble)), name, "tokens.dim", "1", "is not 2"},
      {tokens(at::zeros({1, 3, 6}, at::kDouble)), name, "tokens.dim", "3", "is not 2"},
      {tokens(at::zeros({3, 7}, at::kDouble)), name, "tokens.width", "7", "d_in=6"},
      {tokens(at::zeros({3, 0}, at::kDouble)), name, "tokens.width", "0", "d_in=6"},
      {tokens(at::zeros({3, 6}, at::kInt)), name, "dtype", "Int",
       "choose bf16, fp16, fp32 or fp64"},
      {tokens(at::zeros({3, 6}, at::kLong)), name, "dtype", "Long",
       "choose bf16, fp16, fp32 or fp64"},
      {tokens(at::zeros({3, 6}, at::kBool)), name, "dtype", "Bool",
       "choose bf16, fp16, fp32 or fp64"},
      {tokens(at::zeros({3, 6}, at::kByte)), name, "dtype", "Byte",
       "choose bf16, fp16, fp32 or fp64"},
      {tokens(at::zeros({3, 6})), name, "tokens.dtype", "Float", "the experts' Double"},
      {tokens(at::zeros({3, 6}, at::kBFloat16)), name, "tokens.dtype", "BFloat16", "' Double"},
      {tokens(at::empty({3, 6}, meta(at::kDouble))), name, "device", "meta", "has no kernels"},
      {tokens(case_tokens(3).to_sparse()), name, "tokens.layout", "Sparse", "call to_dense()"},
      {tokens(at::zeros({1, 1}, at::kDouble).expand({int64_t{1} << 31, 6})), name, "num_tokens",
       "2147483648", "exceeds 2147483647; split the batch"},
      {features({}), name, "features.dim", "-1", "is not 2"},
      {features(at::zeros({3}, at::kDouble)), name, "features.dim", "1", "is not 2"},
      {features(at::zeros({2, 6}, at::kDouble)), name, "features.rows", "2", "from 3 tokens"},
      {features(at::zeros({3, 5}, at::kDouble)), "top_k_gate", "tokens", "Double[3, 5]",
       "d_model=6"},
      {features(at::zeros({3, 6}, at::kInt)), name, "tokens", "Int[3, 6]", "floating [T, D]"},
      {features(at::empty({3, 6}, meta(at::kDouble))), name, "keys.device", "cpu",
       "differs from tokens.device=meta"},
      {[](auto& i) { i.valid = at::Tensor(); }, name, "valid", "undefined", "is not Bool[3]"},
      {[](auto& i) { i.valid = at::ones({4}, at::kBool); }, name, "valid", "Bool[4]", "Bool[3]"},
      {[](auto& i) { i.valid = at::ones({3}); }, name, "valid", "Float[3]", "is not Bool[3]"},
      {[](auto& i) { i.valid = at::empty({3}, meta(at::kBool)); }, name, "valid.device", "meta",
       "differs from tokens.device=cpu"},
      {[](auto& i) { i.keys = at::ones({3}); }, name, "keys", "Float[3]", "is not Long[3]"},
      {[](auto& i) { i.keys.reset(); }, "hash_gate", "keys", "none", "give an int64 key"},
      {[](auto& i) { i.sequence = at::ones({2}, at::kLong); }, name, "sequence", "Long[2]",
       "Long[3]"},
      {[](auto& i) { i.progress = NAN; }, name, "progress", "nan", "is not a number"},
      {earlier({}), name, "earlier.gates", "0", "differs from 2 gates of the layer"},
      {earlier(stats_of(4, 2)), name, "earlier.tokens_per_expert", "Long[4]", "is not Long[5]"},
      {earlier(undefined), name, "earlier.tokens_per_expert", "undefined", "is not Long[5]"},
      {earlier(negative), name, "earlier.num_tokens", "-4", "is negative"},
  };
}

/// A top-k and a hash gate over 5 experts, width 6, float64.
std::shared_ptr<MoELayer> two_gate_layer(const ParallelGroups& groups) {
  const comm::Group& ep = groups.expert_parallel;
  const ExpertPlacement placement = ExpertPlacement::contiguous(5, ep.size());
  const auto router = std::make_shared<gates::TopKGate>(gates::TopKGateOptions(kDModel, 5));
  router->to(at::kDouble);
  const std::vector<std::shared_ptr<gates::Gate>> gates = {
      router, std::make_shared<gates::HashGate>(gates::HashGateOptions(5))};
  return std::make_shared<MoELayer>(
      gates, make_experts(ExpertKind::kGated, placement, ep.rank(), at::kDouble), placement,
      groups);
}

TEST(LayerOptions, Fields) {
  const auto layer = two_gate_layer(make_parallel_groups(comm::self_group()));
  for (const Row& row : wrong_inputs()) {
    MoEInput input = good_input();
    row.change(input);
    expect_refused(
        {{[&] { layer->forward(input); }, row.operation, row.argument, row.value, row.limit}});
  }
  for (const double bad : {double(NAN), double(INFINITY)}) {
    MoEInput input = good_input();
    input.tokens[1][2] = bad;
    expect_refused<Diverged>({{[&] { layer->forward(input); }, "moe_layer", "non_finite_tokens",
                               "1", "exceeds 0: tokens or gate parameters hold a NaN"}});
  }
  EXPECT_EQ(layer->forward(good_input()).output().size(0), 3);
}

/// One forward on 2 ranks with the layer and the input that `body` makes for a rank. Every rank
/// throws `Expected`, and its text holds `mine` on rank 1, `peers` on rank 0.
template <typename Expected>
void expect_both_throw(const std::function<void(const ParallelGroups&, bool)>& body,
                       const std::string& mine, const std::string& peers) {
  at::set_num_threads(1);
  comm::run_local(2, [&](const comm::Group& world) {
    world.set_timeout_ms(20000);
    const ParallelGroups groups = make_parallel_groups(world);
    std::string text = "no error";
    try {
      body(groups, world.rank() == 1);
    } catch (const Expected& error) {
      text = error.what();
    } catch (const std::exception& error) {
      text = std::string("another kind of error: ") + error.what();
    }
    const std::string& part = world.rank() == 1 ? mine : peers;
    EXPECT_NE(text.find(part), std::string::npos) << "rank " << world.rank() << ": " << text;
    comm::barrier(world);
    comm::barrier(groups.expert_parallel);
  });
}

TEST(LayerOptions, OneRank) {
  for (const Row& row : wrong_inputs()) {
    const std::string text = "[" + row.operation + "] " + row.argument + "=" + row.value;
    expect_both_throw<ConfigError>(
        [&](const ParallelGroups& groups, bool is_wrong) {
          const auto layer = two_gate_layer(groups);
          MoEInput input = good_input();
          if (is_wrong) row.change(input);
          try {
            layer->forward(input);
          } catch (...) {
            EXPECT_EQ(layer->forward(good_input()).output().size(0), 3);
            throw;
          }
        },
        text, "refused by rank 1: " + text);
  }
  expect_both_throw<Diverged>(
      [](const ParallelGroups& groups, bool is_wrong) {
        MoEInput input = good_input();
        if (is_wrong) input.tokens[1][2] = NAN;
        two_gate_layer(groups)->forward(input);
      },
      "non_finite_tokens=1", "refused by rank 1: [moe_layer] non_finite_tokens=1");
}

TEST(LayerOptions, Settings) {
  const auto disagree = [](const std::function<void(const ParallelGroups&, bool)>& body,
                           const std::string& text) {
    expect_both_throw<RanksDisagree>(body, text, text);
  };
  disagree(
      [](const ParallelGroups& groups, bool is_wrong) {
        const auto layer = two_gate_layer(groups);
        layer->train(!is_wrong);
        layer->forward(good_input());
      },
      "[moe_layer] training=1 from rank 0 differs from training=0 from rank 1");
  disagree(
      [](const ParallelGroups& groups, bool is_wrong) {
        MoEInput input = good_input();
        if (is_wrong) input.earlier = stats_of(5, 2);
        two_gate_layer(groups)->forward(input);
      },
      "[moe_layer] has_earlier=0 from rank 0 differs from has_earlier=1 from rank 1");
  disagree(
      [](const ParallelGroups& groups, bool is_wrong) {
        LayerCase c;
        c.strict = is_wrong;
        make_layer(c, groups)->forward(case_tokens(3));
      },
      "[moe_layer] strict=0 from rank 0 differs from strict=1 from rank 1");
  disagree(
      [](const ParallelGroups& groups, bool is_wrong) {
        LayerCase c;
        c.num_gates = is_wrong ? 2 : 1;
        make_layer(c, groups)->forward(case_tokens(3));
      },
      "[moe_layer] num_gates=1 from rank 0 differs from num_gates=2 from rank 1");
  disagree(
      [](const ParallelGroups& groups, bool is_wrong) {
        const ExpertPlacement placement(
            is_wrong ? std::vector<int>{0, 1, 0, 1, 0} : std::vector<int>{0, 0, 0, 1, 1}, 2);
        const int rank = groups.expert_parallel.rank();
        MoELayer({std::make_shared<gates::SingleGate>(5)},
                 make_experts(ExpertKind::kGated, placement, rank, at::kDouble), placement, groups)
            .forward(case_tokens(3));
      },
      "[moe_layer] placement.hash=");
  disagree(
      [](const ParallelGroups& groups, bool is_wrong) {
        const auto dtype = is_wrong ? at::kFloat : at::kDouble;
        make_layer({}, groups, dtype)->forward(case_tokens(3, dtype));
      },
      "dtype=fp32");
}

/// Wrong in one way on the rank where it is told to be.
class UserGate : public gates::Gate {
 public:
  using Spoil = std::function<void(gates::GateOutput&)>;
  explicit UserGate(Spoil spoil) : Gate("user_gate", 5, 1), spoil_(std::move(spoil)) {}
  gates::GateOutput forward(const gates::GateInput& input) override {
    gates::GateOutput output = gates::SingleGate(5).forward(input);
    if (spoil_) spoil_(output);
    return output;
  }

 private:
  Spoil spoil_;
};

TEST(LayerOptions, UserGates) {
  const auto expect = [](const UserGate::Spoil& spoil, const std::string& text) {
    expect_both_throw<ConfigError>(
        [&](const ParallelGroups& groups, bool is_wrong) {
          const ExpertPlacement placement = ExpertPlacement::contiguous(5, 2);
          const auto gate = std::make_shared<UserGate>(is_wrong ? spoil : UserGate::Spoil());
          const int rank = groups.expert_parallel.rank();
          MoELayer({gate}, make_experts(ExpertKind::kGated, placement, rank, at::kDouble),
                   placement, groups)
              .forward(case_tokens(3));
        },
        "[user_gate] " + text, "refused by rank 1: [user_gate] " + text);
  };
  expect([](auto& o) { o.routing = {}; }, "expert_idx=undefined is not int32 [A]");
  expect([](auto& o) { o.routing.expert_idx.fill_(5); },
         "expert_idx=5 is outside [0, num_experts=5)");
  expect([](auto& o) { o.routing.weights = at::Tensor(); }, "weights=undefined is not float32");
  expect(
      [](auto& o) {
        o.routing = gates::routing_from_dense(at::ones({2, 5}));
      },
      "routing.num_tokens=2 differs from the 3 tokens given");
  expect([](auto& o) { o.stats = {}; }, "stats.tokens_per_expert=undefined is not Long[5]");
  expect([](auto& o) { o.stats.tokens_per_expert = at::zeros({4}, at::kLong); },
         "stats.tokens_per_expert=Long[4] is not Long[5]");
  expect([](auto& o) { o.balance.score_sum = at::zeros({6}); },
         "balance.score_sum=Float[6] is not [num_experts=5]");
  expect([](auto& o) { o.balance.top_k = 0; }, "balance.top_k=0 is below 1");
  expect(
      [](auto& o) {
        o.balance = {at::zeros({5}), at::zeros({5}, at::kLong), NAN, 1, true};
      },
      "balance.aux_loss_coeff=nan is not a finite number");
  expect(
      [](auto& o) {
        o.losses.push_back({"my_loss", {}, {}});
      },
      "losses.my_loss=undefined is not a scalar");
  expect(
      [](auto& o) {
        o.losses.push_back({"my_loss", at::zeros({2}), {}});
      },
      "losses.my_loss=Float[2] is not a scalar");
  expect(
      [](auto& o) {
        o.global_losses.push_back({"my_loss", 1, {}, nullptr});
      },
      "global_losses.my_loss=undefined has no floating local_sum");
  expect(
      [](auto& o) {
        o.global_losses.push_back({"my_loss", 1, at::zeros({2}), nullptr});
      },
      "global_losses.my_loss=empty must be a function");
  expect([](auto& o) { o.residual_weight = at::ones({2}); },
         "residual_weight=Float[2] is not [num_tokens=3]");
}

/// Experts of a user whose forward is wrong on the rank where it is told to be.
struct UserExperts : Experts {
  using Forward = std::function<at::Tensor(const at::Tensor& rows)>;
  UserExperts(std::vector<int64_t> ids, Forward forward)
      : Experts("user_experts", std::move(ids), kDModel, kDOut), forward_(std::move(forward)) {}
  at::Tensor forward(const at::Tensor& rows, const at::Tensor& /*weights*/,
                     const std::shared_ptr<const RoutingPlan>& /*plan*/) override {
    return forward_ ? forward_(rows) : rows.slice(1, 0, kDOut).contiguous();
  }
  Forward forward_;
};

TEST(LayerOptions, UserExperts) {
  const auto expect = [](const UserExperts::Forward& forward, const std::string& text) {
    expect_both_throw<ConfigError>(
        [&](const ParallelGroups& groups, bool is_wrong) {
          const ExpertPlacement placement = ExpertPlacement::contiguous(5, 2);
          const auto experts =
              std::make_shared<UserExperts>(placement.experts_of(groups.expert_parallel.rank()),
                                            is_wrong ? forward : UserExperts::Forward());
          MoELayer({std::make_shared<gates::SingleGate>(5, 4)}, experts, placement, groups)
              .forward(case_tokens(3));
        },
        text, "[moe_layer] arguments=refused of rank 1 before the exchange");
  };
  expect([](const at::Tensor&) { return at::Tensor(); },
         "[moe_layer] experts.output=undefined is not Double[6, 4]");
  expect([](const at::Tensor& rows) { return rows; },
         "[moe_layer] experts.output=Double[6, 6] is not Double[6, 4]");
  expect([](const at::Tensor& rows) { return rows.slice(1, 0, kDOut).to(at::kFloat); },
         "[moe_layer] experts.output=Float[6, 4] is not Double[6, 4]");
  expect(
      [](const at::Tensor&) -> at::Tensor {
        require(false, "user_experts", "temperature", -1, "is below 0");
        return {};
      },
      "[user_experts] temperature=-1 is below 0");
}

TEST(LayerOptions, Construction) {
  const ParallelGroups groups = make_parallel_groups(comm::self_group());
  const ExpertPlacement three = ExpertPlacement::contiguous(3, 1);
  const auto experts = make_experts(ExpertKind::kGated, three, 0, at::kFloat);
  const auto gate = std::make_shared<gates::SingleGate>(3);
  using Gates = std::vector<std::shared_ptr<gates::Gate>>;
  const auto made = [&](const Gates& gates, const std::shared_ptr<Experts>& own,
                        const ExpertPlacement& placement,
                        const std::shared_ptr<Experts>& shared = nullptr) {
    return [=, &groups] { MoELayer(gates, own, placement, groups, {}, shared); };
  };
  const auto mlp = [](int64_t d_model, int64_t d_out, int64_t num_experts) {
    return std::make_shared<GroupedMLP>(GroupedMLPOptions(d_model, 3).d_out(d_out),
                                        ExpertPlacement::contiguous(num_experts, 1), 0);
  };
  const char* const name = "moe_layer";
  expect_refused({
      {made({}, experts, three), name, "gates", "0", "is empty; pass 1 gate or more"},
      {made({gate, nullptr}, experts, three), name, "gates", "null", "is not a module"},
      {made({gate}, nullptr, three), name, "experts", "null", "is not a module"},
      {made({std::make_shared<gates::SingleGate>(4)}, experts, three), name, "gate.num_experts",
       "4", "differs from num_experts=3 of the placement"},
      {made({gate}, experts, ExpertPlacement::contiguous(3, 2)), name, "placement.num_ranks", "2",
       "differs from ep_size=1"},
      {made({gate}, mlp(kDModel, kDOut, 2), three), name, "experts", "2", "are not those"},
      {made({gate}, experts, three, mlp(kDModel, kDOut, 2)), name, "shared.num_local_experts", "2",
       "is not 1"},
      {made({gate}, experts, three, mlp(5, kDOut, 1)), name, "shared.d_in", "5", "from d_in=6"},
      {made({gate}, experts, three, mlp(kDModel, 3, 1)), name, "shared.d_out", "3", "from d_out=4"},
  });
}

TEST(LayerOptions, Options) {
  const ParallelGroups groups = make_parallel_groups(comm::self_group());
  const auto forward = [&](const std::function<void(MoELayerOptions&)>& change) {
    return [&groups, change] {
      const ExpertPlacement five = ExpertPlacement::contiguous(5, 1);
      MoELayerOptions options;
      change(options);
      MoELayer({std::make_shared<gates::SingleGate>(5)},
               make_experts(ExpertKind::kGated, five, 0, at::kDouble), five, groups, options)
          .forward(case_tokens(3));
    };
  };
  expect_refused({
      {forward([](auto& o) { o.capacity.capacity_factor = NAN; }), "apply_capacity",
       "capacity_factor", "nan", "choose 0 for dropless"},
      {forward([](auto& o) { o.capacity.capacity_min = -1; }), "apply_capacity", "capacity_min",
       "-1", "must be at least 0"},
      {forward([](auto& o) { o.capacity.drop_policy = DropPolicy::kNoTokenLeftBehind; }),
       "apply_capacity", "capacity_factor", "0", "choose one above 0"},
      {forward([](auto& o) { o.layer_id = 70000; }), "moe_layer", "layer", "70000",
       "is outside [-1, 65534]"},
      {forward([](auto& o) { o.layer_id = -2; }), "moe_layer", "layer", "-2", "[-1, 65534]"},
  });
}

TEST(LayerOptions, Statistics) {
  const auto layer = make_layer({}, make_parallel_groups(comm::self_group()));
  MoEStats sum = stats_of(5);
  MoEStats undefined = stats_of(5);
  undefined.gates[0].tokens_per_expert = at::Tensor();
  const char* const name = "moe_layer";
  expect_refused({
      {[&] { layer->after_step({}); }, name, "stats.gates", "0", "differs from 1 gates"},
      {[&] { layer->after_step(undefined); }, name, "stats.tokens_per_expert", "undefined",
       "Long[5]"},
      {[&] { layer->after_step(stats_of(4)); }, name, "stats.tokens_per_expert", "Long[4]",
       "Long[5]"},
      {[&] { sum += stats_of(5, 2); }, name, "stats.gates", "2", "differs from 1"},
      {[&] { sum += stats_of(4); }, name, "stats.tokens_per_expert", "Long[4]", "from Long[5]"},
      {[&] { sum += undefined; }, name, "stats.tokens_per_expert", "undefined", "from Long[5]"},
      {[] { max_vio({}); }, "max_vio", "tokens_per_expert", "undefined", "is not [num_experts]"},
  });
}

TEST(LayerOptions, AfterAnError) {
  at::set_num_threads(1);
  const auto other_collective = [](MoELayer& layer, const comm::Group& world) {
    world.rank() == 1 ? comm::barrier(world) : void(layer.forward(good_input()));
  };
  const auto other_step = [](MoELayer& layer, const comm::Group& world) {
    MoEInput input = good_input();
    input.step = 7 + world.rank();
    layer.forward(input);
  };
  using Call = std::function<void(MoELayer&, const comm::Group&)>;
  for (const Call& call : {Call(other_collective), Call(other_step)}) {
    comm::run_local(2, [&](const comm::Group& world) {
      world.set_timeout_ms(20000);
      const auto layer = two_gate_layer(make_parallel_groups(world));
      EXPECT_THROW(call(*layer, world), RanksDisagree);
      for (int again = 0; again < 2; ++again) {
        expect_refused<RanksDisagree>({{[&] { layer->forward(good_input()); }, "moe_layer", "group",
                                        "failed", "restart from the last checkpoint"}});
      }
    });
  }
}

}  // namespace
}  // namespace perseid::testing
