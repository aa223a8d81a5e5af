// train_domains on the fixture.
//   SameAtAnyRankCount   in one process and on 2 and 4 threads as ranks, at every ep_size, with and
//                        without an idle rank: losses and all weights agree, float64 to 1e-12 of
//                        the largest value, float32 to 1e-5; each gate; uneven shards; 50 steps of
//                        top-k, DSelect-k and COMET, 20 of the others
//   Repeats              the same bits twice
//   LossFalls            every gate learns
//   LearningRate         both rates against a first step by hand; the line down to 0
//   CountsAreRight       parameters against the model, experts per token and loads against the gate
//   WrongSettings        sentences for what only shows with data and ranks
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>

#include "comm/group.h"
#include "examples/train_fashion/model.h"
#include "examples/train_fashion/train.h"
#include "kernels/error.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

TrainOptions small_run(GateKind gate) {
  TrainOptions options;
  options.gate = gate;
  options.dtype = kernels::DType::kFloat64;
  options.global_batch_size = 58;  // no rank count above 2 divides it
  options.train_iters = 50;
  options.lr = 1e-3;  // larger steps make rounding errors grow
  return options;
}

RunResult run(int ranks, const TrainOptions& options) {
  RunResult result;
  std::mutex mutex;
  comm::run_local(ranks, [&](const comm::Group& world) {
    RunResult mine = train_domains(world, fixture_data(), options);
    const std::lock_guard lock(mutex);
    if (world.rank() == 0) result = std::move(mine);
  });
  return result;
}

enum class Compare : uint8_t { kMax, kNorm };

/// Largest difference as a share of the largest value; or the same of 2-norms.
double relative_difference(const std::vector<double>& a, const std::vector<double>& b,
                           Compare compare) {
  if (a.size() != b.size()) return INFINITY;
  double scale = 0;
  double difference = 0;
  const auto add = [compare](double& sum, double x) {
    sum = compare == Compare::kMax ? std::max(sum, std::abs(x)) : std::hypot(sum, x);
  };
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) || std::isnan(b[i])) return INFINITY;
    add(scale, a[i]);
    add(difference, a[i] - b[i]);
  }
  return scale > 0 ? difference / scale : difference;
}

void expect_equal_runs(const RunResult& a, const RunResult& b, double tolerance,
                       Compare compare = Compare::kMax) {
  EXPECT_GE(a.losses.size(), size_t{20});
  EXPECT_LE(relative_difference(a.losses, b.losses, compare), tolerance) << "losses";
  ASSERT_EQ(a.weights.size(), b.weights.size());
  for (size_t i = 0; i < a.weights.size(); ++i) {
    EXPECT_EQ(a.weights[i].name, b.weights[i].name);
    EXPECT_EQ(a.weights[i].shape, b.weights[i].shape);
    EXPECT_LE(relative_difference(a.weights[i].values, b.weights[i].values, compare), tolerance)
        << a.weights[i].name;
  }
  EXPECT_EQ(a.accuracy, b.accuracy);
  EXPECT_NEAR(a.cross_entropy, b.cross_entropy, tolerance * a.cross_entropy);
  EXPECT_EQ(a.experts_per_token, b.experts_per_token);
  EXPECT_NEAR(a.domain_nmi, b.domain_nmi, std::max(tolerance, 1e-12));
  EXPECT_EQ(a.tokens_per_expert, b.tokens_per_expert);
  EXPECT_LE(relative_difference(a.domain_expert, b.domain_expert, compare), tolerance);
  EXPECT_EQ(a.trees.reached, b.trees.reached);
  EXPECT_EQ(a.trees.left, b.trees.left);
  EXPECT_EQ(a.trees.right, b.trees.right);
  EXPECT_EQ(a.rows_per_token, b.rows_per_token);
  ASSERT_EQ(a.curve.size(), b.curve.size());
  for (size_t i = 0; i < a.curve.size(); ++i) {
    EXPECT_NEAR(a.curve[i].cross_entropy, b.curve[i].cross_entropy, 10 * tolerance);
    EXPECT_EQ(a.curve[i].experts_per_token, b.curve[i].experts_per_token);
  }
}

