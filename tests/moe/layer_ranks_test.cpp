// P ranks against one process: outputs, losses and all gradients, float64, to 1e-12.
//   EqualsOneProcess  P = 1, 2, 4; every ep_size; uneven tokens, a rank without tokens, a rank
//                     without experts; one and two gates; every kind of expert
//   SameBits          strict: outputs and expert gradients have the same bits at P = 1, 2, 4
//   OneRankRefuses    a wrong argument, or a NaN, on one rank: every rank throws
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <numeric>

#include "kernels/error.h"
#include "moe/gradients.h"
#include "tests/moe/layer_fixture.h"

namespace perseid::testing {
namespace {

constexpr int64_t kTokens = 37;

/// Tokens [first, first + count) of each rank.
std::vector<int64_t> shares(int num_ranks) {
  switch (num_ranks) {
    case 1:
      return {kTokens};
    case 2:
      return {30, 7};
    case 3:
      return {37, 0, 0};
    default:
      return {20, 0, 6, 11};
  }
}

int64_t first_of(int rank, int num_ranks) {
  const std::vector<int64_t> all = shares(num_ranks);
  int64_t first = 0;
  for (int r = 0; r < rank; ++r) first += all[static_cast<size_t>(r)];
  return first;
}

/// What a step gives, in global order.
struct Result {
  std::vector<at::Tensor> outputs;               ///< by rank, gates side by side
  std::vector<at::Tensor> token_gradients;       ///< by rank
  std::map<std::string, at::Tensor> parameters;  ///< gradients; experts by "name/global id"
  double loss = 0;

