// Updates that look at the gradient of a sample of inactive weights.
//   Candidates  exact numbers in one cell, in rows and in N:M; a function of its arguments; any
//               inactive atom is as likely as another
//   Gradient    equals autograd at the candidates: with a link in two passes and windows, without
//               one, every type, blocks with padding
//   Update      the best of the candidates come, scores with ties; all inactive ones as candidates:
//               the masks of kGrad, bit for bit
//   Bytes       no tensor as large as the weight beyond its masked gradient
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>
#include <torch/optim/sgd.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <set>

#include "tests/moe/sparse_criteria_fixture.h"

namespace perseid::testing {
namespace {

using kernels::random_key;

TEST(SparseSampled, Candidates) {
  UpdateRule rule;
  rule.grow = GrowCriterion::kSampledGrad;
  const auto count = [&](const Structure& structure, int64_t out, int64_t in, int64_t per_cell,
                         double fraction, double per_grown) {
    const AtomLayout layout = make_layout(structure, out, in, "w");
    const PackedMask active = random_mask(layout, per_cell * layout.granule(), random_key(1));
    rule.candidates_per_grown = per_grown;
    const PackedMask drawn = draw_candidates(layout, rule, active, fraction, random_key(2));
    EXPECT_EQ((drawn & active).count(), 0);
    EXPECT_EQ(drawn, draw_candidates(layout, rule, active, fraction, random_key(2)));
    const std::vector<int64_t> counts = cell_counts(layout, drawn);
    EXPECT_EQ(std::set<int64_t>(counts.begin(), counts.end()).size(), 1u);
    return counts[0];
  };
  const Structure one = Structure::unstructured(), row = Structure::constant_fan_in();
  EXPECT_EQ(count(one, 10, 20, 50, 0.3, 4), 60);    // 4 * 15
  EXPECT_EQ(count(one, 10, 20, 50, 0.3, 1.5), 23);  // 22.5, rounded up
  EXPECT_EQ(count(one, 10, 20, 50, 0.31, 4), 60);
  EXPECT_EQ(count(one, 10, 20, 50, 0, 4), 0);
  EXPECT_EQ(count(one, 10, 20, 50, 1, 4), 150);  // all there are
  EXPECT_EQ(count(one, 100, 200, 5000, 0.1, 4), 2000);
  EXPECT_EQ(count(row, 10, 20, 5, 0.3, 4), 6);   // 60 / 10 of a row
  EXPECT_EQ(count(row, 10, 20, 5, 0.1, 4), 5);   // a row could lose its 5
  EXPECT_EQ(count(row, 10, 20, 5, 0.04, 4), 2);  // only 2 go at all
  EXPECT_EQ(count(row, 10, 20, 15, 0.5, 4), 5);  // no more are inactive
  EXPECT_EQ(count(Structure::n_of_m(2, 8), 4, 32, 2, 0.3, 4), 3);
  EXPECT_EQ(count(Structure::n_of_m(2, 4), 4, 32, 2, 0.3, 4), 2);
  EXPECT_EQ(count(Structure::blocks(2, 2), 20, 20, 30, 0.2, 4), 24);

  // Each inactive atom is a candidate in 60 of 150 draws.
  const AtomLayout layout = make_layout(one, 10, 20, "w");
  const PackedMask active = random_mask(layout, 50, random_key(1));
  rule.candidates_per_grown = 4;
  std::vector<int64_t> hits(200, 0);
  for (uint64_t seed = 0; seed < 400; ++seed) {
    const PackedMask drawn = draw_candidates(layout, rule, active, 0.3, random_key(seed));
    for (int64_t a = 0; a < 200; ++a) hits[static_cast<size_t>(a)] += drawn.test(a) ? 1 : 0;
  }
  for (int64_t a = 0; a < 200; ++a) {
    if (active.test(a)) continue;
    EXPECT_NEAR(static_cast<double>(hits[static_cast<size_t>(a)]), 160, 5 * 9.8);  // binomial
  }
}

TEST(SparseSampled, Gradient) {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const bool has_link : {true, false}) {
      for (const Structure& structure :
           {Structure::unstructured(), Structure{Cell::kRow, 4, 4, 0, 0, true}}) {
        SparseLinear linear = linear_of(30, 9, type == at::kDouble ? type : at::kFloat);
        linear->to(type);
        SparsifierConfig config = config_of(DropCriterion::kMagnitude, GrowCriterion::kSampledGrad);
        config.grad_accum = 3;
        config.structure = structure;
        SparseUnit unit = linear->unit();
        if (!has_link) unit.link = nullptr;
        Sparsifier sparsifier({unit}, config);
        at::Tensor expected = at::zeros({9, 30}, at::kDouble);
        for (int64_t step = 0; step < 9; ++step) {
          sparsifier.begin_step(step);
          linear->zero_grad();
          for (int pass = 0; pass < 2; ++pass) {
            const auto seed = static_cast<uint64_t>(2 * step + pass);
            const at::Tensor x = normal({6, 30}, 10 + seed).to(type);
            const at::Tensor delta = normal({6, 9}, 50 + seed).to(type);
            (linear->forward(x) * delta).sum().backward();
            if (step >= 7) expected += dense_gradient(x.to(at::kDouble), delta.to(at::kDouble));
          }
          sparsifier.end_backward(step);
          sparsifier.end_step(step);
          const at::Tensor sum = sparsifier.state_dict().units[0].grad_sum;
          ASSERT_EQ(sum.defined(), step >= 7);
          if (step < 8) continue;
          const PackedMask positions =
              position_bits(sparsifier.layout({}), candidates_of(sparsifier, {}, 9));
          ASSERT_GT(positions.count(), 60);
          ASSERT_LT(positions.count(), 9 * 30 * 6 / 10 + 40);
          const double tolerance = type == at::kDouble ? 1e-12 : type == at::kFloat ? 1e-4 : 0.2;
          EXPECT_EQ(sum.scalar_type(), type == at::kDouble ? at::kDouble : at::kFloat);
          EXPECT_TRUE(at::allclose(sum.to(at::kDouble), at_positions(positions, expected),
                                   tolerance, tolerance))
              << type << has_link;
        }
      }
    }
  }
  // Types that the kernel does not know: in chunks.
  const AtomLayout layout = make_layout(Structure::unstructured(), 9, 30, "w");
  const PackedMask positions = random_mask(layout, 70, random_key(1));
  constexpr auto kBrief = at::kFloat8_e5m2;
  const at::Tensor x = normal({6, 30}, 1).to(kBrief), delta = normal({6, 9}, 2).to(kBrief);
  at::Tensor sums, exact;
  add_sampled_gradient(positions, x, delta, sums);
  add_sampled_gradient(positions, x, delta, sums);
  add_sampled_gradient(positions, x.to(at::kFloat), delta.to(at::kFloat), exact);
  EXPECT_TRUE(at::allclose(sums, 2 * exact, 1e-5, 1e-5));
  const at::Tensor values = normal({9, 30}, 3).to(kBrief);
  EXPECT_TRUE(
      at::equal(listed_values(positions, values), at_positions(positions, values.to(at::kFloat))));
}