TrainOptions same_run(GateKind gate) {
  TrainOptions options = small_run(gate);
  if (gate == GateKind::kHash || gate == GateKind::kOracle || gate == GateKind::kDense ||
      gate == GateKind::kSingle) {
    options.train_iters = 20;
  }
  return options;
}

class SameAtAnyRankCount : public ::testing::TestWithParam<GateKind> {};

TEST_P(SameAtAnyRankCount, Float64) {
  TrainOptions options = same_run(GetParam());
  ASSERT_GT(options.balance_coeff, 0);  // a loss that is not linear in the sums of the ranks
  options.aux_loss_coeff = 1e-2;
  options.z_loss_coeff = 1e-3;
  const RunResult reference = train_domains(comm::self_group(), fixture_data(), options);
  for (const int ranks : {1, 2, 4}) {
    for (int64_t ep_size = 1; ep_size <= ranks; ep_size *= 2) {
      for (const int64_t idle_ranks : {0, 1}) {
        if (idle_ranks >= ranks) continue;
        SCOPED_TRACE(std::to_string(ranks) + " ranks, ep_size " + std::to_string(ep_size) + ", " +
                     std::to_string(idle_ranks) + " idle");
        options.ep_size = ep_size;
        options.idle_ranks = idle_ranks;
        expect_equal_runs(reference, run(ranks, options), 1e-12);
      }
    }
  }
}

TEST_P(SameAtAnyRankCount, Float32) {
  TrainOptions options = same_run(GetParam());
  options.dtype = kernels::DType::kFloat32;
  const RunResult reference = train_domains(comm::self_group(), fixture_data(), options);
  options.idle_ranks = 1;
  // Ranks add up partial sums for the gate, replicas of an expert for that. Adam divides a gradient
  // by its size, so where it is nearly 0 a float32 rounding error becomes a step of that one
  // weight: the switches of smooth-step gates have gradients of exactly 0 beside small ones.
  const Compare compare = GetParam() == GateKind::kComet || GetParam() == GateKind::kDSelectK
                              ? Compare::kNorm
                              : Compare::kMax;
  expect_equal_runs(reference, run(2, options), 1e-5, compare);
  expect_equal_runs(reference, run(4, options), 1e-5, compare);
  for (const int64_t ep_size : {1, 2}) {
    options.ep_size = ep_size;
    expect_equal_runs(reference, run(4, options), 1e-5, Compare::kNorm);
  }
}

// Experts that the ranks do not divide, and ranks without any expert.
TEST_P(SameAtAnyRankCount, AnyNumberOfExperts) {
  TrainOptions options = same_run(GetParam());
  for (const int64_t num_experts : {3, 5}) {
    options.num_experts = num_experts;
    const RunResult reference = train_domains(comm::self_group(), fixture_data(), options);
    expect_equal_runs(reference, run(4, options), 1e-12);
  }
}

INSTANTIATE_TEST_SUITE_P(Gates, SameAtAnyRankCount,
                         ::testing::Values(GateKind::kTopK, GateKind::kDSelectK, GateKind::kComet,
                                           GateKind::kHash, GateKind::kOracle, GateKind::kDense,
                                           GateKind::kSingle),
                         [](const auto& test) { return std::string(gate_name(test.param)); });

TEST(TrainDomains, Repeats) {
  const TrainOptions options = small_run(GateKind::kTopK);
  const RunResult first = run(2, options);
  const RunResult second = run(2, options);
  EXPECT_EQ(first.losses, second.losses);
  for (size_t i = 0; i < first.weights.size(); ++i) {
    EXPECT_EQ(first.weights[i].values, second.weights[i].values);
  }
}

