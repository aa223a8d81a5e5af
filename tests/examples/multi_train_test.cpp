// train_multi on the fixture.
//   SameAtAnyRankCount   10 steps in one process, on 2 and 4 threads as ranks, with replicas,
//                        with an idle rank: losses, weights and scores agree, float64 to 1e-12 of
//                        the largest value; each gate, both kinds of experts
//   SharedExpertsRunOnce rows that experts process are those of the union of both gates, and each
//                        task mixes with its own weights what every expert says of every sample
//   RowsAreOfTheUnion    4 of 6 experts for each gate: 4 to 6 rows a sample, not 8
//   Shapes               parameters of both experts and towers by closed form, widths
//   InitialValues        Glorot's bound and variance, biases 0, nothing starts equal
//   InputsAreSums        the layer reads pixel sums / 255, up to 2
//   LossFalls            every gate learns, both experts
//   BestEpoch            test figures are those of the epoch with the least validation loss
//   Protocols            defaults of both
//   WrongSettings        sentences for what only shows with data and ranks
#include <ATen/Functions.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>

#include "comm/group.h"
#include "examples/train_fashion/multi_model.h"
#include "examples/train_fashion/multi_train.h"
#include "gates/gate.h"
#include "kernels/error.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

const MultiData& fixture_pairs() {
  static const MultiData data =
      make_multi(load_fashion_mnist(fixture_folder()), Protocol::kSmall, 0);
  return data;
}

MultiOptions small_run(GateKind gate, ExpertKind experts = ExpertKind::kMlp) {
  MultiOptions options = multi_defaults(Protocol::kSmall);
  options.experts = experts;
  options.train.gate = gate;
  options.train.dtype = kernels::DType::kFloat64;
  options.train.global_batch_size = 26;  // no rank count above 2 divides it; 4 steps an epoch
  options.train.train_iters = 10;
  return options;
}

MultiResult run(int ranks, const MultiOptions& options) {
  MultiResult result;
  std::mutex mutex;
  comm::run_local(ranks, [&](const comm::Group& world) {
    MultiResult mine = train_multi(world, fixture_pairs(), options);
    const std::lock_guard lock(mutex);
    if (world.rank() == 0) result = std::move(mine);
  });
  return result;
}

MultiResult run_alone(const MultiOptions& options) {
  return train_multi(comm::self_group(), fixture_pairs(), options);
}

void expect_equal_scores(const MultiScore& a, const MultiScore& b) {
  for (size_t task = 0; task < kNumTasks; ++task) {
    EXPECT_EQ(a.tasks[task].accuracy, b.tasks[task].accuracy);
    EXPECT_NEAR(a.tasks[task].cross_entropy, b.tasks[task].cross_entropy, 1e-12);
    EXPECT_EQ(a.tasks[task].experts_per_token, b.tasks[task].experts_per_token);
    EXPECT_EQ(a.tasks[task].tokens_per_expert, b.tasks[task].tokens_per_expert);
  }
  EXPECT_EQ(a.rows_per_sample, b.rows_per_sample);
}

void expect_equal_runs(const MultiResult& a, const MultiResult& b) {
  EXPECT_EQ(a.losses.size(), size_t{10});
  EXPECT_LE(relative_difference(a.losses, b.losses), 1e-12) << "losses";
  ASSERT_EQ(a.weights.size(), b.weights.size());
  for (size_t i = 0; i < a.weights.size(); ++i) {
    EXPECT_EQ(a.weights[i].name, b.weights[i].name);
    EXPECT_EQ(a.weights[i].shape, b.weights[i].shape);
    EXPECT_LE(relative_difference(a.weights[i].values, b.weights[i].values), 1e-12)
        << a.weights[i].name;
  }
  EXPECT_EQ(a.best_epoch, b.best_epoch);
  ASSERT_EQ(a.epochs.size(), size_t{3});  // 4 + 4 + 2 steps
  ASSERT_EQ(b.epochs.size(), size_t{3});
  for (size_t e = 0; e < a.epochs.size(); ++e) {
    expect_equal_scores(a.epochs[e].train, b.epochs[e].train);
    expect_equal_scores(a.epochs[e].validation, b.epochs[e].validation);
  }
  expect_equal_scores(a.test, b.test);
}

struct RankCase {
  GateKind gate;
  ExpertKind experts;
};
class MultiSameAtAnyRankCount : public ::testing::TestWithParam<RankCase> {};

