// SparseLinear.
//   IsLinear        without a Sparsifier: output and gradients of at::linear, and finite
//   differences MaskedGradient  with one: gradient of the weight = that of at::linear times the
//   mask; those of x
//                   and of the bias by finite differences
//   GrowGradient    what the Sparsifier sums = gradient of at::linear(x, W * mask) over all
//   entries,
//                   with its sign, over the steps and passes of a window
//   FollowsTheMask  after each update products and gradients are those of the new mask
//   Lifetime        after the Sparsifier it is dense again; wrong shapes are named
#include "moe/sparse_linear.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "moe/sparse_presets.h"
#include "tests/config_error.h"
#include "tests/gradcheck.h"

namespace perseid {
namespace {

using testing::config_error;
using testing::gradients_match;

SparseLinear make_linear(int64_t in, int64_t out, uint64_t seed = 1) {
  return SparseLinear(SparseLinearOptions(in, out).dtype(at::kDouble).seed(seed));
}
at::Tensor mask_of(const Sparsifier& sparsifier, const UnitKey& key) {
  return position_mask(sparsifier.layout(key), sparsifier.mask(key));
}

TEST(SparseLinear, IsLinear) {
  SparseLinear linear = make_linear(5, 7);
  const at::Tensor x = at::randn({3, 2, 5}, at::kDouble);
  EXPECT_TRUE(
      at::allclose(linear->forward(x), at::linear(x, linear->weight, linear->bias), 1e-13, 1e-14));
  EXPECT_TRUE(gradients_match([&] { return std::vector<at::Tensor>{linear->forward(x)}; },
                              {x, linear->weight, linear->bias}));
  EXPECT_EQ(linear->forward(at::zeros({0, 5}, at::kDouble)).sizes(), (std::vector<int64_t>{0, 7}));
}

TEST(SparseLinear, MaskedGradient) {
  // Below density 0.1 by sparse products, above by dense ones; blocks by both.
  struct Case {
    double density;
    int64_t nnz;
    Structure structure;
  };
  for (const Case& c : std::vector<Case>{{0.3, 270, Structure::unstructured()},
                                         {0.1, 90, Structure::unstructured()},
                                         {0.08, 72, Structure::blocks(3, 2)},
                                         {0.2, 180, Structure::blocks(3, 2)}}) {
    SparseLinear linear = make_linear(50, 18);
    SparsifierConfig config = presets::static_mask(c.density);
    config.structure = c.structure;
    Sparsifier sparsifier({linear->unit()}, config);
    const at::Tensor mask = mask_of(sparsifier, {});
    EXPECT_EQ(mask.sum().item<int64_t>(), c.nnz);
    EXPECT_TRUE(at::equal(linear->weight.eq(0), mask.logical_not()));
    for (const int64_t rows : {6, 1, 0}) {
      const at::Tensor x = at::randn({rows, 50}, at::kDouble).requires_grad_(true);
      const at::Tensor cotangent = at::randn({rows, 18}, at::kDouble);
      linear->zero_grad();
      const at::Tensor y = linear->forward(x);
      (y * cotangent).sum().backward();
      const at::Tensor dense = linear->weight.detach().clone().requires_grad_(true);
      const at::Tensor dense_x = x.detach().clone().requires_grad_(true);
      const at::Tensor dense_y = at::linear(dense_x, dense, linear->bias.detach());
      (dense_y * cotangent).sum().backward();
      EXPECT_TRUE(at::allclose(y, dense_y, 1e-12, 1e-13));
      EXPECT_TRUE(at::allclose(x.grad(), dense_x.grad(), 1e-12, 1e-13));
      EXPECT_TRUE(at::allclose(linear->weight.grad(), dense.grad() * mask, 1e-12, 1e-13));
      EXPECT_TRUE(linear->weight.grad().masked_select(mask.logical_not()).eq(0).all().item<bool>());
    }
    const at::Tensor x = at::randn({2, 3, 50}, at::kDouble);
    EXPECT_TRUE(gradients_match([&] { return std::vector<at::Tensor>{linear->forward(x)}; },
                                {x, linear->bias}));
  }
}

TEST(SparseLinear, GrowGradient) {
  for (const double density : {0.3, 0.1}) {
    SparseLinear linear = make_linear(30, 9);
    SparsifierConfig config = presets::rigl(density, 1000, 10);
    config.schedule.begin = 10;
    config.grad_accum = 4;
    Sparsifier sparsifier({linear->unit()}, config);
    const at::Tensor mask = mask_of(sparsifier, {});
    at::Tensor expected = at::zeros({9, 30}, at::kDouble);
    for (int64_t step = 0; step < 10; ++step) {
      const StepPlan plan = sparsifier.begin_step(step);
      EXPECT_EQ(plan.actions[0], step < 7 ? UnitAction::kNone : UnitAction::kAccumulate);
      for (int pass = 0; pass < 2; ++pass) {
        const at::Tensor x = at::randn({6, 30}, at::kDouble);
        const at::Tensor cotangent = at::randn({6, 9}, at::kDouble);
        (linear->forward(x) * cotangent).sum().backward();
        const at::Tensor dense = linear->weight.detach().clone().requires_grad_(true);
        (at::linear(x, dense * mask) * cotangent).sum().backward();
        // Of the product W * mask, at all entries.
        const at::Tensor product = (linear->weight.detach() * mask).requires_grad_(true);
        (at::linear(x, product) * cotangent).sum().backward();
        if (step >= 7) expected += product.grad();
      }
      sparsifier.end_backward(step);
      sparsifier.end_step(step);
      const at::Tensor sum = sparsifier.state_dict().units[0].grad_sum;
      ASSERT_EQ(sum.defined(), step >= 7);
      if (sum.defined()) {
        EXPECT_TRUE(at::allclose(sum, expected, 1e-12, 1e-14));
      }
    }
  }
}

TEST(SparseLinear, FollowsTheMask) {
  SparseLinear linear = make_linear(30, 20);
  SparsifierConfig config = presets::set(1, 1, 50);
  config.min_rows = 1;
  Sparsifier sparsifier({linear->unit()}, config);
  ASSERT_LE(sparsifier.stats({}).density, 0.1);  // so that products are sparse
  int64_t num_grown = 0;
  for (int64_t step = 0; step < 10; ++step) {
    sparsifier.begin_step(step);
    linear->zero_grad();
    const at::Tensor x = at::randn({6, 30}, at::kDouble);
    const at::Tensor y = linear->forward(x);
    y.square().sum().backward();
    const at::Tensor dense = linear->weight.detach().clone().requires_grad_(true);
    const at::Tensor dense_y = at::linear(x, dense, linear->bias.detach());
    dense_y.square().sum().backward();
    EXPECT_TRUE(at::allclose(y, dense_y, 1e-12, 1e-13));
    // Before end_backward, which would hide a gradient at the wrong places.
    EXPECT_TRUE(
        at::allclose(linear->weight.grad(), dense.grad() * mask_of(sparsifier, {}), 1e-12, 1e-12));
    sparsifier.end_backward(step);
    num_grown += sparsifier.end_step(step).units.at(0).num_grown;
  }
  EXPECT_GT(num_grown, 50);
}

TEST(SparseLinear, Lifetime) {
  SparseLinear linear = make_linear(5, 7);
  {
    const Sparsifier sparsifier({linear->unit()}, presets::static_mask(0.5));
    EXPECT_GT(linear->unit().link->active.num_places(), 0);
    EXPECT_EQ(config_error([&] { Sparsifier({linear->unit()}, presets::static_mask(0.5)); }),
              "[sparsifier] units=layer 0, expert 0, weight belongs to another Sparsifier");
    EXPECT_GT(linear->unit().link->active.num_places(), 0);
  }
  EXPECT_EQ(linear->unit().link->active.num_places(), 0);
  const at::Tensor x = at::randn({6, 5}, at::kDouble);
  linear->forward(x).sum().backward();
  EXPECT_FALSE(linear->weight.grad().eq(0).any().item<bool>());
  EXPECT_EQ(config_error([&] {
              linear->forward(at::zeros({2, 6}, at::kDouble));
            }),
            "[sparse_linear] x=[2, 6] does not end with in_features=5");
  EXPECT_EQ(config_error([&] { SparseLinear(0, 6); }), "[sparse_linear] in_features=0 is below 1");
}

}  // namespace
}  // namespace perseid
