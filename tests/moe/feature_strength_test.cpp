// Strength of inputs.
//   ByHand   a matrix of 2 x 3 and experts with known weights
//   Planted  a sparse denoising autoencoder finds 20 informative features of 500: precision at
//            20 of 0.9 or more, above that of a static mask; a random choice has 0.04
#include "moe/feature_strength.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/optim/sgd.h>

#include <cstdio>

#include "moe/sparse_linear.h"
#include "moe/sparse_presets.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_fixture.h"

namespace perseid {
namespace {

using testing::config_error;
using testing::normal;

TEST(FeatureStrength, ByHand) {
  const at::Tensor weight = at::tensor({1., -2., 0., -4., 8., 0.}, at::kDouble).view({2, 3});
  EXPECT_TRUE(at::equal(neuron_strength(weight), at::tensor({5., 10., 0.}, at::kDouble)));
  EXPECT_TRUE(
      at::equal(neuron_strength(weight.to(at::kBFloat16)), at::tensor({5., 10., 0.}, at::kDouble)));
  EXPECT_EQ(config_error([] { neuron_strength(at::zeros({2})); }),
            "[neuron_strength] weight=[2] is not [out, in]");

  GroupedMLP experts(GroupedMLPOptions(3, 1), ExpertPlacement::contiguous(4, 2), 1);
  ASSERT_EQ(experts.expert_ids(), (std::vector<int64_t>{2, 3}));
  {
    const c10::NoGradGuard no_grad;
    experts.up_proj[0].fill_(1);
    experts.up_proj[1].copy_(weight);
  }
  EXPECT_TRUE(at::equal(expert_input_strength(experts, 3), at::tensor({5., 10., 0.}, at::kDouble)));
  EXPECT_TRUE(at::equal(expert_input_strength(experts, 2), at::tensor({2., 2., 2.}, at::kDouble)));
  EXPECT_EQ(config_error([&] { expert_input_strength(experts, 0); }),
            "[expert_input_strength] expert=0 is not one of the 2 experts here");
}

constexpr int64_t kFeatures = 500, kInformative = 20, kFactors = 3;

/// Where feature i of the set stands: the informative ones are not neighbours.
int64_t place_of(int64_t i) { return i * 37 % kFeatures; }

/// [n, 500] standardised: 20 features are mixtures of 3 factors, as in Madelon, the others noise.
at::Tensor planted_set(int64_t n, uint64_t seed) {
  at::Tensor x = normal({n, kFeatures}, seed, at::kFloat);
  const at::Tensor factors = normal({n, kFactors}, seed + 1, at::kFloat);
  const at::Tensor informative =
      factors.mm(normal({kFactors, kInformative}, seed + 2, at::kFloat)) +
      0.1 * normal({n, kInformative}, seed + 3, at::kFloat);
  for (int64_t i = 0; i < kInformative; ++i)
    x.select(1, place_of(i)).copy_(informative.select(1, i));
  return (x - x.mean(0)) / x.std(0, false);
}

/// Share of the 20 strongest inputs that are informative.
double precision_at_20(const at::Tensor& strength) {
  const at::Tensor best = std::get<1>(strength.topk(kInformative));
  int64_t num_found = 0;
  for (int64_t i = 0; i < kInformative; ++i)
    num_found += best.eq(place_of(i)).any().item<bool>() ? 1 : 0;
  return static_cast<double>(num_found) / kInformative;
}

/// The recipe of QuickSelection, small: an autoencoder of 500-100-500 with sigmoids that removes a
/// noise drawn once. The set of `seed`, and what its encoder finds.
double precision_of_autoencoder(uint64_t seed, bool is_static) {
  constexpr int64_t kSamples = 2000, kHidden = 100, kBatch = 100, kEpochs = 40;
  const at::Tensor clean = planted_set(kSamples, 100 * seed);
  const at::Tensor noisy = clean + 0.2 * normal(clean.sizes(), 100 * seed + 9, at::kFloat);
  SparseLinear encoder(SparseLinearOptions(kFeatures, kHidden).seed(seed));
  SparseLinear decoder(
      SparseLinearOptions(kHidden, kFeatures).seed(seed).key({1, 0, Matrix::kWeight}));
  SparsifierConfig config = presets::set(13, kSamples / kBatch, kEpochs, 0.2);
  if (is_static) config.schedule.end = 0;
  config.seed = seed;
  Sparsifier sparsifier({encoder->unit(), decoder->unit()}, config);
  EXPECT_EQ(sparsifier.nnz(), 2 * 7222);  // 50000 (1 - exp(-13 * 600 / 50000))
  sparsifier.reset_weights(1);
  std::vector<at::Tensor> parameters = encoder->parameters();
  for (const at::Tensor& parameter : decoder->parameters()) parameters.push_back(parameter);
  torch::optim::SGD optimizer(parameters,
                              torch::optim::SGDOptions(0.003).momentum(0.9).weight_decay(1e-5));
  sparsifier.attach(optimizer);
  for (int64_t step = 0; step < kEpochs * kSamples / kBatch; ++step) {
    const int64_t first = step * kBatch % kSamples;
    sparsifier.begin_step(step);
    optimizer.zero_grad();
    const at::Tensor hidden = encoder->forward(noisy.slice(0, first, first + kBatch)).sigmoid();
    (decoder->forward(hidden) - clean.slice(0, first, first + kBatch))
        .square()
        .sum(1)
        .mean()
        .backward();
    sparsifier.end_backward(step);
    optimizer.step();
    sparsifier.end_step(step);
  }
  return precision_at_20(neuron_strength(encoder->weight));
}

TEST(FeatureStrength, Planted) {
  const double dynamic_mean =
      (precision_of_autoencoder(1, false) + precision_of_autoencoder(2, false)) / 2;
  const double static_mask = precision_of_autoencoder(1, true);
  double random_sum = 0;
  for (uint64_t draw = 0; draw < 300; ++draw)
    random_sum += precision_at_20(normal({500}, draw, at::kFloat));
  std::printf("precision at 20: SET %.3f, static mask %.3f, random %.3f\n", dynamic_mean,
              static_mask, random_sum / 300);
  EXPECT_GE(dynamic_mean, 0.9);
  EXPECT_GT(dynamic_mean, static_mask);
  EXPECT_NEAR(random_sum / 300, 0.04, 0.01);
}

}  // namespace
}  // namespace perseid