TEST_P(MultiSameAtAnyRankCount, Float64) {
  MultiOptions options = small_run(GetParam().gate, GetParam().experts);
  options.train.aux_loss_coeff = 1e-2;
  options.train.balance_coeff = 1e-2;
  const MultiResult reference = run_alone(options);
  struct Ranks {
    int ranks;
    int64_t ep_size, idle_ranks;
  };
  for (const Ranks& c :
       {Ranks{1, 1, 0}, Ranks{2, 2, 0}, Ranks{2, 1, 1}, Ranks{4, 4, 1}, Ranks{4, 2, 0}}) {
    SCOPED_TRACE(std::to_string(c.ranks) + " ranks, ep_size " + std::to_string(c.ep_size) + ", " +
                 std::to_string(c.idle_ranks) + " idle");
    options.train.ep_size = c.ep_size;
    options.train.idle_ranks = c.idle_ranks;
    expect_equal_runs(reference, run(c.ranks, options));
  }
}

INSTANTIATE_TEST_SUITE_P(Gates, MultiSameAtAnyRankCount,
                         ::testing::Values(RankCase{GateKind::kTopK, ExpertKind::kMlp},
                                           RankCase{GateKind::kDSelectK, ExpertKind::kMlp},
                                           RankCase{GateKind::kComet, ExpertKind::kMlp},
                                           RankCase{GateKind::kDense, ExpertKind::kMlp},
                                           RankCase{GateKind::kSingle, ExpertKind::kMlp},
                                           RankCase{GateKind::kTopK, ExpertKind::kConv}),
                         [](const auto& test) {
                           return std::string(gate_name(test.param.gate)) +
                                  (test.param.experts == ExpertKind::kConv ? "_conv" : "_mlp");
                         });

CanvasBatch first_samples(int64_t count) {
  std::vector<int64_t> samples(static_cast<size_t>(count));
  std::iota(samples.begin(), samples.end(), int64_t{0});
  return draw_batch(fixture_pairs().train, samples);
}

TEST(MultiModel, SharedExpertsRunOnce) {
  MultiOptions options = small_run(GateKind::kTopK);
  options.train.top_k = 4;
  MultiModel model(comm::self_group(), options);
  const MoEInput input = multi_input(first_samples(40), options.train);
  const MultiOutput output = model.forward(input);

  gates::GateInput gate_input;
  gate_input.tokens = input.tokens;
  std::vector<at::Tensor> weights;  // [2] of [n, E]
  at::Tensor either = at::zeros({40, 6}, at::kBool);
  for (const auto& gate : model.layer().gates()) {
    weights.push_back(gates::dense_weights(gate->forward(gate_input).routing, 6));
    either = either.logical_or(weights.back().gt(0));
  }
  EXPECT_EQ(output.layer.stats.gates[0].num_assignments, 160);
  EXPECT_EQ(output.layer.stats.gates[1].num_assignments, 160);
  EXPECT_EQ(output.layer.stats.rows_processed, either.sum().item<int64_t>());
  EXPECT_LE(output.layer.stats.rows_processed, 240);
  EXPECT_GE(output.layer.stats.rows_processed, 160);

  // Each task mixes with weights of its own what every expert says of every sample.
  for (size_t task = 0; task < kNumTasks; ++task) {
    at::Tensor mix = at::zeros({40, kHidden}, at::kDouble);
    const auto experts = model.layer().experts()->children();
    ASSERT_EQ(experts.size(), size_t{6});
    for (size_t e = 0; e < experts.size(); ++e) {
      const at::Tensor out = experts[e]->as<Network>()->forward(input.tokens);
      mix += weights[task].select(1, static_cast<int64_t>(e)).unsqueeze(1) * out;
    }
    EXPECT_TRUE(
        at::allclose(model.towers()[task]->forward(mix), output.logits[task], 1e-12, 1e-12));
  }
}

TEST(TrainMulti, RowsAreOfTheUnion) {
  MultiOptions options = small_run(GateKind::kTopK);
  options.train.top_k = 4;
  options.train.train_iters = 3;
  const MultiResult result = run_alone(options);
  for (const MultiScore* score : {&result.test, &result.best().train, &result.best().validation}) {
    EXPECT_EQ(score->tasks[0].experts_per_token, 4);
    EXPECT_EQ(score->tasks[1].experts_per_token, 4);
    EXPECT_GE(score->rows_per_sample, 4);
    EXPECT_LE(score->rows_per_sample, 6);
  }
  options = small_run(GateKind::kSingle);
  EXPECT_EQ(run_alone(options).test.rows_per_sample, 1);  // one expert, chosen by both gates
}

