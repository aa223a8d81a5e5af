// Tokens carry (rank, row); token t of rank r goes to (t % 4) experts from expert (r + 2t) on.
//   RowsArrive      received rows are the tokens in (rank, token) order, each once per rank, or
//   once
//                   per assignment if strict; sorted places follow (expert, rank, token)
//   CombineSums     a token's output is the sum over its rows; a token without experts gets 0
//   IsTranspose     <dispatch x, y> == <x, combine y> summed over ranks, to 1e-12; weights likewise
//   Backward        autograd of each is the other, bit for bit
//   HotAndIdle      all tokens to one expert, all ranks but one without tokens, no token at all
//   EqualPlans      equal routing gives equal plans
#include <gtest/gtest.h>

#include <mutex>

#include "comm/collectives.h"
#include "moe/dispatch.h"
#include "tests/closed_form.h"

namespace perseid::testing {
namespace {

constexpr int64_t kTokensMax = 13, kExperts = 5, kWidth = 3;

int64_t tokens_of(int rank) { return rank == 1 ? 0 : kTokensMax - 2 * rank; }
int64_t count_of(int64_t token) { return token % 4; }
int32_t expert_of(int rank, int64_t token, int64_t choice) {
  return static_cast<int32_t>((rank + 2 * token + 3 * choice) % kExperts);
}

gates::Routing routing_of(int rank, int64_t num_tokens) {
  std::vector<int32_t> offsets = {0}, experts;
  std::vector<double> weights;
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t c = 0; c < count_of(t); ++c) {
      experts.push_back(expert_of(rank, t, c));
      weights.push_back(assignment_weight(rank, t, c, kTokensMax, 4));
    }
    offsets.push_back(static_cast<int32_t>(experts.size()));
  }
  gates::Routing routing;
  routing.num_tokens = num_tokens;
  routing.token_offsets = at::tensor(offsets, at::kInt);
  routing.expert_idx = at::tensor(experts, at::kInt);
  routing.weights = at::tensor(weights, at::kDouble);
  return routing;
}

void on_ranks(const std::function<void(const comm::Group&, bool strict)>& body) {
  for (const int num_ranks : {1, 2, 3, 4}) {
    for (const bool strict : {true, false}) {
      SCOPED_TRACE("P=" + std::to_string(num_ranks) + " strict=" + std::to_string(strict));
      comm::run_local(num_ranks, [&](const comm::Group& group) { body(group, strict); });
    }
  }
}

double summed(double value, const comm::Group& group) {
  comm::all_reduce(&value, 1, comm::ReduceOp::kSum, group);
  return value;
}

TEST(Dispatch, RowsArrive) {
  on_ranks([](const comm::Group& group, bool strict) {
    const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, group.size());
    const int64_t num_tokens = tokens_of(group.rank());
    const auto plan =
        make_routing_plan(routing_of(group.rank(), num_tokens), placement, group, {strict, {}});
    const at::Tensor rows = dispatch(
        closed_form_tokens(group.rank(), num_tokens, kWidth, kTokensMax, at::kDouble), plan, group);
    const at::Tensor weights =
        dispatch_weights(routing_of(group.rank(), num_tokens).weights.unsqueeze(1), plan, group);

    // What should have come, in (rank, token, choice) order.
    std::vector<double> expected_rows, expected_weights;
    std::vector<std::vector<double>> by_expert(
        static_cast<size_t>(placement.num_local_experts(group.rank())));
    for (int source = 0; source < group.size(); ++source) {
      for (int64_t t = 0; t < tokens_of(source); ++t) {
        bool is_sent = false;
        for (int64_t c = 0; c < count_of(t); ++c) {
          const int32_t expert = expert_of(source, t, c);
          if (placement.rank_of(expert) != group.rank()) continue;
          const double value = token_value(source, t, kTokensMax);
          if (!is_sent || (strict && group.size() > 1)) expected_rows.push_back(value);
          is_sent = true;
          expected_weights.push_back(assignment_weight(source, t, c, kTokensMax, 4));
          by_expert[static_cast<size_t>(placement.slot_of(expert))].push_back(value);
        }
      }
    }
    const auto expected =
        at::tensor(expected_rows, at::kDouble).unsqueeze(1).expand({-1, kWidth}).contiguous();
    EXPECT_TRUE(same_bits(rows, expected));
    EXPECT_TRUE(same_bits(weights, at::tensor(expected_weights, at::kDouble).unsqueeze(1)));

    std::vector<double> sorted;
    ASSERT_EQ(plan->local.expert_offsets.size(), by_expert.size() + 1);
    for (size_t e = 0; e < by_expert.size(); ++e) {
      EXPECT_EQ(plan->local.expert_offsets[e], static_cast<int64_t>(sorted.size()));
      sorted.insert(sorted.end(), by_expert[e].begin(), by_expert[e].end());
    }
    EXPECT_EQ(plan->local.num_assignments, static_cast<int64_t>(sorted.size()));
    const at::Tensor places = rows.index_select(0, plan->local.row_of_sorted()).select(1, 0);
    EXPECT_TRUE(same_bits(places.contiguous(), at::tensor(sorted, at::kDouble)));
  });
}

