// Every option and argument of the parts of a layer, made wrong: an error with operation, argument,
// value, limit. Layers and their inputs: layer_options_test.cpp.
//   Placement, Capacity, Experts, ModuleExperts   options and arguments
//   ExpertInputs   rows, weights and plans that do not fit; parameters of another checkpoint
//   Plans          routings and placements that do not fit; several routings
//   OneRank        ... on one rank of 2: the other is not left waiting, the group stays usable
//   Gradients      sizes, types and norms on one rank of 2
#include <cmath>
#include <limits>

#include "comm/collectives.h"
#include "moe/dispatch.h"
#include "moe/gradients.h"
#include "moe/selection.h"
#include "tests/moe/layer_fixture.h"
#include "tests/refused.h"

namespace perseid::testing {
namespace {

constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
constexpr int64_t kTooMany = int64_t{1} << 31;
at::TensorOptions meta(at::ScalarType type) { return at::TensorOptions(type).device(at::kMeta); }

/// Two tokens, experts 0, 1 and 2, 3.
gates::Routing two_rows() {
  return gates::routing_from_table(at::arange(4).view({2, 2}), at::ones({2, 2}), 4);
}

TEST(MoEOptions, Placement) {
  const char* const name = "expert_placement";
  const auto contiguous = [](int64_t num_experts, int num_ranks) {
    return [=] { ExpertPlacement::contiguous(num_experts, num_ranks); };
  };
  const auto by_rank = [](const std::vector<int>& ranks, int num_ranks) {
    return [=] { ExpertPlacement(ranks, num_ranks); };
  };
  expect_refused({
      {contiguous(0, 2), name, "num_experts", "0", "must be at least 1"},
      {contiguous(-4, 2), name, "num_experts", "-4", "must be at least 1"},
      {contiguous(kTooMany, 2), name, "num_experts", "2147483648", "below 2^31"},
      {contiguous(4, 0), name, "num_ranks", "0", "must be at least 1"},
      {contiguous(4, -1), name, "num_ranks", "-1", "must be at least 1"},
      {by_rank({}, 2), name, "num_experts", "0", "must be at least 1"},
      {by_rank({0, 3, 1}, 3), name, "rank_of_expert[1]", "3", "must lie in [0, 3)"},
      {by_rank({0, 1, -1}, 3), name, "rank_of_expert[2]", "-1", "must lie in [0, 3)"},
      {[] { ExpertPlacement::contiguous(4, 2).experts_of(2); }, name, "rank", "2", "[0, 2)"},
      {[] { ExpertPlacement::contiguous(4, 2).num_local_experts(-1); }, name, "rank", "-1",
       "[0, 2)"},
  });
}

TEST(MoEOptions, Capacity) {
  CapacityOptions nan, negative, one, half;
  nan.capacity_factor = NAN;
  negative.capacity_min = -3;
  one.drop_policy = DropPolicy::kNoTokenLeftBehind;
  half.capacity_factor = .5;
  gates::Routing empty, high = two_rows();
  high.expert_idx = high.expert_idx.add(1);
  const char* const capacity = "expert_capacity";
  const char* const apply = "apply_capacity";
  const char* const drop = "drop_over_capacity";
  const auto applied = [](const CapacityOptions& options) {
    return [=] { apply_capacity(two_rows(), options, 2, 2, 4); };
  };
  expect_refused({
      {[&] { expert_capacity(nan, 4, 1, 2); }, capacity, "capacity_factor", "nan", "choose 0"},
      {[&] { expert_capacity(negative, 4, 1, 2); }, capacity, "capacity_min", "-3", "at least 0"},
      {[] { expert_capacity({}, -1, 1, 2); }, capacity, "num_tokens", "-1", "at least 0"},
      {[] { expert_capacity({}, 4, 0, 2); }, capacity, "top_k", "0", "at least 1"},
      {[] { expert_capacity({}, 4, 1, 0); }, capacity, "num_experts", "0", "at least 1"},
      {applied(nan), apply, "capacity_factor", "nan", "must be a number; choose 0 for dropless"},
      {applied(negative), apply, "capacity_min", "-3", "must be at least 0"},
      {applied(one), apply, "capacity_factor", "0", "leaves drop_policy=no_token_left_behind"},
      {[&] { apply_capacity(two_rows(), half, -2, 2, 4); }, capacity, "num_tokens", "-2",
       "at least"},
      {[&] { apply_capacity(empty, half, 2, 2, 4); }, drop, "expert_idx", "undefined", "int32 [A]"},
      {[] { drop_over_capacity(two_rows(), -1, {}, 4); }, drop, "capacity", "-1", "at least 0"},
      {[] { drop_over_capacity(two_rows(), 1, {}, 0); }, drop, "num_experts", "0", "at least 1"},
      {[] { drop_over_capacity(two_rows(), 1, {}, kLargest); }, drop, "num_experts",
       "9223372036854775807", "is outside [1, 2147483647]"},
      {[&] { drop_over_capacity(high, 1, {}, 4); }, drop, "expert_idx", "1 ids", "outside [0, 4)"},
  });
}

TEST(MoEOptions, Experts) {
  const ExpertPlacement four = ExpertPlacement::contiguous(4, 2);
  const auto mlp = [&](const std::function<void(GroupedMLPOptions&)>& change, int rank = 0) {
    return [&four, change, rank] {
      GroupedMLPOptions options(4, 6);
      change(options);
      GroupedMLP(options, four, rank);
    };
  };
  const auto linear = [&](int64_t d_in, int64_t d_out, double bound) {
    return
        [=, &four] { GroupedLinear(GroupedLinearOptions(d_in, d_out).init_bound(bound), four, 0); };
  };
  const char* const name = "grouped_mlp";
  std::vector<Refused> rows = {
      {mlp([](auto& o) { o.d_model(0); }), name, "d_in", "0", "must be at least 1"},
      {mlp([](auto& o) { o.d_model(-3); }), name, "d_in", "-3", "must be at least 1"},
      {mlp([](auto& o) { o.d_model(kTooMany); }), name, "d_in", "2147483648", "below 2^31"},
      {mlp([](auto& o) { o.d_ff(0); }), name, "d_ff", "0", "is below 1"},
      {mlp([](auto& o) { o.d_ff(-1); }), name, "d_ff", "-1", "is below 1"},
      {mlp([](auto& o) { o.d_ff(kLargest); }), name, "d_ff", "9223372036854775807", "2147483647"},
      {mlp([](auto& o) { o.d_out(-2); }), name, "d_out", "-2", "must be at least 1"},
      {mlp([](auto& o) { o.d_out(kTooMany); }), name, "d_out", "2147483648", "below 2^31"},
      {mlp([](auto& o) { o.d_model(1 << 30).d_ff(1 << 30); }), name,
       "num_local_experts*d_ff*d_model", "[2, 2147483648, 1073741824]", "2^40 elements"},
      {mlp([](auto&) {}, 2), "expert_placement", "rank", "2", "must lie in [0, 2)"},
      {linear(0, 3, 0), "grouped_linear", "d_in", "0", "must be at least 1"},
      {linear(3, -1, 0), "grouped_linear", "d_out", "-1", "must be at least 1"},
      {linear(1 << 30, 1 << 30, 0), "grouped_linear", "num_local_experts*d_out*d_in",
       "[2, 1073741824, 1073741824]", "2^40 elements"},
  };
  for (const double bound : {-1., double(NAN), double(INFINITY)}) {
    const std::string value = to_text(bound);
    rows.push_back(
        {mlp([=](auto& o) { o.init_bound(bound); }), name, "init_bound", value, "finite"});
    rows.push_back({linear(3, 3, bound), "grouped_linear", "init_bound", value, "finite"});
  }
  expect_refused(rows);
}

TEST(MoEOptions, ModuleExperts) {
  const ExpertPlacement four = ExpertPlacement::contiguous(4, 2);
  const char* const name = "module_experts";
  const ExpertFactory good = [](int64_t) { return torch::nn::AnyModule(TwoLayers()); };
  const ExpertFactory empty = [](int64_t) { return torch::nn::AnyModule(); };
  const auto made = [&](int64_t d_in, int64_t d_out, const ExpertFactory& factory, int rank) {
    return [=, &four] { ModuleExperts(ModuleExpertsOptions(d_in, d_out), factory, four, rank); };
  };
  expect_refused({
      {made(0, 4, good, 0), name, "d_in", "0", "must be at least 1"},
      {made(3, -1, good, 0), name, "d_out", "-1", "must be at least 1"},
      {made(3, kTooMany, good, 0), name, "d_out", "2147483648", "below 2^31"},
      {made(3, 4, good, 2), "expert_placement", "rank", "2", "must lie in [0, 2)"},
      {made(3, 4, nullptr, 0), name, "factory", "empty", "must make the module of an expert"},
      {made(3, 4, empty, 1), name, "factory", "an empty module", "for expert 2"},
  });
}

TEST(MoEOptions, ExpertInputs) {
  const ExpertPlacement four = ExpertPlacement::contiguous(4, 1);
  const auto plan = make_routing_plan(two_rows(), four, comm::self_group());
  const auto other_plan = make_routing_plan(gates::routing_from_dense(at::ones({2, 5})),
                                            ExpertPlacement::contiguous(5, 1), comm::self_group());
  const at::Tensor rows = at::zeros({2, kDModel}, at::kDouble),
                   weights = at::ones({4, 1}, at::kDouble);
  for (const ExpertKind kind : {ExpertKind::kGatedBias, ExpertKind::kLinear, ExpertKind::kModule}) {
    const auto experts = make_experts(kind, four, 0, at::kDouble);
    const std::string name = experts->name();
    const auto call = [&](const at::Tensor& x, const at::Tensor& w, const PlanPtr& p) {
      return [=] { experts->forward(x, w, p); };
    };
    const at::Tensor wide_weights = at::ones({10, 1}, at::kDouble);
    expect_refused({
        {call(rows, weights, nullptr), name, "plan", "null", "make_routing_plan makes it"},
        {call({}, weights, plan), name, "rows", "undefined", "is no tensor"},
        {call(at::empty({2, kDModel}, meta(at::kDouble)), weights, plan), name, "device", "meta",
         "has no kernels"},
        {call(rows[0], weights, plan), name, "rows", "[6]", "must be [N, d_in] with d_in=6"},
        {call(at::zeros({2, 7}, at::kDouble), weights, plan), name, "rows", "[2, 7]", "d_in=6"},
        {call(at::zeros({3, 6}, at::kDouble), weights, plan), name, "rows", "[3, 6]", "num_rows=2"},
        {call(rows.to(at::kByte), weights, plan), name, "dtype", "Byte",
         "choose bf16, fp16, fp32 or fp64"},
        {call(rows.to(at::kInt), weights, plan), name, "dtype", "Int",
         "choose bf16, fp16, fp32 or fp64"},
        {call(rows, {}, plan), name, "weights", "undefined", "on the device of the rows"},
        {call(rows, weights[0], plan), name, "weights", "[1]", "must be [R, G] with R=4"},
        {call(rows, weights.to(at::kFloat), plan), name, "weights.dtype", "Float",
         "must be Double"},
        {call(rows, wide_weights, other_plan), name, "plan experts", "5",
         "differs from the 4 experts"},
    });
  }
}

TEST(MoEOptions, ExpertParameters) {
  const ExpertPlacement four = ExpertPlacement::contiguous(4, 1);
  const auto plan = make_routing_plan(two_rows(), four, comm::self_group());
  const at::Tensor rows = at::zeros({2, kDModel}), weights = at::ones({4, 1});
  for (const ExpertKind kind : {ExpertKind::kGatedBias, ExpertKind::kLinear}) {
    const auto experts = make_experts(kind, four, 0, at::kFloat);
    for (auto& parameter : experts->named_parameters()) {
      const at::Tensor before = parameter.value().detach().clone();
      std::string name = parameter.key();
      if (name.rfind("gate_", 0) == 0) name = name.substr(5);
      for (const at::Tensor& other : {before.slice(0, 1), before.slice(1, 1), before[0]}) {
        parameter.value().set_data(other.clone());
        expect_refused({{[&] { experts->forward(rows, weights, plan); }, experts->name(), name,
                         "Float" + to_text(other.sizes()), "is not " + to_text(before.sizes())}});
      }
      parameter.value().set_data(before);
    }
    experts->to(at::kDouble);
    expect_refused({{[&] { experts->forward(rows, weights, plan); }, experts->name(), "rows.dtype",
                     "Float", "differs from the experts' Double"}});
  }
}

TEST(MoEOptions, Plans) {
  const comm::Group self = comm::self_group();
  const ExpertPlacement four = ExpertPlacement::contiguous(4, 1);
  const auto plan = make_routing_plan(two_rows(), four, self);
  gates::Routing empty, high = two_rows(), short_rows = two_rows(), three = two_rows();
  high.expert_idx = high.expert_idx.add(1);
  short_rows.num_tokens = 3;
  three = gates::routing_from_dense(at::ones({3, 4}));
  const char* const make = "make_routing_plan";
  const auto made = [&](const gates::Routing& routing, const ExpertPlacement& placement) {
    return [=, &self] { make_routing_plan(routing, placement, self); };
  };
  const at::Tensor tokens = at::zeros({2, 6}), rows = at::zeros({2, 6}), weights = at::ones({4, 1});
  expect_refused({
      {made(high, four), make, "expert_idx", "4", "is outside [0, num_experts=4)"},
      {made(empty, four), make, "expert_idx", "undefined", "is not int32 [A]"},
      {made(short_rows, four), make, "expert_idx", "Int[4]", "num_tokens * top_k = 6"},
      {made(two_rows(), ExpertPlacement::contiguous(4, 2)), make, "placement.num_ranks", "2",
       "differs from the 1 ranks of the group"},
      {[] { make_dense_plan(-1); }, "make_dense_plan", "num_tokens", "-1", "[0, 2147483647]"},
      {[] { make_dense_plan(kTooMany); }, "make_dense_plan", "num_tokens", "2147483648", "[0, "},
      {[] { merge_routings({}); }, "merge_routings", "routings", "0", "is empty"},
      {[&] {
         merge_routings({two_rows(), three});
       },
       "merge_routings", "num_tokens", "3", "differs from num_tokens=2"},
      {[&] {
         merge_routings({two_rows(), empty});
       },
       "merge_routings", "expert_idx", "undefined", "is not int32 [A]"},
      {[&] { dispatch(tokens, nullptr, self); }, "dispatch", "plan", "null", "make_routing_plan"},
      {[&] { dispatch({}, plan, self); }, "dispatch", "dim", "-1", "is not 2"},
      {[&] {
         dispatch(at::zeros({3, 6}), plan, self);
       },
       "dispatch", "rows", "3", "from 2 rows"},
      {[&] {
         dispatch(at::zeros({2, 6}, at::kInt), plan, self);
       },
       "dispatch", "dtype", "Int", "bf16"},
      {[&] {
         dispatch(at::zeros({2, 6}, meta(at::kFloat)), plan, self);
       },
       "dispatch", "device", "meta", "has no kernels"},
      {[&] {
         combine(at::zeros({5, 6}), plan, self);
       },
       "combine", "rows", "5", "from 2 rows"},
      {[&] { combine(rows[0], plan, self); }, "combine", "dim", "1", "is not 2"},
      {[&] {
         dispatch_weights(at::ones({3, 1}), plan, self);
       },
       "dispatch_weights", "rows", "3", "differs from 4 rows"},
  });
}

/// Rank 1 of 2 is given what `call(true, ...)` is refused; both ranks throw, then `call(false,
/// ...)` works.
template <typename Expected>
void expect_one_rank_refused(const std::function<void(bool, const comm::Group&)>& call,
                             const std::string& mine, const std::string& peers) {
  comm::run_local(2, [&](const comm::Group& world) {
    world.set_timeout_ms(20000);
    std::string text = "no error";
    try {
      call(world.rank() == 1, world);
    } catch (const Expected& error) {
      text = error.what();
    } catch (const std::exception& error) {
      text = std::string("another kind of error: ") + error.what();
    }
    const std::string& part = world.rank() == 1 ? mine : peers;
    EXPECT_NE(text.find(part), std::string::npos) << "rank " << world.rank() << ": " << text;
    comm::barrier(world);
    EXPECT_NO_THROW(call(false, world));
  });
}

TEST(MoEOptions, OneRank) {
  const ExpertPlacement four = ExpertPlacement::contiguous(4, 2);
  const auto steps = [&](int wrong_step) {
    return [&four, wrong_step](bool is_wrong, const comm::Group& world) {
      const auto is = [&](int step) { return is_wrong && wrong_step == step; };
      gates::Routing routing = two_rows();
      if (is(0)) routing.expert_idx = routing.expert_idx.add(1);
      const auto plan = make_routing_plan(routing, four, world);
      const at::Tensor rows = dispatch(at::zeros({is(1) ? 3 : 2, 6}), plan, world);
      const at::Tensor weights =
          dispatch_weights(is(2) ? at::ones({4}) : at::ones({4, 1}), plan, world);
      combine(is(3) ? rows.slice(0, 1) : rows, is(4) ? nullptr : plan, world);
    };
  };
  const std::string peers = "arguments=refused of rank 1 before the exchange";
  expect_one_rank_refused<ConfigError>(steps(0), "[make_routing_plan] expert_idx=4 is outside",
                                       "[make_routing_plan] " + peers);
  expect_one_rank_refused<ConfigError>(steps(1), "[dispatch] rows=3 differs",
                                       "[dispatch] " + peers);
  expect_one_rank_refused<ConfigError>(steps(2), "[dispatch_weights] dim=1 is not 2",
                                       "[dispatch_weights] " + peers);
  expect_one_rank_refused<ConfigError>(steps(3), "[combine] rows=", "[combine] " + peers);
  expect_one_rank_refused<ConfigError>(steps(4), "[combine] plan=null", "[combine] " + peers);
}

TEST(MoEOptions, ParallelGroups) {
  for (const int64_t size : {int64_t{3}, int64_t{-2}, int64_t{8}, kLargest, -kLargest}) {
    comm::run_local(2, [&](const comm::Group& world) {
      expect_refused({{[&] { make_parallel_groups(world, size); }, "make_parallel_groups",
                       "ep_size", to_text(size), "does not divide world size 2"}});
      EXPECT_EQ(make_parallel_groups(world, 2).expert_parallel.size(), 2);
    });
  }
  expect_one_rank_refused<RanksDisagree>(
      [](bool is_wrong, const comm::Group& world) {
        make_parallel_groups(world, is_wrong ? 1 : 2);
      },
      "ep_size=2 from rank 0 differs from ep_size=1 from rank 1", "ep_size=2 from rank 0 differs");
}

TEST(MoEOptions, Gradients) {
  const auto with_gradient = [](const at::Tensor& wrong, double max_norm) {
    return [=](bool is_wrong, const comm::Group& world) {
      const ParallelGroups groups = make_parallel_groups(world, 2);
      torch::nn::Linear module(3, 2);
      module->to(is_wrong && wrong.defined() ? wrong.scalar_type() : at::kFloat);
      for (const at::Tensor& parameter : module->parameters()) {
        parameter.mutable_grad() = at::ones_like(parameter);
      }
      if (is_wrong && wrong.defined()) module->weight.mutable_grad() = wrong;
      if (max_norm == 0) {
        sum_gradients(*module, groups);
      } else {
        clip_grad_norm(*module, groups, is_wrong ? max_norm : 1);
      }
    };
  };
  const std::string refused = "refused by rank 1: ";
  for (const double max_norm : {0., 1.}) {
    const std::string name = max_norm == 0 ? "[sum_gradients] " : "[clip_grad_norm] ";
    const std::string sparse =
        name + "gradient=Float[2, 3] Sparse on cpu is not a dense CPU tensor";
    expect_one_rank_refused<ConfigError>(with_gradient(at::ones({2, 3}).to_sparse(), max_norm),
                                         sparse, refused + sparse);
    const std::string complex = name + "dtype=ComplexFloat is not supported";
    expect_one_rank_refused<ConfigError>(
        with_gradient(at::ones({2, 3}, at::kComplexFloat), max_norm), complex, refused + complex);
  }
  expect_one_rank_refused<RanksDisagree>(with_gradient({}, 2), "max_norm=1 from rank 0 differs",
                                         "differs from max_norm=2 from rank 1");
  const ParallelGroups one = make_parallel_groups(comm::self_group());
  torch::nn::Linear module(3, 2);
  for (const double x : {0., -1., double(NAN)}) {
    expect_refused({{[&] { clip_grad_norm(*module, one, x); }, "clip_grad_norm", "max_norm",
                     to_text(x), "must be above 0"}});
  }
  module->weight.mutable_grad() = at::full({2, 3}, NAN);
  expect_refused<Diverged>({{[&] { clip_grad_norm(*module, one, 1); }, "clip_grad_norm", "norm",
                             "nan", "is not finite"}});
}

}  // namespace
}  // namespace perseid::testing
