// Every gate through a layer, float64. The list is in conformance_gates.h.
//   Gradients        of tokens, gate and experts against central differences, 1e-7, with losses
//   EqualsDense      outputs and all gradients = every expert run on every token, 1e-12, and 1e-5
//                    in float32
//   CometSwitches    of the COMET gates of the list are open and saturated at once
//   IdleExperts      an expert without weight runs no row, forward or backward, by its own counts
//   Ranks            1, 2, 3 and 4 ranks, one of them empty, equal one process, 1e-12
//   Batches          two batches are their concatenation
//   TokensPermuted   permuted tokens have permuted outputs and the same losses
//   ExpertsPermuted  rows of gate and experts permuted together change nothing
//   MaskedTokens     NaN tokens that are not valid change nothing
//   NoTokens         T = 0: zero losses and gradients
//   ThreeGates       with disjoint supports: each equals a dense layer of its own
//   SaveAndLoad      the same bits; evaluation leaves parameters and buffers as they are
#include <ATen/Parallel.h>
#include <torch/serialize.h>

#include <map>
#include <mutex>
#include <sstream>

#include "moe/gradients.h"
#include "tests/gradcheck.h"
#include "tests/moe/conformance_gates.h"

namespace perseid::testing {
namespace {

using at::Tensor;
using GatePtr = std::shared_ptr<gates::Gate>;

constexpr int64_t kTokens = 13;

/// An expert of a user that counts its rows, in both directions.
struct CountedExpert : torch::nn::Module {
  CountedExpert() {
    first = register_module("first", torch::nn::Linear(kDModel, kDFf));
    second = register_module("second", torch::nn::Linear(kDFf, kDOut));
  }
  Tensor forward(const Tensor& x) {
    rows_forward += x.size(0);
    Tensor y = second(at::tanh(first(x)));
    if (y.requires_grad()) {
      y.register_hook([this](const Tensor& gradient) { rows_backward += gradient.size(0); });
    }
    return y;
  }
  int64_t rows_forward = 0, rows_backward = 0;
  torch::nn::Linear first{nullptr}, second{nullptr};
};

std::shared_ptr<Experts> counted_experts(int64_t num_experts,
                                         std::vector<std::shared_ptr<CountedExpert>>& counted) {
  counted.resize(static_cast<size_t>(num_experts));
  const auto experts = std::make_shared<ModuleExperts>(
      ModuleExpertsOptions(kDModel, kDOut).seed(3),
      [&](int64_t e) {
        auto& expert = counted[static_cast<size_t>(e)];
        expert = std::make_shared<CountedExpert>();
        return torch::nn::AnyModule(expert);
      },
      ExpertPlacement::contiguous(num_experts, 1), 0);
  experts->to(at::kDouble);
  return experts;
}

std::shared_ptr<MoELayer> layer_of(const std::vector<GatePtr>& gates,
                                   const ParallelGroups& groups) {
  const comm::Group& ep = groups.expert_parallel;
  const auto placement = ExpertPlacement::contiguous(gates.front()->num_experts(), ep.size());
  return std::make_shared<MoELayer>(
      gates, make_experts(ExpertKind::kGatedBias, placement, ep.rank(), at::kDouble), placement,
      groups);
}

ParallelGroups one_process() { return make_parallel_groups(comm::self_group()); }

MoEInput input_of(const Tensor& tokens, int64_t first = 0) {
  MoEInput input(tokens);
  input.keys = at::arange(first, first + tokens.size(0)).mul(7);
  input.progress = .5;
  return input;
}

gates::GateInput gate_input_of(const Tensor& tokens, bool training) {
  gates::GateInput input;
  input.tokens = tokens;
  input.keys = at::arange(tokens.size(0)).mul(7);
  input.progress = .5;
  input.training = training;
  return input;
}

class GateConformance : public ::testing::TestWithParam<ConformingGate> {
 protected:
  void SetUp() override { at::set_num_threads(1); }
  GatePtr gate(const GateSizes& sizes = {}) const { return GetParam().make(sizes); }
};

TEST_P(GateConformance, Gradients) {
  const auto layer = layer_of({gate()}, one_process());
  const Tensor tokens = case_tokens(5).clone();
  std::vector<Tensor> inputs = layer->parameters();
  inputs.push_back(tokens);
  GradcheckOptions options;
  options.max_elements = 40;
  EXPECT_TRUE(gradients_match(
      [&] {
        const MoEOutput out = layer->forward(input_of(tokens));
        return std::vector<Tensor>{out.output(), out.loss().to(at::kDouble)};
      },
      inputs, 1e-7, options));
}

/// Output of the gate's weights with every expert run on every token.
Tensor dense_output(gates::Gate& gate, Experts& experts, const Tensor& tokens, bool training) {
  const Tensor weights = gates::dense_weights(gate.forward(gate_input_of(tokens, training)).routing,
                                              gate.num_experts());
  Tensor y = at::zeros({tokens.size(0), kDOut}, tokens.options());
  for (int64_t e = 0; e < gate.num_experts(); ++e) {
    y = y + weights.narrow(1, e, 1) * dense_expert(experts, e, tokens);
  }
  return y;
}

void expect_equals_dense(const GatePtr& gate, bool training, at::ScalarType type = at::kDouble) {
  const double tolerance = type == at::kDouble ? 1e-12 : 1e-5;
  const auto layer = layer_of({gate}, one_process());
  layer->to(type);
  layer->train(training);
  const Tensor cotangent = random_tensor({kTokens, kDOut}, 70, -1, 1, type);
  const auto run = [&](bool is_sparse) {
    layer->zero_grad();
    const Tensor tokens = case_tokens(kTokens, type).clone().set_requires_grad(true);
    const Tensor output = is_sparse ? layer->forward(input_of(tokens)).output()
                                    : dense_output(*gate, *layer->experts(), tokens, training);
    (output * cotangent).sum().backward();
    std::vector<Tensor> values = {output.detach(), tokens.grad()};
    for (const Tensor& parameter : layer->parameters()) {
      values.push_back(parameter.grad().defined() ? parameter.grad().clone()
                                                  : at::zeros_like(parameter));
    }
    return values;
  };
  const auto sparse = run(true), dense = run(false);
  for (size_t i = 0; i < dense.size(); ++i) {
    EXPECT_TRUE(close_to(sparse[i], dense[i], tolerance)) << i << " training=" << training;
  }
}

TEST_P(GateConformance, EqualsDense) {
  for (const GateSizes& sizes :
       {GateSizes{6, 2}, GateSizes{6, 6}, GateSizes{5, 1}, GateSizes{1, 1}}) {
    SCOPED_TRACE("E=" + std::to_string(sizes.num_experts) + " K=" + std::to_string(sizes.top_k));
    for (const bool training : {true, false}) expect_equals_dense(gate(sizes), training);
    expect_equals_dense(gate(sizes), true, at::kFloat);
  }
}

TEST_P(GateConformance, IdleExperts) {
  std::vector<std::shared_ptr<CountedExpert>> counted;
  const auto gate = this->gate();
  const auto experts = counted_experts(6, counted);
  MoELayer layer({gate}, experts, ExpertPlacement::contiguous(6, 1), one_process());
  const Tensor tokens = case_tokens(3).clone().set_requires_grad(true);
  const MoEOutput out = layer.forward(input_of(tokens));
  out.output().sum().backward();
  const Tensor has_weight =
      gates::dense_weights(gate->forward(gate_input_of(tokens, true)).routing, 6).ne(0);
  EXPECT_EQ(out.stats.rows_processed, has_weight.sum().item<int64_t>());
  for (size_t e = 0; e < counted.size(); ++e) {
    const int64_t rows = has_weight.select(1, static_cast<int64_t>(e)).sum().item<int64_t>();
    EXPECT_EQ(counted[e]->rows_forward, rows) << "expert " << e;
    EXPECT_EQ(counted[e]->rows_backward, rows) << "expert " << e;
    EXPECT_EQ(out.stats.gates[0].tokens_per_expert[static_cast<int64_t>(e)].item<int64_t>(), rows);
    for (const Tensor& parameter : counted[e]->parameters()) {
      EXPECT_EQ(parameter.grad().ne(0).any().item<bool>(), rows > 0) << "expert " << e;
    }
  }
}

/// What a step gives, in global order.
struct Step {
  std::vector<Tensor> outputs, token_gradients;  ///< by rank
  std::map<std::string, Tensor> parameters;      ///< gradients; experts by "name/global id"
  double loss = 0;
};

Step run_ranks(const ConformingGate& gate, const std::vector<int64_t>& shares) {
  Step step;
  step.outputs.resize(shares.size());
  step.token_gradients.resize(shares.size());
  std::mutex mutex;
  comm::run_local(static_cast<int>(shares.size()), [&](const comm::Group& world) {
    const auto rank = static_cast<size_t>(world.rank());
    int64_t first = 0;
    for (size_t r = 0; r < rank; ++r) first += shares[r];
    const ParallelGroups groups = make_parallel_groups(world);
    const auto layer = layer_of({gate.make({})}, groups);
    const Tensor tokens =
        case_tokens(kTokens).narrow(0, first, shares[rank]).clone().set_requires_grad(true);
    const MoEOutput out = layer->forward(input_of(tokens, first));
    const Tensor loss = weighted_loss(out.outputs, first) + out.loss();
    loss.backward();
    sum_gradients(*layer, groups);

    const std::lock_guard lock(mutex);
    step.loss += loss.item<double>();
    step.outputs[rank] = out.output().detach();
    step.token_gradients[rank] = tokens.grad();
    for (const auto& parameter : layer->named_parameters()) {
      const Tensor& gradient = parameter.value().grad();
      if (parameter.key().rfind("experts.", 0) != 0) {
        step.parameters[parameter.key()] = gradient;
        continue;
      }
      const auto& ids = layer->experts()->expert_ids();
      for (size_t slot = 0; slot < ids.size(); ++slot) {
        step.parameters[parameter.key() + "/" + std::to_string(ids[slot])] =
            gradient[static_cast<int64_t>(slot)];
      }
    }
  });
  return step;
}

TEST_P(GateConformance, Ranks) {
  const Step one = run_ranks(GetParam(), {kTokens});
  for (const std::vector<int64_t>& shares :
       {std::vector<int64_t>{kTokens, 0}, std::vector<int64_t>{5, 0, 8},
        std::vector<int64_t>{5, 0, 2, 6}}) {
    SCOPED_TRACE("P=" + std::to_string(shares.size()));
    const Step many = run_ranks(GetParam(), shares);
    EXPECT_TRUE(close_to(at::cat(many.outputs), one.outputs[0], 1e-12));
    EXPECT_TRUE(close_to(at::cat(many.token_gradients), one.token_gradients[0], 1e-12));
    EXPECT_NEAR(many.loss, one.loss, 1e-12 * (1 + std::abs(one.loss)));
    ASSERT_EQ(many.parameters.size(), one.parameters.size());
    for (const auto& [name, gradient] : one.parameters) {
      EXPECT_TRUE(close_to(many.parameters.at(name), gradient, 1e-12)) << name;
    }
  }
}

/// Output, gradient of the tokens and of all parameters of one forward without the losses, whose
/// means and products belong to a batch.
std::vector<Tensor> outputs_and_gradients(MoELayer& layer, const Tensor& all, int64_t first,
                                          int64_t count) {
  layer.zero_grad();
  const Tensor tokens = all.narrow(0, first, count).clone().set_requires_grad(true);
  const MoEOutput out = layer.forward(input_of(tokens, first));
  weighted_loss(out.outputs, first).backward();
  std::vector<Tensor> values = {out.output().detach(), tokens.grad()};
  for (const Tensor& parameter : layer.parameters()) {
    values.push_back(parameter.grad().defined() ? parameter.grad().clone()
                                                : at::zeros_like(parameter));
  }
  return values;
}

TEST_P(GateConformance, Batches) {
  const auto layer = layer_of({gate()}, one_process());
  layer->eval();  // random choices of training are keyed by the place in the global batch
  const Tensor tokens = case_tokens(kTokens);
  const auto a = outputs_and_gradients(*layer, tokens, 0, 8);
  const auto b = outputs_and_gradients(*layer, tokens, 8, kTokens - 8);
  const auto whole = outputs_and_gradients(*layer, tokens, 0, kTokens);
  for (size_t i = 0; i < whole.size(); ++i) {
    EXPECT_TRUE(close_to(i < 2 ? at::cat({a[i], b[i]}) : a[i] + b[i], whole[i], 1e-12)) << i;
  }
}

TEST_P(GateConformance, TokensPermuted) {
  const Tensor order = at::arange(kTokens).mul(5).remainder(kTokens);
  const auto run = [&](bool is_permuted) {
    const auto layer = layer_of({gate()}, one_process());
    layer->eval();
    MoEInput input = input_of(case_tokens(kTokens));
    if (is_permuted) {
      input.tokens = input.tokens.index_select(0, order);
      input.keys = input.keys->index_select(0, order);
    }
    const MoEOutput out = layer->forward(input);
    return std::pair{out.output().detach(), out.loss().item<double>()};
  };
  const auto [output, loss] = run(false);
  const auto [permuted, permuted_loss] = run(true);
  EXPECT_TRUE(close_to(permuted, output.index_select(0, order), 1e-12));
  EXPECT_NEAR(permuted_loss, loss, 1e-12 * (1 + std::abs(loss)));
}

/// Rows of gate and experts permuted together change nothing. For gates whose parameters have one
/// row for each expert; trees and codes depend on the numbering, and so do groups.
TEST_P(GateConformance, ExpertsPermuted) {
  const Tensor order = at::tensor({4, 2, 0, 5, 1, 3}, at::kLong);
  const auto layer = layer_of({gate()}, one_process()), other = layer_of({gate()}, one_process());
  bool has_row_per_expert = !gate()->parameters().empty();
  for (const Tensor& parameter : gate()->parameters()) {
    has_row_per_expert = has_row_per_expert && parameter.size(0) == 6;
  }
  if (!has_row_per_expert || std::string(GetParam().name) == "top_k_groups") {
    GTEST_SKIP() << "the gate depends on the numbering of the experts";
  }
  const at::NoGradGuard no_grad;
  for (const bool is_buffer : {false, true}) {
    const auto tensors = is_buffer ? other->buffers() : other->parameters();
    for (Tensor tensor : tensors) {
      if (tensor.dim() > 0 && tensor.size(0) == 6) tensor.copy_(tensor.index_select(0, order));
    }
  }
  layer->eval();
  other->eval();
  const MoEOutput plain = layer->forward(input_of(case_tokens(kTokens)));
  const MoEOutput permuted = other->forward(input_of(case_tokens(kTokens)));
  EXPECT_TRUE(close_to(permuted.output(), plain.output(), 1e-12));
  EXPECT_NEAR(permuted.loss().item<double>(), plain.loss().item<double>(), 1e-12);
}

TEST_P(GateConformance, MaskedTokens) {
  const Tensor valid = at::arange(kTokens).remainder(3).ne(1);
  const Tensor places = at::nonzero(valid).squeeze(1);
  const auto run = [&](bool is_masked) {
    const auto layer = layer_of({gate()}, one_process());
    layer->eval();
    Tensor tokens = case_tokens(kTokens).clone();
    if (!is_masked) tokens = tokens.index_select(0, places);
    if (is_masked) tokens.masked_fill_(valid.logical_not().unsqueeze(1), NAN);
    tokens.set_requires_grad(true);
    MoEInput input = input_of(tokens);
    if (!is_masked) input.keys = places.mul(7);
    if (is_masked) input.valid = valid;
    const MoEOutput out = layer->forward(input);
    Tensor output = out.output();
    if (is_masked) {
      const Tensor rest = output.masked_select(valid.logical_not().unsqueeze(1));
      EXPECT_TRUE(same_bits(rest.detach(), at::zeros(rest.sizes(), at::kDouble)));
      output = output.index_select(0, places);
    }
    const Tensor loss = weighted_loss({output}, 0) + out.loss();
    loss.backward();
    Tensor gradient = tokens.grad();
    if (is_masked) {
      const Tensor rest = gradient.masked_select(valid.logical_not().unsqueeze(1));
      EXPECT_TRUE(same_bits(rest, at::zeros(rest.sizes(), at::kDouble)));
      gradient = gradient.index_select(0, places);
    }
    EXPECT_EQ(out.stats.num_tokens, places.size(0));
    std::vector<Tensor> values = {output.detach(), loss.detach(), gradient};
    for (const Tensor& parameter : layer->parameters()) values.push_back(parameter.grad());
    return values;
  };
  const auto masked = run(true), plain = run(false);
  for (size_t i = 0; i < plain.size(); ++i) {
    ASSERT_EQ(masked[i].defined(), plain[i].defined()) << i;
    if (!plain[i].defined()) continue;
    EXPECT_TRUE(close_to(masked[i], plain[i], 1e-12)) << i;
  }
}

TEST_P(GateConformance, NoTokens) {
  const auto layer = layer_of({gate()}, one_process());
  const Tensor tokens = at::zeros({0, kDModel}, at::kDouble).set_requires_grad(true);
  const MoEOutput out = layer->forward(input_of(tokens));
  EXPECT_EQ(out.output().sizes(), at::IntArrayRef({0, kDOut}));
  EXPECT_EQ(out.loss().item<double>(), 0);
  EXPECT_EQ(out.stats.rows_processed, 0);
  (out.output().sum() + out.loss()).backward();
  for (const auto& parameter : layer->named_parameters()) {
    const Tensor& gradient = parameter.value().grad();
    if (!gradient.defined()) continue;
    EXPECT_FALSE(gradient.ne(0).any().item<bool>()) << parameter.key();
  }
}

/// The decisions of a gate over 2 experts as decisions over experts 2g and 2g + 1 of 6.
class PairGate : public gates::Gate {
 public:
  PairGate(const ConformingGate& inner, int64_t pair) : Gate("pair_gate", 6, 1), pair_(pair) {
    inner_ = register_module("inner", inner.make({2, 1, pair}));
  }
  gates::GateOutput forward(const gates::GateInput& input) override {
    gates::GateOutput output = inner_->forward(input);
    output.routing.expert_idx = output.routing.expert_idx.add(2 * pair_);
    output.losses.clear();
    output.global_losses.clear();
    output.balance = {};
    output.stats.tokens_per_expert =
        gates::count_assignments(output.routing, 6, output.stats.num_tokens).tokens_per_expert;
    return output;
  }