TEST(SparseSampled, Update) {
  UpdateRule rule;
  rule.grow = GrowCriterion::kSampledGrad;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    const AtomLayout layout = make_layout(Structure::unstructured(), 9, 11, "w");
    const PackedMask mask = random_mask(layout, 40, random_key(seed));
    const PackedMask candidates = draw_candidates(layout, rule, mask, 0.2, random_key(seed));
    ASSERT_EQ(candidates.count(), 32);
    const at::Tensor drop = normal({99}, 2 * seed, at::kFloat).abs();
    // Signed scores with many equal ones; none, some or all of them are 0.
    const at::Tensor grow = normal({32}, 2 * seed + 1, at::kFloat).mul_(2).round_();
    if (seed % 3 == 1) grow.narrow(0, 4, 28).zero_();
    if (seed % 10 == 5) grow.zero_();
    UpdateInput input;
    input.active = &mask;
    input.candidates = &candidates;
    input.drop_scores = drop.const_data_ptr<float>();
    input.grow_scores = grow.const_data_ptr<float>();
    input.fraction = 0.2;
    input.grow_key = random_key(seed).with(1);
    const MaskUpdate update = update_mask(layout, rule, input);
    EXPECT_EQ(update.has_no_gradient, grow.count_nonzero().item<int64_t>() == 0);
    EXPECT_EQ(update.num_grown, std::min<int64_t>(8, grow.count_nonzero().item<int64_t>()));
    EXPECT_EQ(update.num_dropped, update.num_grown);
    EXPECT_EQ(update.mask.count(), 40);
    float lowest_grown = 1e9f, highest_left = 0;
    int64_t number = 0;
    for (int64_t a = 0; a < 99; ++a) {
      if (!candidates.test(a)) {
        EXPECT_FALSE(update.grown.test(a));
        continue;
      }
      const float score = std::abs(grow[number++].item<float>());
      float& bound = update.grown.test(a) ? lowest_grown : highest_left;
      bound = update.grown.test(a) ? std::min(bound, score) : std::max(bound, score);
    }
    EXPECT_GT(lowest_grown, 0);
    if (!update.has_no_gradient) {
      EXPECT_GE(lowest_grown, highest_left);
    }
  }
  for (const Structure& structure :
       {Structure::unstructured(), Structure::constant_fan_in(), Structure::blocks(3, 5)}) {
    for (const bool has_link : {true, false}) {
      std::vector<PackedMask> masks;
      for (const GrowCriterion grow : {GrowCriterion::kGrad, GrowCriterion::kSampledGrad}) {
        SparseLinear linear = linear_of(30, 9);
        SparsifierConfig config = config_of(DropCriterion::kMagnitude, grow, 5);
        config.rule.candidates_per_grown = 1e6;
        config.grad_accum = 2;
        config.structure = structure;
        config.schedule.anneal = Anneal::kConstant;
        SparseUnit unit = linear->unit();
        if (!has_link) unit.link = nullptr;
        Sparsifier sparsifier({unit}, config);
        torch::optim::SGD optimizer(linear->parameters(), torch::optim::SGDOptions(0.01));
        sparsifier.attach(optimizer);
        for (int64_t step = 0; step < 40; ++step) {
          sparsifier.begin_step(step);
          linear->zero_grad();
          const at::Tensor y = linear->forward(normal({6, 30}, static_cast<uint64_t>(step)));
          (y - 1).square().sum().backward();
          sparsifier.end_backward(step);
          optimizer.step();
          sparsifier.end_step(step);
        }
        EXPECT_EQ(sparsifier.stats({}).num_updates, 8);
        masks.push_back(sparsifier.mask({}));
      }
      EXPECT_EQ(masks[0], masks[1]);
    }
  }
}

