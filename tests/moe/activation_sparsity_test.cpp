// Activation sparsity of grouped experts.
//   ReferenceVector   z = (1,2,3,4,5,6,7,10), k = 2: max(z - theta, 0) to 10 digits, both forms
//   TopKIsMasked      top_k = a sum over plain operations with a mask made by hand, ties to the
//                     smaller index, and their gradients
//   AllIsDense        top_k with k = F: output and gradients of the dense expert, bit for bit
//   Gradients         finite differences: top_k and both std forms, plain and gated, one gate and
//                     two, with biases; a detached threshold against its formula
//   EqualValues       std 0: nothing is active, gradients are finite
//   ActiveHidden      counts of each expert; ReLU alone; float32 and bfloat16
//   Refused           k, and NaN stays visible
// What autograd keeps: layer_memory_test.cpp.
#include "moe/activation_sparsity.h"

#include <cmath>

#include "kernels/statistical_top_k.h"
#include "moe/sparse_pre.h"
#include "tests/config_error.h"
#include "tests/gradcheck.h"
#include "tests/moe/layer_fixture.h"

namespace perseid::testing {
namespace {

using kernels::Activation;

at::Tensor reference_z() { return at::tensor({1., 2., 3., 4., 5., 6., 7., 10.}, at::kDouble); }

TEST(ActivationSparsity, ReferenceVector) {
  const at::Tensor z = reference_z().view({1, 8});
  EXPECT_NEAR(kernels::normal_upper_quantile(2.0 / 8), 0.6744897502, 1e-10);
  ActivationSparsity sparsity = ActivationSparsity::statistical_top_k(2);
  const at::Tensor found = SparsePre(z, 8, sparsity).rows()[0];
  EXPECT_EQ(found.slice(0, 0, 6).abs().sum().item<double>(), 0);
  EXPECT_NEAR(found[6].item<double>(), 0.4105463727, 1e-10);
  EXPECT_NEAR(found[7].item<double>(), 3.4105463727, 1e-10);
  sparsity.unbiased = true;
  EXPECT_NEAR(SparsePre(z, 8, sparsity).rows()[0][7].item<double>(), 10 - 6.7164586435, 1e-10);
  EXPECT_TRUE(at::equal(SparsePre(z, 8, ActivationSparsity::top_k(2)).rows()[0],
                        at::tensor({0., 0., 0., 0., 0., 0., 7., 10.}, at::kDouble)));
  // Gated: the second half is the other branch.
  const at::Tensor both = at::cat({z, -z}, 1);
  const at::Tensor gated = SparsePre(both, 8, sparsity).rows();
  EXPECT_TRUE(at::equal(gated.slice(1, 8), -z));
  EXPECT_NEAR(gated[0][7].item<double>(), 10 - 6.7164586435, 1e-10);
  EXPECT_TRUE(SparsePre(both, 8, {}).rows().is_same(both));
}

struct Case {
  bool gated;
  Activation activation;
  bool bias;
  int64_t num_gates;
  ActivationSparsity sparsity;
};

/// Experts of F = 7 for rows with some assignments.
struct Experiment {
  explicit Experiment(const Case& c, at::ScalarType type = at::kDouble) {
    const ExpertPlacement placement = ExpertPlacement::contiguous(3, 1);
    experts = std::make_shared<GroupedMLP>(GroupedMLPOptions(kDModel, kDFf)
                                               .d_out(kDOut)
                                               .gated(c.gated)
                                               .activation(c.activation)
                                               .bias(c.bias)
                                               .init_bound(1)
                                               .seed(4)
                                               .activation_sparsity(c.sparsity),
                                           placement, 0);
    experts->to(type);
    if (c.bias) {
      const at::NoGradGuard no_grad;
      experts->up_bias.copy_(random_tensor(experts->up_bias.sizes(), 11));
      experts->down_bias.copy_(random_tensor(experts->down_bias.sizes(), 12));
    }
    gates::Routing routing;
    routing.num_tokens = 5;
    routing.token_offsets = at::tensor({0, 2, 3, 3, 5, 6}, at::kInt);
    routing.expert_idx = at::tensor({0, 1, 1, 0, 1, 0}, at::kInt);  // expert 2 has no rows
    weights = random_tensor({6, c.num_gates}, 21).to(type == at::kDouble ? type : at::kFloat);
    routing.weights = weights.select(1, 0);
    auto made = std::make_shared<RoutingPlan>();
    made->local = make_local_plan(routing, 3);
    plan = made;
    rows = random_tensor({5, kDModel}, 22).to(type);
  }
  at::Tensor forward() { return experts->forward(rows, weights, plan); }
  std::vector<at::Tensor> inputs() const {
    std::vector<at::Tensor> all = {rows, weights};
    for (const at::Tensor& parameter : experts->parameters()) all.push_back(parameter);
    return all;
  }