 private:
  GatePtr inner_;
  int64_t pair_;
};

TEST_P(GateConformance, ThreeGates) {
  std::vector<GatePtr> gates;
  for (int64_t pair = 0; pair < 3; ++pair)
    gates.push_back(std::make_shared<PairGate>(GetParam(), pair));
  const auto layer = layer_of(gates, one_process());
  const auto run = [&](bool is_sparse) {
    layer->zero_grad();
    const Tensor tokens = case_tokens(kTokens).clone().set_requires_grad(true);
    std::vector<Tensor> outputs;
    if (is_sparse) {
      const MoEOutput out = layer->forward(input_of(tokens));
      outputs = out.outputs;
      int64_t num_pairs = 0;
      for (const auto& stats : out.stats.gates) num_pairs += stats.num_assignments;
      EXPECT_EQ(out.stats.rows_processed, num_pairs);
    } else {
      for (const GatePtr& gate : gates) {
        outputs.push_back(dense_output(*gate, *layer->experts(), tokens, true));
      }
    }
    weighted_loss(outputs, 0).backward();
    std::vector<Tensor> values = {at::cat(outputs, 1).detach(), tokens.grad()};
    for (const Tensor& parameter : layer->parameters()) {
      values.push_back(parameter.grad().defined() ? parameter.grad().clone()
                                                  : at::zeros_like(parameter));
    }
    return values;
  };
  const auto sparse = run(true), dense = run(false);
  for (size_t i = 0; i < dense.size(); ++i) EXPECT_TRUE(close_to(sparse[i], dense[i], 1e-12)) << i;
}

std::vector<Tensor> state_of(const torch::nn::Module& module) {
  std::vector<Tensor> state;
  for (const auto& tensors : {module.parameters(), module.buffers()}) {
    for (const Tensor& tensor : tensors) state.push_back(tensor.detach().clone());
  }
  return state;
}

TEST_P(GateConformance, SaveAndLoad) {
  const auto gate = this->gate();
  const Tensor tokens = case_tokens(kTokens);
  const auto layer = layer_of({gate}, one_process());
  layer->after_step(
      layer->forward(input_of(tokens)).stats);  // buffers that are not as at the start

  std::stringstream file;
  torch::serialize::OutputArchive out;
  gate->save(out);
  out.save_to(file);
  const auto loaded = this->gate();
  const at::NoGradGuard no_grad;
  for (const auto& tensors : {loaded->parameters(), loaded->buffers()}) {
    for (const Tensor& tensor : tensors) tensor.zero_();
  }
  torch::serialize::InputArchive in;
  in.load_from(file);
  loaded->load(in);

  const auto before = state_of(*gate), after = state_of(*loaded);
  ASSERT_EQ(before.size(), after.size());
  for (size_t i = 0; i < before.size(); ++i) {
    EXPECT_TRUE(same_bits(after[i], before[i])) << i;
    EXPECT_EQ(after[i].scalar_type(), before[i].scalar_type()) << i;
  }
  const auto restored = layer_of({loaded}, one_process());
  for (const bool training : {true, false}) {
    layer->train(training);
    restored->train(training);
    EXPECT_TRUE(same_bits(restored->forward(input_of(tokens)).output(),
                          layer->forward(input_of(tokens)).output()));
  }
  const auto evaluated = state_of(*gate);
  for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(same_bits(evaluated[i], before[i])) << i;
}

INSTANTIATE_TEST_SUITE_P(All, GateConformance, ::testing::ValuesIn(conforming_gates()),
                         [](const auto& item) { return std::string(item.param.name); });

TEST(GateConformanceList, CometSwitches) {
  for (const ConformingGate& item : conforming_gates()) {
    const std::string name = item.name;
    if (name != "comet" && name != "comet_hard_eval" && name != "comet_min_weight") continue;
    const gates::GateStats stats =
        item.make({})->forward(gate_input_of(case_tokens(kTokens), true)).stats;
    EXPECT_GT(stats.saturated_nodes, 0) << name;
    EXPECT_LT(stats.saturated_nodes, stats.num_nodes) << name;
  }
}

}  // namespace
}  // namespace perseid::testing