  at::Tensor all_outputs() const { return at::cat(outputs); }
  at::Tensor all_token_gradients() const { return at::cat(token_gradients); }
};

Result run(const LayerCase& c, int num_ranks, int64_t ep_size, at::ScalarType dtype) {
  Result result;
  result.outputs.resize(static_cast<size_t>(num_ranks));
  result.token_gradients.resize(static_cast<size_t>(num_ranks));
  std::mutex mutex;
  comm::run_local(num_ranks, [&](const comm::Group& world) {
    const ParallelGroups groups = make_parallel_groups(world, ep_size);
    const auto layer = make_layer(c, groups, dtype);
    const int64_t first = first_of(world.rank(), num_ranks);
    at::Tensor tokens = case_tokens(kTokens, dtype)
                            .narrow(0, first, shares(num_ranks)[static_cast<size_t>(world.rank())])
                            .clone()
                            .requires_grad_(true);
    const MoEOutput out = layer->forward(tokens);
    const at::Tensor loss = weighted_loss(out.outputs, first) + out.loss();
    loss.backward();
    sum_gradients(*layer, groups);

    const std::lock_guard lock(mutex);
    const auto rank = static_cast<size_t>(world.rank());
    result.loss += loss.item<double>();
    result.outputs[rank] = at::cat(out.outputs, 1).detach();
    result.token_gradients[rank] = tokens.grad();
    for (const auto& parameter : layer->named_parameters()) {
      const at::Tensor& gradient = parameter.value().grad();
      const std::string& name = parameter.key();
      if (name.rfind("experts.", 0) != 0 || c.kind == ExpertKind::kModule) {
        result.parameters[name] = gradient;
        continue;
      }
      const auto& ids = layer->experts()->expert_ids();
      for (size_t slot = 0; slot < ids.size(); ++slot) {
        result.parameters[name + "/" + std::to_string(ids[slot])] =
            gradient[static_cast<int64_t>(slot)];
      }
    }
  });
  return result;
}

TEST(LayerRanks, EqualsOneProcess) {
  at::set_num_threads(1);
  int64_t index = 0;
  for (const int64_t num_experts : {3, 5, 8}) {
    for (const ExpertKind kind :
         {ExpertKind::kPlain, ExpertKind::kGated, ExpertKind::kLinear, ExpertKind::kModule}) {
      for (const int num_gates : {1, 2}) {
        LayerCase c{num_experts, 3, kTokens, num_gates, kind, {}};
        c.shared = kind == ExpertKind::kGated;
        const Result one = run(c, 1, 1, at::kDouble);
        for (const int num_ranks : {2, 3, 4}) {
          for (int64_t ep_size = 1; ep_size <= num_ranks; ++ep_size) {
            if (num_ranks % ep_size != 0) continue;
            for (const bool strict : {true, false}) {
              if (!takes_case(index++)) continue;
              SCOPED_TRACE("E=" + std::to_string(num_experts) +
                           " kind=" + std::to_string(static_cast<int>(kind)) +
                           " G=" + std::to_string(num_gates) + " P=" + std::to_string(num_ranks) +
                           " ep=" + std::to_string(ep_size) + " strict=" + std::to_string(strict));
              c.strict = strict;
              const Result many = run(c, num_ranks, ep_size, at::kDouble);
              EXPECT_TRUE(close_to(many.all_outputs(), one.all_outputs(), 1e-12));
              EXPECT_TRUE(close_to(many.all_token_gradients(), one.all_token_gradients(), 1e-12));
              EXPECT_NEAR(many.loss, one.loss, 1e-12 * std::abs(one.loss));
              ASSERT_EQ(many.parameters.size(), one.parameters.size());
              for (const auto& [name, gradient] : one.parameters) {
                ASSERT_EQ(many.parameters.count(name), 1u) << name;
                EXPECT_TRUE(close_to(many.parameters.at(name), gradient, 1e-12)) << name;
              }
              if (HasFailure()) return;
            }
          }
        }
      }
    }
  }
}

// No rank has a token, or one rank has tokens that are all masked.
TEST(LayerRanks, NoTokensAnywhere) {
  at::set_num_threads(1);
  for (const bool has_masked : {false, true}) {
    comm::run_local(3, [&](const comm::Group& world) {
      const int64_t count = has_masked && world.rank() == 1 ? 5 : 0;
      const ParallelGroups groups = make_parallel_groups(world);
      const auto layer = make_layer(LayerCase(), groups);
      const at::Tensor tokens = case_tokens(count).clone().set_requires_grad(true);
      MoEInput input(tokens);
      input.valid = at::zeros({count}, at::kBool);
      const MoEOutput out = layer->forward(input);
      EXPECT_EQ(out.stats.rows_processed, 0);
      const at::Tensor loss = out.output().sum() + out.loss();
      EXPECT_EQ(loss.item<double>(), 0);
      loss.backward();
      sum_gradients(*layer, groups);
      for (const auto& parameter : layer->named_parameters()) {
        const at::Tensor& gradient = parameter.value().grad();
        EXPECT_TRUE(gradient.defined() && !gradient.ne(0).any().item<bool>()) << parameter.key();
      }
    });
  }
}

// Ranks with different numbers of tokens have different capacities; each drops as if it were alone.
TEST(LayerRanks, CapacityOfEachRank) {
  at::set_num_threads(1);
  for (const DropPolicy policy : {DropPolicy::kPosition, DropPolicy::kProbability}) {
    for (const int num_ranks : {2, 3, 4}) {
      LayerCase c;
      c.capacity.capacity_factor = .7;
      c.capacity.drop_policy = policy;
      std::mutex mutex;
      int64_t dropped_together = 0, dropped_alone = 0;
      comm::run_local(num_ranks, [&](const comm::Group& world) {
        const auto rank = static_cast<size_t>(world.rank());
        const std::vector<int64_t> all = shares(num_ranks);
        const int64_t first = std::accumulate(all.begin(), all.begin() + world.rank(), int64_t{0});
        const at::Tensor tokens = case_tokens(kTokens).narrow(0, first, all[rank]);
        const MoEOutput together =
            make_layer(c, make_parallel_groups(world))->forward(MoEInput(tokens));
        const MoEOutput alone =
            make_layer(c, make_parallel_groups(comm::self_group()))->forward(MoEInput(tokens));
        const std::lock_guard lock(mutex);
        EXPECT_TRUE(close_to(together.output(), alone.output(), 1e-12)) << rank;
        dropped_together = together.stats.num_dropped;
        dropped_alone += alone.stats.num_dropped;
      });
      EXPECT_EQ(dropped_together, dropped_alone);
      EXPECT_GT(dropped_alone, 0);
    }
  }
}

/// Weights that depend on the global token alone, so that only the movement of rows is compared.
class FixedGate : public gates::Gate {
 public:
  FixedGate() : Gate("fixed_gate", 5, 3) {}
  gates::GateOutput forward(const gates::GateInput& input) override {
    const int64_t num_tokens = input.tokens.size(0);
    at::Tensor ids = at::empty({num_tokens, 3}, at::kInt);
    at::Tensor weights = at::empty({num_tokens, 3});
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t k = 0; k < 3; ++k) {
        const int64_t token = input.first_token + t;
        ids[t][k] = (token * 2 + k) % 5;
        weights[t][k] = 1.0 / static_cast<double>(3 + token + 7 * k);
      }
    }
    gates::GateOutput out;
    out.routing = gates::routing_from_table(ids, weights, 5);
    out.stats = gates::count_assignments(out.routing, 5, num_tokens);
    return out;
  }
};