  std::shared_ptr<GroupedMLP> experts;
  at::Tensor rows, weights;
  std::shared_ptr<const RoutingPlan> plan;
};
std::vector<Case> shapes_with(const ActivationSparsity& sparsity) {
  return {{false, Activation::kRelu, false, 1, sparsity},
          {false, Activation::kGelu, true, 2, sparsity},
          {true, Activation::kSilu, false, 1, sparsity},
          {true, Activation::kGelu, true, 1, sparsity},
          {true, Activation::kSilu, true, 2, sparsity}};
}

/// The k largest of each row by counting.
at::Tensor kept_by_hand(const at::Tensor& z, int64_t k) {
  const at::Tensor kept = at::zeros(z.sizes(), at::kBool);
  for (int64_t r = 0; r < z.size(0); ++r) {
    for (int64_t i = 0; i < z.size(1); ++i) {
      int64_t num_before = 0;
      for (int64_t j = 0; j < z.size(1); ++j) {
        const double mine = z[r][i].item<double>(), its = z[r][j].item<double>();
        num_before += its > mine || (its == mine && j < i) ? 1 : 0;
      }
      kept[r][i] = num_before < k;
    }
  }
  return kept;
}
/// The experiment by plain operations on every pair.
at::Tensor plain_forward(Experiment& e, const Case& c) {
  const std::vector<int64_t> row_of = {0, 0, 1, 3, 3, 4}, expert_of = {0, 1, 1, 0, 1, 0};
  std::vector<at::Tensor> outputs(5, at::zeros({c.num_gates * kDOut}, at::kDouble));
  for (size_t a = 0; a < 6; ++a) {
    const int64_t expert = expert_of[a];
    at::Tensor pre = at::mv(e.experts->up_proj[expert], e.rows[row_of[a]]);
    if (c.bias) pre = pre + e.experts->up_bias[expert];
    at::Tensor z = pre.slice(0, 0, kDFf);
    z = z * kept_by_hand(z.detach().view({1, -1}), c.sparsity.k)[0];
    at::Tensor hidden = c.activation == Activation::kRelu   ? z.relu()
                        : c.activation == Activation::kGelu ? at::gelu(z)
                                                            : at::silu(z);
    if (c.gated) hidden = hidden * pre.slice(0, kDFf);
    at::Tensor y = at::mv(e.experts->down_proj[expert], hidden);
    if (c.bias) y = y + e.experts->down_bias[expert];
    at::Tensor& output = outputs[static_cast<size_t>(row_of[a])];
    output = output + (e.weights[static_cast<int64_t>(a)].unsqueeze(1) * y.unsqueeze(0)).flatten();
  }
  return at::stack(outputs);
}

TEST(ActivationSparsity, TopKIsMasked) {
  for (const int64_t k : {1, 3, 6}) {
    for (const Case& c : shapes_with(ActivationSparsity::top_k(k))) {
      Experiment e(c);
      {
        // Columns of equal weights: ties in z.
        const at::NoGradGuard no_grad;
        e.experts->up_proj.select(1, 5).copy_(e.experts->up_proj.select(1, 2));
        if (c.bias) e.experts->up_bias.select(1, 5).copy_(e.experts->up_bias.select(1, 2));
      }
      std::vector<std::vector<at::Tensor>> results;
      for (const bool is_grouped : {true, false}) {
        std::vector<at::Tensor> inputs = e.inputs();
        for (at::Tensor& input : inputs) {
          input.mutable_grad() = at::Tensor();
          input.set_requires_grad(true);
        }
        const at::Tensor out = is_grouped ? e.forward() : plain_forward(e, c);
        (out * random_tensor(out.sizes(), 31)).sum().backward();
        results.push_back({out.detach()});
        for (const at::Tensor& input : inputs) results.back().push_back(input.grad().clone());
      }
      for (size_t i = 0; i < results[0].size(); ++i) {
        EXPECT_TRUE(at::allclose(results[0][i], results[1][i], 1e-12, 1e-13)) << k << " " << i;
      }
    }
  }
}

TEST(ActivationSparsity, AllIsDense) {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const Case& c : shapes_with(ActivationSparsity::top_k(kDFf))) {
      Case dense = c;
      dense.sparsity = {};
      std::vector<std::vector<at::Tensor>> results;
      for (const Case& one : {c, dense}) {
        Experiment e(one, type);
        for (at::Tensor input : e.inputs()) input.set_requires_grad(true);
        const at::Tensor out = e.forward();
        out.square().sum().backward();
        results.push_back({out});
        for (const at::Tensor& input : e.inputs()) results.back().push_back(input.grad());
      }
      for (size_t i = 0; i < results[0].size(); ++i) {
        EXPECT_TRUE(at::equal(results[0][i], results[1][i])) << i;
      }
    }
  }
}

