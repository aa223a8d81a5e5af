// Routings made by hand: order of rows, ragged rows, masks, gradients, and what validate refuses.
#include "gates/routing.h"

#include <cmath>

#include "tests/gates/gate_test.h"
#include "tests/gradcheck.h"

namespace perseid::testing {
namespace {

TEST(Routing, FromTableSortsRows) {
  const Tensor experts = at::tensor({5, 2, 7, 0, 3, 1, 6, 4, 2}, at::kLong).view({3, 3});
  const Tensor weights = vector_of({1, 3, 2, .5, .5, .5, NAN, 0, 1}).view({3, 3});
  const Routing routing = gates::routing_from_table(experts, weights, 8);
  EXPECT_NO_THROW(gates::validate(routing, 8, "test"));
  EXPECT_EQ(routing.top_k, 3);
  EXPECT_FALSE(routing.token_offsets.defined());
  EXPECT_EQ(routing.expert_idx.scalar_type(), at::kInt);
  EXPECT_EQ(ids_of(routing.expert_idx), (std::vector<int64_t>{2, 7, 5, 0, 1, 3, 2, 4, 6}));
  EXPECT_TRUE(same_bits(routing.weights, vector_of({3, 2, 1, .5, .5, .5, 1, 0, NAN})));
  const Routing narrow =
      gates::routing_from_table(experts.to(at::kInt), weights.to(at::kBFloat16), 8);
  EXPECT_EQ(narrow.weights.scalar_type(), at::kFloat);
  EXPECT_TRUE(same_bits(narrow.expert_idx, routing.expert_idx));
  EXPECT_EQ(gates::routing_from_table(experts.slice(0, 0, 0), weights.slice(0, 0, 0), 8)
                .num_assignments(),
            0);
}

TEST(Routing, FromDenseKeepsPositive) {
  const Tensor weights =
      vector_of({0, .5, 0, .25, .75, .75, 1, 0, 0, 0, 0, 0, NAN, 0, 2, -1, -0., 1e-300, 0, 0})
          .view({5, 4});
  const Routing routing = gates::routing_from_dense(weights);
  EXPECT_NO_THROW(gates::validate(routing, 4, "test"));
  EXPECT_EQ(routing.num_tokens, 5);
  EXPECT_EQ(routing.top_k, 0);
  EXPECT_EQ(ids_of(routing.token_offsets), (std::vector<int64_t>{0, 2, 5, 5, 7, 8}));
  EXPECT_EQ(ids_of(routing.expert_idx), (std::vector<int64_t>{1, 3, 2, 0, 1, 2, 0, 1}));
  EXPECT_TRUE(same_bits(routing.weights, vector_of({.5, .25, 1, .75, .75, 2, NAN, 1e-300})));
  EXPECT_EQ(ids_of(gates::routing_from_dense(weights.slice(0, 0, 0)).token_offsets),
            (std::vector<int64_t>{0}));
}

TEST(Routing, FromMaskKeepsSelected) {
  const Tensor weights =
      vector_of({0, .5, 0, .25, .75, .75, 1, 0, NAN, -0., 0, -1, 3, 2, 2, 5}).view({4, 4});
  const Tensor is_selected = at::tensor({1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0}, at::kInt)
                                 .view({4, 4})
                                 .to(at::kBool);
  const Routing routing = gates::routing_from_mask(weights, is_selected);
  EXPECT_NO_THROW(gates::validate(routing, 4, "test"));
  EXPECT_EQ(routing.num_tokens, 4);
  EXPECT_EQ(routing.top_k, 0);
  EXPECT_EQ(ids_of(routing.token_offsets), (std::vector<int64_t>{0, 3, 6, 10, 10}));
  EXPECT_EQ(ids_of(routing.expert_idx), (std::vector<int64_t>{1, 3, 0, 2, 0, 1, 1, 2, 3, 0}));
  EXPECT_TRUE(same_bits(routing.weights, vector_of({.5, .25, 0, 1, .75, .75, -0., 0, -1, NAN})));
  EXPECT_EQ(gates::routing_from_mask(weights.to(at::kBFloat16), is_selected).weights.scalar_type(),
            at::kFloat);
  const Routing none = gates::routing_from_mask(weights.slice(0, 0, 0), is_selected.slice(0, 0, 0));
  EXPECT_EQ(ids_of(none.token_offsets), (std::vector<int64_t>{0}));

  const Tensor table = random_tensor({7, 5}, 3), chosen = random_tensor({7, 5}, 4).gt(0);
  EXPECT_TRUE(same_bits(gates::dense_weights(gates::routing_from_mask(table, chosen), 5),
                        at::where(chosen, table, 0.)));
  EXPECT_TRUE(gradients_match(
      [&] { return std::vector<Tensor>{gates::routing_from_mask(table, chosen).weights}; },
      {table}));
  const auto text = [](const Tensor& a, const Tensor& b) {
    return error_text<ConfigError>([&] { gates::routing_from_mask(a, b); });
  };
  EXPECT_EQ(text(chosen, chosen),
            "[routing_from_mask] weights=Bool[7, 5] is not a floating [T, E] table");
  EXPECT_EQ(text(table, table),
            "[routing_from_mask] is_selected=Double[7, 5] is not a bool table of the shape of "
            "weights=Double[7, 5]");
}

TEST(Routing, DenseIsInverse) {
  const Tensor weights = random_tensor({37, 5}, 1).relu();
  EXPECT_TRUE(same_bits(gates::dense_weights(gates::routing_from_dense(weights), 5), weights));
}

TEST(Routing, WithoutInvalid) {
  const Tensor weights = random_tensor({37, 5}, 1).relu();
  const Tensor valid = random_tensor({37}, 2).gt(0);
  const Routing ragged = gates::routing_from_dense(weights);
  const Routing masked = gates::without_invalid(ragged, valid);
  EXPECT_NO_THROW(gates::validate(masked, 5, "test"));
  EXPECT_EQ(masked.num_tokens, 37);
  EXPECT_TRUE(same_bits(gates::dense_weights(masked, 5), weights * valid.unsqueeze(1)));
  const Routing fixed = gates::routing_from_table(at::arange(2, at::kLong).expand({37, 2}),
                                                  random_tensor({37, 2}, 3, .1, 1), 5);
  const Routing masked_fixed = gates::without_invalid(fixed, valid);
  EXPECT_NO_THROW(gates::validate(masked_fixed, 5, "test"));
  EXPECT_TRUE(same_bits(gates::dense_weights(masked_fixed, 5),
                        gates::dense_weights(fixed, 5) * valid.unsqueeze(1)));
  const Routing none = gates::without_invalid(fixed, at::zeros({37}, at::kBool));
  EXPECT_EQ(none.num_assignments(), 0);
  EXPECT_NO_THROW(gates::validate(none, 5, "test"));
}

TEST(Routing, ExplicitOffsets) {
  Routing routing;
  routing.num_tokens = 3;
  routing.top_k = 2;
  routing.expert_idx = at::zeros({6}, at::kInt);
  EXPECT_TRUE(same_bits(gates::explicit_offsets(routing), at::tensor({0, 2, 4, 6}, at::kInt)));
  routing.num_tokens = 0;
  EXPECT_TRUE(same_bits(gates::explicit_offsets(routing), at::tensor({0}, at::kInt)));
}

TEST(Routing, Gradients) {
  const Tensor table = random_tensor({7, 3}, 1, .1, 1);
  const Tensor experts = random_tensor({7, 8}, 2).argsort(1, false).slice(1, 0, 3);
  const Tensor valid = at::tensor({1, 1, 0, 1, 0, 1, 1}, at::kInt).to(at::kBool);
  EXPECT_TRUE(gradients_match(
      [&] {
        const Routing routing = gates::routing_from_table(experts, table, 8);
        return std::vector<Tensor>{gates::dense_weights(routing, 8),
                                   gates::without_invalid(routing, valid).weights};
      },
      {table}));
  Tensor dense = random_tensor({7, 5}, 3);
  dense = dense * dense.abs().gt(.1);  // away from the kink
  EXPECT_TRUE(gradients_match(
      [&] { return std::vector<Tensor>{gates::routing_from_dense(dense.relu()).weights}; },
      {dense.masked_fill(dense.le(0), -1).clone()}));
}

TEST(Routing, CountAssignments) {
  const Routing routing =
      gates::routing_from_dense(vector_of({0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0}).view({4, 3}));
  const auto stats = gates::count_assignments(routing, 3, 3);
  EXPECT_EQ(ids_of(stats.tokens_per_expert), (std::vector<int64_t>{1, 1, 1}));
  EXPECT_EQ(stats.tokens_per_expert.scalar_type(), at::kLong);
  EXPECT_EQ(stats.num_tokens, 3);
  EXPECT_EQ(stats.num_assignments, 3);
  EXPECT_EQ(stats.tokens_without_expert, 1);
}

TEST(Routing, ValidateRefuses) {
  struct Case {
    void (*spoil)(Routing&);
    const char* text;
  };
  const Case cases[] = {
      {[](Routing& r) { r.num_tokens = -1; }, "[plan] num_tokens=-1 is outside [0, 2147483647]"},
      {[](Routing& r) { r.expert_idx = r.expert_idx.to(at::kLong); },
       "[plan] expert_idx=Long[4] is not int32 [A]"},
      {[](Routing& r) { r.expert_idx = Tensor(); }, "[plan] expert_idx=undefined is not int32 [A]"},
      {[](Routing& r) { r.weights = r.weights.slice(0, 1); },
       "[plan] weights=Double[3] is not float32 or float64 [A=4]"},
      {[](Routing& r) { r.weights = r.weights.to(at::kHalf); },
       "[plan] weights=Half[4] is not float32 or float64 [A=4]"},
      {[](Routing& r) { r.top_k = 4; }, "[plan] top_k=4 is outside [0, num_experts=3]"},
      {[](Routing& r) { r.top_k = 2; },
       "[plan] token_offsets=Int[4] is defined with top_k=2; leave one of them out"},
      {[](Routing& r) {
         r.token_offsets = Tensor();
         r.top_k = 2;
       },
       "[plan] expert_idx=Int[4] is not num_tokens * top_k = 6 long"},
      {[](Routing& r) { r.token_offsets = r.token_offsets.slice(0, 1); },
       "[plan] token_offsets=Int[3] is not int32 [num_tokens + 1 = 4]"},
      {[](Routing& r) {
         r.token_offsets = at::tensor({0, 1, 2, 3}, at::kInt);
       },
       "[plan] token_offsets=0..3 must run from 0 to the 4 assignments"},
      {[](Routing& r) {
         r.token_offsets = at::tensor({0, 2, 1, 4}, at::kInt);
       },
       "[plan] token_offsets=1 is not between 2 and 4 at token 1"},
      {[](Routing& r) {
         r.expert_idx = at::tensor({0, 1, 3, 1}, at::kInt);
       },
       "[plan] expert_idx=3 is outside [0, num_experts=3) at token 2"},
      {[](Routing& r) {
         r.expert_idx = at::tensor({0, -1, 2, 1}, at::kInt);
       },
       "[plan] expert_idx=-1 is outside [0, num_experts=3) at token 0"},
      {[](Routing& r) {
         r.expert_idx = at::tensor({0, 2, 1, 1}, at::kInt);
       },
       "[plan] expert_idx=1 is twice in the row of token 2"},
  };
  const auto legal = [] {
    Routing routing;
    routing.num_tokens = 3;
    routing.token_offsets = at::tensor({0, 2, 2, 4}, at::kInt);
    routing.expert_idx = at::tensor({0, 2, 2, 1}, at::kInt);
    routing.weights = vector_of({2, 1, 2, 1});
    return routing;
  };
  EXPECT_NO_THROW(gates::validate(legal(), 3, "plan"));
  for (const Case& item : cases) {
    Routing routing = legal();
    item.spoil(routing);
    EXPECT_EQ(error_text<ConfigError>([&] { gates::validate(routing, 3, "plan"); }), item.text);
  }
}

}  // namespace
}  // namespace perseid::testing