TEST(Dispatch, CombineSums) {
  on_ranks([](const comm::Group& group, bool strict) {
    const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, group.size());
    const int64_t num_tokens = tokens_of(group.rank());
    const auto plan =
        make_routing_plan(routing_of(group.rank(), num_tokens), placement, group, {strict, {}});
    const at::Tensor tokens =
        closed_form_tokens(group.rank(), num_tokens, kWidth, kTokensMax, at::kDouble);
    const at::Tensor home = combine(dispatch(tokens, plan, group), plan, group);
    ASSERT_EQ(home.size(0), num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) {
      std::vector<bool> is_hit(static_cast<size_t>(group.size()), false);
      for (int64_t c = 0; c < count_of(t); ++c) {
        is_hit[static_cast<size_t>(placement.rank_of(expert_of(group.rank(), t, c)))] = true;
      }
      const auto rows =
          strict && group.size() > 1 ? count_of(t) : std::count(is_hit.begin(), is_hit.end(), true);
      EXPECT_EQ(home[t][kWidth - 1].item<double>(),
                static_cast<double>(rows) * token_value(group.rank(), t, kTokensMax));
    }
  });
}

TEST(Dispatch, IsTranspose) {
  on_ranks([](const comm::Group& group, bool strict) {
    const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, group.size());
    const int64_t num_tokens = tokens_of(group.rank());
    const auto plan =
        make_routing_plan(routing_of(group.rank(), num_tokens), placement, group, {strict, {}});
    const auto seed = static_cast<uint64_t>(group.rank());
    const at::Tensor x = random_tensor({num_tokens, kWidth}, 10 + seed);
    const at::Tensor y = random_tensor({plan->local.num_rows, kWidth}, 20 + seed);
    const double forward = summed((dispatch(x, plan, group) * y).sum().item<double>(), group);
    const double backward = summed((x * combine(y, plan, group)).sum().item<double>(), group);
    EXPECT_NEAR(forward, backward, 1e-12 * (1 + std::abs(forward)));
    EXPECT_NE(forward, 0);
  });
}

TEST(Dispatch, Backward) {
  on_ranks([](const comm::Group& group, bool strict) {
    const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, group.size());
    const int64_t num_tokens = tokens_of(group.rank());
    const auto plan =
        make_routing_plan(routing_of(group.rank(), num_tokens), placement, group, {strict, {}});
    const auto seed = static_cast<uint64_t>(group.rank());
    at::Tensor x = random_tensor({num_tokens, kWidth}, 10 + seed).requires_grad_(true);
    at::Tensor y = random_tensor({plan->local.num_rows, kWidth}, 20 + seed).requires_grad_(true);
    at::Tensor w = random_tensor({plan->num_assignments, 2}, 30 + seed).requires_grad_(true);
    const at::Tensor sent = dispatch_weights(w, plan, group);
    dispatch(x, plan, group).backward(y.detach());
    EXPECT_TRUE(same_bits(x.grad(), combine(y.detach(), plan, group)));
    combine(y, plan, group).backward(x.detach());
    EXPECT_TRUE(same_bits(y.grad(), dispatch(x.detach(), plan, group)));
    sent.backward(sent.detach());  // there and back again
    EXPECT_TRUE(same_bits(w.grad(), w.detach()));
  });
}

TEST(Dispatch, HotAndIdle) {
  for (const int64_t busy_tokens : {0, 1, 7}) {
    for (const int busy_rank : {0, 2}) {
      comm::run_local(3, [&](const comm::Group& group) {
        gates::Routing routing;
        routing.num_tokens = group.rank() == busy_rank ? busy_tokens : 0;
        routing.top_k = 1;
        routing.expert_idx = at::full({routing.num_tokens}, 4, at::kInt);
        routing.weights = at::ones({routing.num_tokens}, at::kDouble);
        const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, group.size());
        const auto plan = make_routing_plan(routing, placement, group);
        const int64_t expected = placement.rank_of(4) == group.rank() ? busy_tokens : 0;
        EXPECT_EQ(plan->local.num_rows, expected);
        const at::Tensor tokens =
            closed_form_tokens(group.rank(), routing.num_tokens, kWidth, 7, at::kDouble);
        EXPECT_TRUE(same_bits(combine(dispatch(tokens, plan, group), plan, group), tokens));
      });
    }
  }
}

TEST(Dispatch, EqualPlans) {
  on_ranks([](const comm::Group& group, bool strict) {
    const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, group.size());
    const gates::Routing routing = routing_of(group.rank(), tokens_of(group.rank()));
    const auto a = make_routing_plan(routing, placement, group, {strict, {}});
    const auto b = make_routing_plan(routing, placement, group, {strict, {}});
    EXPECT_EQ(a->rows.recv_rows, b->rows.recv_rows);
    EXPECT_TRUE(same_bits(a->local.order, b->local.order));
    EXPECT_TRUE(same_bits(a->token_of_row, b->token_of_row));
    EXPECT_TRUE(same_bits(a->token_rows, b->token_rows));
  });
}

// One rank and a row for every token: dispatch is the tokens themselves, and the plan keeps only
// the order of rows.
TEST(Dispatch, OneRankCopiesNothing) {
  gates::Routing routing = gates::routing_from_table(
      at::tensor({0, 1, 2, 0, 1, 2}, at::kInt).view({3, 2}), at::ones({3, 2}), kExperts);
  const comm::Group group;
  const auto plan = make_routing_plan(routing, ExpertPlacement::contiguous(kExperts, 1), group);
  const at::Tensor tokens = at::ones({3, kWidth});
  EXPECT_EQ(dispatch(tokens, plan, group).const_data_ptr(), tokens.const_data_ptr());
  EXPECT_FALSE(plan->token_of_row.defined());
  EXPECT_FALSE(plan->assignment_order.defined());
  EXPECT_FALSE(plan->local.row_offsets.defined());
  EXPECT_EQ(plan->local.fixed, 2);
}

}  // namespace
}  // namespace perseid::testing