TEST(ActivationSparsity, Gradients) {
  ActivationSparsity unbiased = ActivationSparsity::statistical_top_k(3);
  unbiased.unbiased = true;
  for (const ActivationSparsity& sparsity :
       {ActivationSparsity::top_k(3), ActivationSparsity::statistical_top_k(2),
        ActivationSparsity::statistical_top_k(5), unbiased}) {
    for (const Case& c : shapes_with(sparsity)) {
      Experiment e(c);
      EXPECT_TRUE(gradients_match([&] { return std::vector<at::Tensor>{e.forward()}; }, e.inputs()))
          << name_of(sparsity.kind) << " k=" << sparsity.k << " gated=" << c.gated;
    }
  }
  // Detached: on entries the gradient as it is, elsewhere none.
  const at::Tensor z = reference_z().view({1, 8});
  ActivationSparsity detached = ActivationSparsity::statistical_top_k(2);
  detached.detach_threshold = true;
  at::Tensor gradient = at::arange(1., 9., at::kDouble).view({1, 8});
  SparsePre(z, 8, detached).backward(gradient);
  EXPECT_TRUE(at::equal(gradient[0], at::tensor({0., 0., 0., 0., 0., 0., 7., 8.}, at::kDouble)));
  // Through the threshold, by the formula.
  gradient = at::arange(1., 9., at::kDouble).view({1, 8});
  SparsePre(z, 8, ActivationSparsity::statistical_top_k(2)).backward(gradient);
  const at::Tensor centred = z - 4.75;
  const double std = std::sqrt(centred.square().sum().item<double>() / 8);
  const at::Tensor expected =
      at::tensor({0., 0., 0., 0., 0., 0., 7., 8.}, at::kDouble) -
      15 * (1.0 / 8 + kernels::normal_upper_quantile(0.25) * centred / (8 * std));
  EXPECT_TRUE(at::allclose(gradient, expected, 1e-13, 1e-14));
}

TEST(ActivationSparsity, EqualValues) {
  for (const bool unbiased : {false, true}) {
    const at::Tensor z = at::full({2, 9}, 0.3, at::kDouble);
    ActivationSparsity sparsity = ActivationSparsity::statistical_top_k(4);
    sparsity.unbiased = unbiased;
    const SparsePre used(z, 9, sparsity);
    EXPECT_EQ(used.rows().abs().sum().item<double>(), 0);
    const at::Tensor gradient = at::ones({2, 9}, at::kDouble);
    used.backward(gradient);
    EXPECT_EQ(gradient.abs().sum().item<double>(), 0);
  }
}

TEST(ActivationSparsity, ActiveHidden) {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const Case c{true, Activation::kSilu, false, 1, ActivationSparsity::top_k(2)};
    Experiment e(c, type);
    // 3 rows each of experts 0 and 1, none of expert 2.
    EXPECT_TRUE(
        at::equal(e.experts->active_hidden(e.rows, e.plan), at::tensor({6, 6, 0}, at::kLong)));
  }
  const Case relu{false, Activation::kRelu, true, 1, {}};
  Experiment e(relu);
  at::Tensor expected = at::zeros({3}, at::kLong);
  const std::vector<int64_t> row_of = {0, 0, 1, 3, 3, 4}, expert_of = {0, 1, 1, 0, 1, 0};
  for (size_t a = 0; a < 6; ++a) {
    expected[expert_of[a]] += (at::mv(e.experts->up_proj[expert_of[a]], e.rows[row_of[a]]) +
                               e.experts->up_bias[expert_of[a]])
                                  .gt(0)
                                  .sum();
  }
  EXPECT_TRUE(at::equal(e.experts->active_hidden(e.rows, e.plan), expected));
  EXPECT_LT(expected.sum().item<int64_t>(), 42);
}

TEST(ActivationSparsity, Refused) {
  const auto refusal = [](const ActivationSparsity& sparsity) {
    return config_error([&] {
      const GroupedMLP experts(GroupedMLPOptions(4, 8).activation_sparsity(sparsity),
                               ExpertPlacement::contiguous(1, 1), 0);
    });
  };
  EXPECT_EQ(refusal(ActivationSparsity::top_k(9)),
            "[grouped_mlp] k=9 is outside [1, d_ff=8] of activation_sparsity=top_k");
  EXPECT_EQ(refusal(ActivationSparsity::top_k(0)),
            "[grouped_mlp] k=0 is outside [1, d_ff=8] of activation_sparsity=top_k");
  EXPECT_EQ(refusal(ActivationSparsity::statistical_top_k(8)),
            "[grouped_mlp] k=8 is outside [1, d_ff=8) of activation_sparsity=statistical_top_k");
  EXPECT_EQ(refusal(ActivationSparsity::top_k(8)), "no ConfigError");
  at::Tensor z = reference_z().view({1, 8}).clone();
  z[0][3] = std::nan("");
  for (const ActivationSparsity& sparsity :
       {ActivationSparsity::top_k(2), ActivationSparsity::statistical_top_k(2)}) {
    EXPECT_TRUE(SparsePre(z, 8, sparsity).rows().isnan().any().item<bool>());
  }
  Experiment e({true, Activation::kSilu, false, 1, {}});
  EXPECT_EQ(config_error([&] { e.experts->active_hidden(e.rows, nullptr); }),
            "[active_hidden] plan=null is none; make_routing_plan makes it");
}

}  // namespace
}  // namespace perseid::testing