TEST(TrainDomains, LossFalls) {
  for (const GateKind gate :
       {GateKind::kSingle, GateKind::kHash, GateKind::kOracle, GateKind::kTopK, GateKind::kDSelectK,
        GateKind::kComet, GateKind::kDense}) {
    for (const kernels::DType dtype : {kernels::DType::kFloat32, kernels::DType::kBFloat16}) {
      TrainOptions options = small_run(gate);
      options.dtype = dtype;
      options.balance_coeff = 0;  // the losses are then cross-entropies
      options.entropy_coeff = 0;
      const RunResult result = train_domains(comm::self_group(), fixture_data(), options);
      EXPECT_NEAR(result.losses.front(), std::log(10), .2) << gate_name(gate);
      const double last = std::accumulate(result.losses.end() - 5, result.losses.end(), 0.0) / 5;
      EXPECT_LT(last, .9 * result.losses.front()) << gate_name(gate);
    }
  }
}

TEST(TrainDomains, CountsAreRight) {
  for (const GateKind gate :
       {GateKind::kSingle, GateKind::kHash, GateKind::kOracle, GateKind::kTopK, GateKind::kDSelectK,
        GateKind::kComet, GateKind::kDense}) {
    TrainOptions options = small_run(gate);
    options.train_iters = 2;
    int64_t reports = 0;
    const RunResult result =
        train_domains(comm::self_group(), fixture_data(), options, [&](const StepReport& report) {
          ++reports;
          EXPECT_EQ(report.step, reports);
          EXPECT_EQ(report.num_steps, 2);
          EXPECT_GT(report.cross_entropy, 0);
          EXPECT_GT(report.tokens_per_second, 0);
        });
    EXPECT_EQ(reports, 2);
    const bool is_dense = gate == GateKind::kDense || gate == GateKind::kComet ||
                          gate == GateKind::kDSelectK;  // they start so
    const int64_t active = is_dense ? 8 : gate == GateKind::kTopK ? 2 : 1;
    if (!is_dense) {
      EXPECT_NEAR(result.experts_per_token, static_cast<double>(active), .05);
    }
    EXPECT_EQ(std::accumulate(result.tokens_per_expert.begin(), result.tokens_per_expert.end(),
                              int64_t{0}),
              64 * active);
    if (gate == GateKind::kSingle) {
      EXPECT_EQ(result.max_vio, 7);
      EXPECT_EQ(result.domain_nmi, 0);
    }
    EXPECT_EQ(result.rows_per_token, static_cast<double>(active));
    ASSERT_EQ(result.curve.size(), size_t{2});
    for (const StepReport& point : result.curve) {
      EXPECT_EQ(point.experts_per_token, static_cast<double>(active));
    }
    // Each domain gives all its weight to the experts.
    ASSERT_EQ(result.domain_expert.size(), size_t{kNumDomains * 8});
    for (auto row = result.domain_expert.begin(); row != result.domain_expert.end(); row += 8) {
      EXPECT_NEAR(std::accumulate(row, row + 8, 0.0), 1, 1e-6);
    }
    if (gate == GateKind::kOracle) {
      EXPECT_NEAR(result.domain_nmi, 1, .02);  // 64 images are not quite 16 of each
      for (size_t d = 0; d < size_t{kNumDomains}; ++d) {
        EXPECT_EQ(result.domain_expert[d * 8 + d], 1);
      }
    }
    EXPECT_EQ(result.trees.num_trees, gate == GateKind::kComet ? 2 : 0);
    int64_t parameters = 0;
    for (const WeightDump& weight : result.weights) {
      parameters += static_cast<int64_t>(weight.values.size());
    }
    EXPECT_EQ(parameters, count_parameters(options).total);
  }
}