TEST(LayerRanks, SameBits) {
  at::set_num_threads(1);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
    std::map<int, std::map<int64_t, at::Tensor>> gradients;  // by P, by expert
    std::map<int, at::Tensor> outputs;
    for (const int num_ranks : {1, 2, 4}) {
      std::vector<at::Tensor> parts(static_cast<size_t>(num_ranks));
      std::mutex mutex;
      comm::run_local(num_ranks, [&](const comm::Group& world) {
        const ParallelGroups groups = make_parallel_groups(world);
        const ExpertPlacement placement = ExpertPlacement::contiguous(5, num_ranks);
        const auto experts = make_experts(ExpertKind::kGated, placement, world.rank(), dtype);
        MoELayer layer({std::make_shared<FixedGate>()}, experts, placement, groups);
        const int64_t first = first_of(world.rank(), num_ranks);
        const at::Tensor tokens =
            case_tokens(kTokens, dtype)
                .narrow(0, first, shares(num_ranks)[static_cast<size_t>(world.rank())]);
        const MoEOutput out = layer.forward(tokens);
        weighted_loss(out.outputs, first).backward();
        const std::lock_guard lock(mutex);
        parts[static_cast<size_t>(world.rank())] = out.output().detach();
        for (size_t slot = 0; slot < experts->expert_ids().size(); ++slot) {
          const auto& up = dynamic_cast<GroupedMLP&>(*experts).up_proj;
          gradients[num_ranks][experts->expert_ids()[slot]] =
              up.grad()[static_cast<int64_t>(slot)].clone();
        }
      });
      outputs[num_ranks] = at::cat(parts);
    }
    for (const int num_ranks : {2, 4}) {
      EXPECT_TRUE(same_bits(outputs[num_ranks], outputs[1])) << dtype << " P=" << num_ranks;
      for (int64_t e = 0; e < 5; ++e) {
        EXPECT_TRUE(same_bits(gradients[num_ranks][e], gradients[1][e]))
            << dtype << " P=" << num_ranks << " expert " << e;
      }
    }
  }
}

TEST(LayerRanks, ThreadsDoNotChangeBits) {
  LayerCase c{5, 3, kTokens, 1, ExpertKind::kGated, {}};
  at::set_num_threads(1);
  const Result one = run(c, 1, 1, at::kFloat);
  at::set_num_threads(2);
  const Result two = run(c, 1, 1, at::kFloat);
  EXPECT_TRUE(same_bits(two.all_outputs(), one.all_outputs()));
  for (const auto& [name, gradient] : one.parameters) {
    EXPECT_TRUE(same_bits(two.parameters.at(name), gradient)) << name;
  }
}

TEST(LayerRanks, OneRankRefuses) {
  at::set_num_threads(1);
  for (const bool is_nan : {false, true}) {
    std::vector<std::string> texts(3);
    comm::run_local(3, [&](const comm::Group& world) {
      const ParallelGroups groups = make_parallel_groups(world);
      const auto layer = make_layer({}, groups);
      at::Tensor tokens = case_tokens(4);
      if (world.rank() == 1) {
        if (is_nan)
          tokens[2][0] = NAN;
        else
          tokens = at::zeros({4, 9}, at::kDouble);
      }
      try {
        layer->forward(tokens);
      } catch (const Error& error) {
        texts[static_cast<size_t>(world.rank())] = error.what();
        EXPECT_EQ(error.exit_code(), is_nan ? 79 : 64);
      }
      // The group is still usable.
      EXPECT_EQ(layer->forward(case_tokens(4)).output().size(0), 4);
    });
    const std::string cause = is_nan ? "non_finite_tokens=1" : "tokens.width=9";
    for (const std::string& text : texts) {
      EXPECT_NE(text.find(cause), std::string::npos) << text;
    }
    EXPECT_NE(texts[0].find("refused by rank 1"), std::string::npos) << texts[0];
  }
}

}  // namespace
}  // namespace perseid::testing