TEST(MultiModel, Shapes) {
  const int64_t mlp = 1296 * 64 + 64 + 64 * 50 + 50;
  const int64_t conv = 25 * 10 + 10 + 250 * 20 + 20 + 720 * 50 + 50 + 50 * 50 + 50;
  const int64_t tower = 2 * (50 * 50 + 50) + 50 * 10 + 10;
  const int64_t router = 6 * 1297;
  for (const ExpertKind kind : {ExpertKind::kMlp, ExpertKind::kConv}) {
    const int64_t expert = kind == ExpertKind::kMlp ? mlp : conv;
    const MultiOptions options = small_run(GateKind::kTopK, kind);
    const ParameterCount count = count_parameters(options);
    EXPECT_EQ(count.total, 6 * expert + 2 * (tower + router));
    EXPECT_EQ(count.active, 4 * expert + 2 * (tower + router));
    MultiModel model(comm::self_group(), options);
    int64_t held = 0;
    for (const at::Tensor& parameter : model.parameters()) held += parameter.numel();
    EXPECT_EQ(held, count.total);
    const MultiOutput output = model.forward(multi_input(first_samples(7), options.train));
    for (size_t task = 0; task < kNumTasks; ++task) {
      EXPECT_EQ(output.layer.outputs[task].sizes(), (at::IntArrayRef{7, 50}));
      EXPECT_EQ(output.logits[task].sizes(), (at::IntArrayRef{7, 10}));
    }
  }
  MultiOptions options = small_run(GateKind::kSingle);
  EXPECT_EQ(count_parameters(options).active, mlp + 2 * tower);
  options = small_run(GateKind::kDense);
  EXPECT_EQ(count_parameters(options).active, count_parameters(options).total);
}

TEST(MultiModel, InitialValues) {
  const auto network = make_multi_expert(ExpertKind::kConv, 5);
  const auto parameters = network->named_parameters();
  // Glorot: uniform in +-sqrt(6 / (fan_in + fan_out)), variance a third of the square.
  const at::Tensor second = parameters["layers.4.weight"];
  ASSERT_EQ(second.sizes(), (at::IntArrayRef{20, 10, 5, 5}));
  const double bound = std::sqrt(6.0 / (250 + 500));
  EXPECT_LE(second.abs().max().item<double>(), bound);
  EXPECT_NEAR(second.square().mean().item<double>(), bound * bound / 3, .05 * bound * bound / 3);
  const at::Tensor dense = parameters["layers.8.weight"];
  ASSERT_EQ(dense.sizes(), (at::IntArrayRef{50, 720}));
  EXPECT_LE(dense.abs().max().item<double>(), std::sqrt(6.0 / 770));
  EXPECT_GE(dense.abs().max().item<double>(), .99 * std::sqrt(6.0 / 770));
  EXPECT_EQ(parameters["layers.8.bias"].abs().max().item<double>(), 0);

  const auto same = make_multi_expert(ExpertKind::kConv, 5)->named_parameters();
  const auto other = make_multi_expert(ExpertKind::kConv, 6)->named_parameters();
  EXPECT_TRUE(at::equal(same["layers.8.weight"], dense));
  EXPECT_FALSE(at::equal(other["layers.8.weight"], dense));
  // The two gates, and any two experts, start apart.
  MultiModel model(comm::self_group(), small_run(GateKind::kTopK));
  const auto all = model.named_parameters();
  EXPECT_FALSE(at::equal(all["layer.gate_0.weight"], all["layer.gate_1.weight"]));
  EXPECT_FALSE(at::equal(all["layer.experts.expert_0.layers.0.weight"],
                         all["layer.experts.expert_1.layers.0.weight"]));
  EXPECT_FALSE(at::equal(all["tower_0.layers.0.weight"], all["tower_1.layers.0.weight"]));
}

TEST(MultiModel, InputsAreSums) {
  CanvasBatch batch;
  batch.pixels.assign(size_t{2 * kCanvasPixels}, 0);
  batch.pixels[3] = 255;
  batch.pixels.back() = 510;
  for (auto& classes : batch.classes) classes = {0, 1};
  const MoEInput input = multi_input(batch, small_run(GateKind::kTopK).train);
  ASSERT_EQ(input.tokens.sizes(), (at::IntArrayRef{2, 1296}));
  EXPECT_EQ(input.tokens[0][3].item<double>(), 1);
  EXPECT_EQ(input.tokens[1][1295].item<double>(), 2);
  EXPECT_EQ(input.tokens.sum().item<double>(), 3);
}