TEST(TrainDomains, LearningRate) {
  TrainOptions options = small_run(GateKind::kTopK);
  options.lr = 2;
  options.lr_decay = .25;
  EXPECT_EQ(learning_rate(options, 0), 2);
  EXPECT_EQ(learning_rate(options, .75), 2);
  EXPECT_DOUBLE_EQ(learning_rate(options, .875), 1);
  EXPECT_EQ(learning_rate(options, 1), 0);
  options.lr_decay = 0;
  EXPECT_EQ(learning_rate(options, .999), 2);
  options.lr_decay = 1;
  EXPECT_EQ(learning_rate(options, .5), 1);

  // Adam's first step is the learning rate, whatever the gradient. Biases start at 0.
  options = small_run(GateKind::kTopK);
  options.train_iters = 1;
  options.lr = 1e-3;
  options.gate_lr_factor = 7;
  const RunResult result = train_domains(comm::self_group(), fixture_data(), options);
  const auto largest = [&](const std::string& name) {
    double size = 0;
    for (const WeightDump& weight : result.weights) {
      if (weight.name != name) continue;
      for (const double value : weight.values) size = std::max(size, std::abs(value));
    }
    return size;
  };
  EXPECT_NEAR(largest("gate.bias"), 7e-3, 1e-5);
  EXPECT_NEAR(largest("experts.bias"), 1e-3, 1e-5);
}

TEST(TrainDomains, StepsAndEpochs) {
  TrainOptions options = small_run(GateKind::kTopK);
  options.train_iters = 0;
  options.epochs = 3;
  EXPECT_EQ(num_steps(options, 256), 12);  // the last 24 images of an epoch are dropped
  const RunResult result = train_domains(comm::self_group(), fixture_data(), options);
  EXPECT_EQ(result.losses.size(), size_t{12});
  EXPECT_DOUBLE_EQ(result.seconds_per_epoch, result.seconds / 3);
}

TEST(TrainDomains, Curve) {
  TrainOptions options = small_run(GateKind::kHash);  // its loss is the cross-entropy
  options.train_iters = 120;
  const RunResult result = train_domains(comm::self_group(), fixture_data(), options);
  ASSERT_EQ(result.curve.size(), size_t{40});  // of 3 steps: at most 50 points
  for (size_t i = 0; i < result.curve.size(); ++i) {
    EXPECT_EQ(result.curve[i].step, 3 * static_cast<int64_t>(i) + 3);
    const double mean =
        (result.losses[3 * i] + result.losses[3 * i + 1] + result.losses[3 * i + 2]) / 3;
    EXPECT_NEAR(result.curve[i].cross_entropy, mean, 1e-12);
  }
}

TEST(TrainDomains, WrongSettings) {
  const auto text_of = [](int ranks, const TrainOptions& options) {
    return error_text<ConfigError>([&] { run(ranks, options); });
  };
  TrainOptions options = small_run(GateKind::kTopK);
  options.global_batch_size = 257;
  std::string text = text_of(1, options);
  EXPECT_NE(text.find("global_batch_size=257"), std::string::npos) << text;
  EXPECT_NE(text.find("1 to 256"), std::string::npos) << text;
  options = small_run(GateKind::kTopK);
  options.idle_ranks = 2;
  text = text_of(2, options);
  EXPECT_NE(text.find("idle_ranks=2"), std::string::npos) << text;
  options = small_run(GateKind::kTopK);
  options.gate_lr_factor = 0;
  text = text_of(1, options);
  EXPECT_NE(text.find("gate_lr_factor=0"), std::string::npos) << text;
  options = small_run(GateKind::kTopK);
  options.lr_decay = 1.5;
  text = text_of(1, options);
  EXPECT_NE(text.find("lr_decay=1.5"), std::string::npos) << text;
  EXPECT_NE(text.find("0 to 1"), std::string::npos) << text;
  options = small_run(GateKind::kTopK);
  options.ep_size = 3;
  text = text_of(4, options);
  EXPECT_NE(text.find("ep_size=3"), std::string::npos) << text;
  options = small_run(GateKind::kTopK);
  options.top_k = 9;
  text = text_of(1, options);
  EXPECT_NE(text.find("top_k=9"), std::string::npos) << text;
  EXPECT_NE(text.find("num_experts=8"), std::string::npos) << text;
}

}  // namespace
}  // namespace perseid::examples
