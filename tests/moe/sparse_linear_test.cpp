// SparseLinear.
//   IsLinear        without a Sparsifier: output and gradients of at::linear, and finite
//   differences MaskedGradient  with one: gradient of the weight = that of at::linear times the
//   mask; those of x
//                   and of the bias by finite differences
//   GrowGradient    what the Sparsifier sums = gradient of at::linear(x, W * mask) over all
//   entries,
//                   with its sign, over the steps and passes of a window
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
  SparseLinear linear = make_linear(13, 9);
  Sparsifier sparsifier({linear->unit()}, presets::static_mask(0.3));
  const at::Tensor mask = mask_of(sparsifier, {});
  EXPECT_EQ(mask.sum().item<int64_t>(), 35);
  EXPECT_TRUE(at::equal(linear->weight.eq(0), mask.logical_not()));
  const at::Tensor x = at::randn({6, 13}, at::kDouble);
  const at::Tensor cotangent = at::randn({6, 9}, at::kDouble);
  (linear->forward(x) * cotangent).sum().backward();
  const at::Tensor dense = linear->weight.detach().clone().requires_grad_(true);
  (at::linear(x, dense, linear->bias.detach()) * cotangent).sum().backward();
  EXPECT_TRUE(at::allclose(linear->weight.grad(), dense.grad() * mask, 1e-12, 0));
  EXPECT_TRUE(gradients_match([&] { return std::vector<at::Tensor>{linear->forward(x)}; },
                              {x, linear->bias}));
}

TEST(SparseLinear, GrowGradient) {
  SparseLinear linear = make_linear(13, 9);
  SparsifierConfig config = presets::rigl(0.3, 1000, 10);
  config.schedule.begin = 10;
  config.grad_accum = 4;
  Sparsifier sparsifier({linear->unit()}, config);
  const at::Tensor mask = mask_of(sparsifier, {});
  at::Tensor expected = at::zeros({9, 13}, at::kDouble);
  for (int64_t step = 0; step < 10; ++step) {
    const StepPlan plan = sparsifier.begin_step(step);
    EXPECT_EQ(plan.actions[0], step < 7 ? UnitAction::kNone : UnitAction::kAccumulate);
    for (int pass = 0; pass < 2; ++pass) {
      const at::Tensor x = at::randn({6, 13}, at::kDouble);
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

TEST(SparseLinear, Lifetime) {
  SparseLinear linear = make_linear(5, 7);
  {
    const Sparsifier sparsifier({linear->unit()}, presets::static_mask(0.5));
    EXPECT_TRUE(linear->unit().link->inactive.defined());
  }
  EXPECT_FALSE(linear->unit().link->inactive.defined());
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