/// Remembers how often something as large as asked for was allocated.
class LargeAllocations : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes >= limit) ++count;
    void* const data = std::aligned_alloc(64, 64 * (bytes / 64 + 1));
    return {data, data, &std::free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
  static inline std::atomic<size_t> limit{~size_t{0}};
  static inline std::atomic<int64_t> count{0};
};

TEST(SparseSampled, Bytes) {
  static auto* const allocator = new LargeAllocations;
  c10::Allocator* const usual = c10::GetCPUAllocator();
  const auto count_large = [&](GrowCriterion grow) {
    SparseLinear linear = linear_of(256, 192, at::kFloat);
    SparsifierConfig config = config_of(DropCriterion::kMagnitude, grow, 3);
    config.budget.density = 0.05;
    config.schedule.anneal = Anneal::kConstant;
    Sparsifier sparsifier({linear->unit()}, config);
    int64_t count = 0;
    for (int64_t step = 0; step < 3; ++step) {
      sparsifier.begin_step(step);
      linear->zero_grad();
      const at::Tensor y =
          linear->forward(normal({8, 256}, static_cast<uint64_t>(step), at::kFloat));
      LargeAllocations::count = 0;
      y.square().sum().backward();
      const UpdateReport report = sparsifier.end_backward(step);
      count = LargeAllocations::count;
      if (step == 2) {
        EXPECT_GT(report.units.at(0).num_grown, 700);
      }
      sparsifier.end_step(step);
    }
    return count;
  };
  c10::SetCPUAllocator(allocator, /*priority=*/100);
  LargeAllocations::limit = 256 * 192 * sizeof(float);
  const int64_t of_sampled = count_large(GrowCriterion::kSampledGrad);
  const int64_t of_random = count_large(GrowCriterion::kRandom);
  const int64_t of_dense = count_large(GrowCriterion::kGrad);
  LargeAllocations::limit = ~size_t{0};
  c10::SetCPUAllocator(usual, /*priority=*/100);
  EXPECT_EQ(of_random, 1);  // the gradient, 0 at inactive entries
  EXPECT_EQ(of_sampled, of_random);
  EXPECT_GE(of_dense, of_random + 1);
}

}  // namespace
}  // namespace perseid::testing