TEST(TrainMulti, LossFalls) {
  struct Case {
    GateKind gate;
    ExpertKind experts;
    bool input_norm;
  };
  for (const Case& c : {Case{GateKind::kSingle, ExpertKind::kMlp, false},
                        Case{GateKind::kTopK, ExpertKind::kMlp, false},
                        Case{GateKind::kTopK, ExpertKind::kMlp, true},
                        Case{GateKind::kTopK, ExpertKind::kConv, false},
                        Case{GateKind::kDSelectK, ExpertKind::kMlp, true},
                        Case{GateKind::kComet, ExpertKind::kMlp, false},
                        Case{GateKind::kComet, ExpertKind::kMlp, true},
                        Case{GateKind::kDense, ExpertKind::kMlp, false}}) {
    SCOPED_TRACE(std::string(gate_name(c.gate)) + (c.input_norm ? ", layer norm" : ""));
    MultiOptions options = small_run(c.gate, c.experts);
    options.train.input_norm = c.input_norm;
    options.train.dtype = kernels::DType::kFloat32;
    options.train.train_iters = 40;
    options.train.lr = 2e-3;
    std::vector<double> reported;
    const MultiResult result =
        train_multi(comm::self_group(), fixture_pairs(), options,
                    [&](const StepReport& step) { reported.push_back(step.cross_entropy); });
    EXPECT_NEAR(reported.front(), std::log(10), .3);
    EXPECT_LT(result.epochs.back().train.mean_cross_entropy(),
              .8 * result.epochs.front().train.mean_cross_entropy());
  }
}

TEST(TrainMulti, BestEpoch) {
  MultiOptions options = small_run(GateKind::kTopK);
  options.train.dtype = kernels::DType::kFloat32;
  options.train.lr = 1e-2;  // large, so that it does not only get better
  options.train.train_iters = 80;
  std::vector<double> seen;
  const MultiResult result =
      train_multi(comm::self_group(), fixture_pairs(), options, {}, [&](const EpochScore& epoch) {
        seen.push_back(epoch.validation.mean_cross_entropy());
        EXPECT_EQ(epoch.epoch, static_cast<int64_t>(seen.size()));
      });
  ASSERT_EQ(seen.size(), size_t{20});
  const auto best = std::min_element(seen.begin(), seen.end());
  EXPECT_EQ(result.best_epoch, best - seen.begin() + 1);
  ASSERT_LT(result.best_epoch, 20);

  // A run that ends with the best epoch has the same test figures.
  options.train.train_iters = result.best_epoch * 4;
  const MultiResult shorter = run_alone(options);
  EXPECT_EQ(shorter.best_epoch, result.best_epoch);
  for (size_t task = 0; task < kNumTasks; ++task) {
    EXPECT_EQ(shorter.test.tasks[task].cross_entropy, result.test.tasks[task].cross_entropy);
    EXPECT_EQ(shorter.test.tasks[task].accuracy, result.test.tasks[task].accuracy);
  }
}

TEST(TrainMulti, Protocols) {
  const MultiOptions small = multi_defaults(Protocol::kSmall);
  EXPECT_EQ(small.experts, ExpertKind::kMlp);
  EXPECT_EQ(small.train.num_experts, 6);
  EXPECT_EQ(small.train.top_k, 2);
  EXPECT_EQ(small.train.lr, 5e-4);
  EXPECT_EQ(small.train.adam_eps, 1e-7);
  EXPECT_EQ(num_steps(small.train, 30000), 8 * 117);
  EXPECT_FALSE(small.train.input_norm);
  const MultiOptions published = multi_defaults(Protocol::kPublished);
  EXPECT_EQ(published.experts, ExpertKind::kConv);
  EXPECT_EQ(published.train.num_experts, 5);
  EXPECT_EQ(num_steps(published.train, 100000), 200 * 195);
}

TEST(TrainMulti, WrongSettings) {
  const auto text_of = [](int ranks, const MultiOptions& options) {
    return error_text<ConfigError>([&] { run(ranks, options); });
  };
  MultiOptions options = small_run(GateKind::kTopK);
  options.train.global_batch_size = 129;
  std::string text = text_of(1, options);
  EXPECT_NE(text.find("global_batch_size=129"), std::string::npos) << text;
  EXPECT_NE(text.find("1 to 128"), std::string::npos) << text;
  options = small_run(GateKind::kTopK);
  options.train.idle_ranks = 2;
  text = text_of(2, options);
  EXPECT_NE(text.find("idle_ranks=2"), std::string::npos) << text;
  options = small_run(GateKind::kComet);
  options.train.top_k = 7;
  text = text_of(1, options);
  EXPECT_NE(text.find("top_k=7"), std::string::npos) << text;
  EXPECT_NE(text.find("num_experts=6"), std::string::npos) << text;
}

}  // namespace
}  // namespace perseid::examples
