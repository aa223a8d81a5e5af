// Any module as expert. Plans are made by hand from a table: the slots of each row, in order. The
// reference runs the same modules on one row at a time and adds up with ATen.
//   DenseReference   output and all gradients, float64, G in {1, 2}, ragged and fixed: 1e-12
//   Jacobian         gradcheck of rows, weights and parameters
//   Idle             module not called, parameters get exactly zero; also R = 0, N = 0, no experts
//   CollectiveGraph  the backward behind `rows` runs on a rank without assignments
//   InitialWeights   equal at every number of ranks; LibTorch's generator is left as it was
//   Errors           operation, argument, value, limit, and the expert
#include "moe/module_experts.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/modules/linear.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "comm/group.h"
#include "kernels/error.h"
#include "kernels/parallel.h"
#include "tests/closed_form.h"
#include "tests/config_error.h"
#include "tests/gradcheck.h"

namespace perseid {
namespace {
using testing::config_error;

using testing::close_to;
using testing::random_tensor;
using testing::same_bits;

constexpr int64_t kIn = 3, kOut = 4;
using Slots = std::vector<std::vector<int32_t>>;  // of each row

std::shared_ptr<const RoutingPlan> plan_of(const Slots& slots, int64_t num_experts,
                                           int64_t fixed = 0) {
  auto plan = std::make_shared<RoutingPlan>();
  LocalPlan& local = plan->local;
  std::vector<int32_t> offsets = {0}, slot_of, order;
  for (const auto& row : slots) {
    slot_of.insert(slot_of.end(), row.begin(), row.end());
    offsets.push_back(static_cast<int32_t>(slot_of.size()));
  }
  local.expert_offsets = {0};
  for (int32_t slot = 0; slot < num_experts; ++slot) {
    for (size_t a = 0; a < slot_of.size(); ++a) {
      if (slot_of[a] == slot) order.push_back(static_cast<int32_t>(a));
    }
    local.expert_offsets.push_back(static_cast<int64_t>(order.size()));
  }
  local.num_rows = static_cast<int64_t>(slots.size());
  local.num_assignments = static_cast<int64_t>(slot_of.size());
  local.fixed = fixed;
  if (fixed == 0) local.row_offsets = at::tensor(offsets, at::kInt);
  local.order = at::tensor(order, at::kInt);
  return plan;
}

struct TwoLayers : torch::nn::Module {
  TwoLayers() {
    up = register_module("up", torch::nn::Linear(kIn, 5));
    down = register_module("down", torch::nn::Linear(5, kOut));
    to(at::kDouble);
  }
  at::Tensor forward(const at::Tensor& rows) { return down(up(rows).tanh()); }
  torch::nn::Linear up{nullptr}, down{nullptr};
};
torch::nn::AnyModule two_layers(int64_t /*expert*/) { return torch::nn::AnyModule(TwoLayers()); }

std::shared_ptr<ModuleExperts> make_experts(int64_t num_experts, const ExpertFactory& factory) {
  return std::make_shared<ModuleExperts>(ModuleExpertsOptions(kIn, kOut).seed(7).layer_id(1),
                                         factory, ExpertPlacement::contiguous(num_experts, 1), 0);
}

at::Tensor reference(Experts& experts, const at::Tensor& rows, const at::Tensor& weights,
                     const Slots& slots) {
  std::vector<at::Tensor> outputs;
  int64_t a = 0;
  for (size_t n = 0; n < slots.size(); ++n) {
    at::Tensor sum = at::zeros({weights.size(1), kOut}, at::kDouble);
    for (const int32_t slot : slots[n]) {
      auto* module = experts.children()[static_cast<size_t>(slot)]->as<TwoLayers>();
      const at::Tensor y = module->forward(rows.narrow(0, static_cast<int64_t>(n), 1));
      sum = sum + weights[a++].unsqueeze(1) * y;
    }
    outputs.push_back(sum.view({1, -1}));
  }
  return at::cat(outputs);
}

void clear_gradients(const std::vector<at::Tensor>& tensors) {
  for (const at::Tensor& tensor : tensors) tensor.mutable_grad() = at::Tensor();
}

const Slots kRagged = {{2, 0}, {}, {0, 4, 2}, {4}, {0, 2}, {2}, {}};  // experts 1 and 3 are idle
const Slots kFixed = {{2, 0}, {0, 4}, {4, 2}, {2, 4}, {0, 2}};

TEST(ModuleExperts, EqualsDenseReference) {
  for (const bool is_fixed : {false, true}) {
    const Slots& slots = is_fixed ? kFixed : kRagged;
    const auto plan = plan_of(slots, 5, is_fixed ? 2 : 0);
    for (const int64_t num_gates : {1, 2}) {
      const auto experts = make_experts(5, two_layers);
      const auto num_rows = static_cast<int64_t>(slots.size());
      const at::Tensor rows = random_tensor({num_rows, kIn}, 1).requires_grad_(true);
      const at::Tensor weights =
          random_tensor({plan->local.num_assignments, num_gates}, 2).requires_grad_(true);
      const at::Tensor cotangent = random_tensor({num_rows, num_gates * kOut}, 3);
      std::vector<at::Tensor> inputs = experts->parameters();
      inputs.push_back(rows);
      inputs.push_back(weights);

      const at::Tensor expected = reference(*experts, rows, weights, slots);
      (expected * cotangent).sum().backward();
      std::vector<at::Tensor> expected_gradients;
      for (const at::Tensor& input : inputs) {
        expected_gradients.push_back(input.grad().defined() ? input.grad().clone()
                                                            : at::zeros_like(input));
      }
      clear_gradients(inputs);

      const at::Tensor output = experts->forward(rows, weights, plan);
      EXPECT_TRUE(close_to(output, expected, 1e-12));
      (output * cotangent).sum().backward();
      for (size_t i = 0; i < inputs.size(); ++i) {
        EXPECT_TRUE(close_to(inputs[i].grad(), expected_gradients[i], 1e-12)) << "input " << i;
      }
      EXPECT_TRUE(same_bits(experts->forward(rows, weights, plan), output));
    }
  }
}

TEST(ModuleExperts, Jacobian) {
  for (const int64_t num_gates : {1, 2}) {
    const auto experts = make_experts(5, two_layers);
    const auto plan = plan_of(kRagged, 5);
    const at::Tensor rows = random_tensor({static_cast<int64_t>(kRagged.size()), kIn}, 4);
    const at::Tensor weights = random_tensor({plan->local.num_assignments, num_gates}, 5);
    std::vector<at::Tensor> inputs = experts->parameters();
    inputs.push_back(rows);
    inputs.push_back(weights);
    EXPECT_TRUE(testing::gradients_match(
        [&] { return std::vector<at::Tensor>{experts->forward(rows, weights, plan)}; }, inputs));
  }
}

TEST(ModuleExperts, StridedInputs) {
  const auto experts = make_experts(5, two_layers);
  const auto plan = plan_of(kFixed, 5, 2);
  const at::Tensor rows = random_tensor({kIn, 5}, 1).t();
  const at::Tensor weights = random_tensor({2, 10}, 2).t();
  EXPECT_TRUE(same_bits(experts->forward(rows, weights, plan),
                        experts->forward(rows.contiguous(), weights.contiguous(), plan)));
}

/// Counts its calls and overwrites its input.
struct InPlace : torch::nn::Module {
  explicit InPlace(int* calls_) : calls(calls_) {
    scale = register_parameter("scale", at::full({kOut}, 2.0, at::kDouble));
  }
  at::Tensor forward(at::Tensor rows) {
    ++*calls;
    rows.mul_(3);
    return rows.narrow(1, 0, 1) * scale;
  }
  int* calls;
  at::Tensor scale;
};

TEST(ModuleExperts, ModulesMayWorkInPlace) {
  int calls[5] = {};
  const auto experts = make_experts(5, [&](int64_t expert) {
    return torch::nn::AnyModule(std::make_shared<InPlace>(calls + expert));
  });
  const auto plan = plan_of(kRagged, 5);
  const at::Tensor rows = random_tensor({7, kIn}, 4).requires_grad_(true);
  const at::Tensor before = rows.detach().clone();
  const at::Tensor weights = at::ones({plan->local.num_assignments, 1}, at::kDouble);
  const at::Tensor output = experts->forward(rows, weights, plan);
  EXPECT_TRUE(same_bits(rows, before));
  output.sum().backward();
  EXPECT_EQ(std::vector<int>(calls, calls + 5), (std::vector<int>{1, 0, 1, 0, 1}));
  // Each assignment of a row adds d/dx (3 x * 2 * kOut columns) to the first column.
  for (int64_t n = 0; n < 7; ++n) {
    const auto count = static_cast<double>(kRagged[static_cast<size_t>(n)].size());
    EXPECT_DOUBLE_EQ(output[n][0].item<double>(), before[n][0].item<double>() * 6 * count);
    EXPECT_DOUBLE_EQ(rows.grad()[n][0].item<double>(), 6 * kOut * count);
    EXPECT_EQ(rows.grad()[n][1].item<double>(), 0.0);
  }
}

TEST(ModuleExperts, IdleExpertsGetZeroGradients) {
  // Rows that need no gradient; every shape of emptiness.
  for (const Slots& slots : {kRagged, Slots{}, Slots{{}, {}, {}}}) {
    int calls[5] = {};
    const auto experts = make_experts(5, [&](int64_t expert) {
      return torch::nn::AnyModule(std::make_shared<InPlace>(calls + expert));
    });
    const auto plan = plan_of(slots, 5);
    const auto num_rows = static_cast<int64_t>(slots.size());
    const at::Tensor rows = random_tensor({num_rows, kIn}, 4);
    const at::Tensor weights = at::ones({plan->local.num_assignments, 2}, at::kDouble);
    const at::Tensor output = experts->forward(rows, weights, plan);
    EXPECT_EQ(output.sizes(), (at::IntArrayRef{num_rows, 2 * kOut}));
    EXPECT_TRUE(output.requires_grad());
    output.sum().backward();
    for (size_t slot = 0; slot < 5; ++slot) {
      const at::Tensor parameter = experts->children()[slot]->parameters()[0];
      ASSERT_TRUE(parameter.grad().defined()) << slot;
      const int64_t rows_of_expert =
          plan->local.expert_offsets[slot + 1] - plan->local.expert_offsets[slot];
      EXPECT_EQ(calls[slot], rows_of_expert > 0 ? 1 : 0);
      EXPECT_EQ(parameter.grad().count_nonzero().item<int64_t>(), rows_of_expert > 0 ? kOut : 0);
    }
  }
}

TEST(ModuleExperts, NoAssignmentsGiveDefinedZeroGradients) {
  for (const int64_t num_rows : {0, 3}) {
    const auto experts = make_experts(2, two_layers);
    const auto plan = plan_of(Slots(static_cast<size_t>(num_rows)), 2);
    const at::Tensor rows = random_tensor({num_rows, kIn}, 4).requires_grad_(true);
    const at::Tensor weights = at::empty({0, 1}, at::kDouble).requires_grad_(true);
    const at::Tensor output = experts->forward(rows, weights, plan);
    EXPECT_TRUE(same_bits(output, at::zeros({num_rows, kOut}, at::kDouble)));
    output.sum().backward();
    EXPECT_TRUE(same_bits(rows.grad(), at::zeros_like(rows)));
    EXPECT_TRUE(same_bits(weights.grad(), at::zeros_like(weights)));
  }
}

TEST(ModuleExperts, RankWithoutExperts) {
  ModuleExperts experts(ModuleExpertsOptions(kIn, kOut), two_layers,
                        ExpertPlacement::contiguous(2, 3), 2);
  EXPECT_EQ(experts.num_local_experts(), 0);
  EXPECT_TRUE(experts.parameters().empty());
  const at::Tensor rows = at::empty({0, kIn}, at::kDouble).requires_grad_(true);
  const at::Tensor output =
      experts.forward(rows, at::empty({0, 1}, at::kDouble), plan_of(Slots{}, 0));
  output.sum().backward();
  EXPECT_TRUE(rows.grad().defined());
}

/// The identity, counting backward calls: stands for a collective backward.
struct Counted : torch::autograd::Function<Counted> {
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& rows) {
    return rows.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list& grads) {
    ++calls;
    return {grads[0]};
  }
  static inline int calls = 0;
};

/// Does not read its rows.
struct Constant : torch::nn::Module {
  Constant() { value = register_parameter("value", at::ones({kOut}, at::kDouble)); }
  at::Tensor forward(const at::Tensor& rows) { return value.expand({rows.size(0), kOut}); }
  at::Tensor value;
};

TEST(ModuleExperts, BackwardBehindRowsAlwaysRuns) {
  const auto constant = [](int64_t) { return torch::nn::AnyModule(Constant()); };
  for (const Slots& slots : {kRagged, Slots{}, Slots{{}, {}}}) {
    const auto experts = make_experts(5, constant);
    const auto plan = plan_of(slots, 5);
    const at::Tensor rows =
        random_tensor({static_cast<int64_t>(slots.size()), kIn}, 4).requires_grad_(true);
    Counted::calls = 0;
    experts
        ->forward(Counted::apply(rows), at::ones({plan->local.num_assignments, 1}, at::kDouble),
                  plan)
        .sum()
        .backward();
    EXPECT_EQ(Counted::calls, 1);
    EXPECT_TRUE(same_bits(rows.grad(), at::zeros_like(rows)));
  }
}

TEST(ModuleExperts, FrozenAndNoGradModes) {
  const auto experts = make_experts(5, two_layers);
  const auto plan = plan_of(kRagged, 5);
  const at::Tensor rows = random_tensor({7, kIn}, 4);
  const at::Tensor weights = at::ones({plan->local.num_assignments, 1}, at::kDouble);
  {
    c10::NoGradGuard no_grad;
    EXPECT_FALSE(experts->forward(rows, weights, plan).requires_grad());
  }
  for (const at::Tensor& parameter : experts->parameters()) parameter.set_requires_grad(false);
  EXPECT_FALSE(experts->forward(rows, weights, plan).requires_grad());
}

TEST(ModuleExperts, BFloat16SumsInFloat) {
  // One row to 2 experts that return 1 and 2^-9 with weights 1: the float32 sum is rounded once.
  const auto experts = make_experts(3, [](int64_t expert) {
    auto module = std::make_shared<torch::nn::LinearImpl>(kIn, kOut);
    module->to(at::kBFloat16);
    c10::NoGradGuard no_grad;
    module->weight.zero_();
    module->bias.fill_(expert == 0 ? 1.0 : 0x1.0p-8 + 0x1.0p-9);
    return torch::nn::AnyModule(module);
  });
  const auto plan = plan_of({{0, 2}}, 3);
  const at::Tensor rows = at::zeros({1, kIn}, at::kBFloat16).requires_grad_(true);
  const at::Tensor weights = at::ones({2, 1}).requires_grad_(true);
  const at::Tensor output = experts->forward(rows, weights, plan);
  EXPECT_TRUE(same_bits(output, at::full({1, kOut}, 1 + 0x1.0p-7, at::kBFloat16)));
  output.sum().backward();
  EXPECT_EQ(weights.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(rows.grad().scalar_type(), at::kBFloat16);
  EXPECT_DOUBLE_EQ(weights.grad()[0][0].item<double>(), kOut);
}

/// Parameters of all experts, in the order of their ids, of a model on num_ranks ranks.
std::vector<at::Tensor> initial_weights(int num_ranks, int64_t num_experts) {
  const ExpertPlacement placement = ExpertPlacement::contiguous(num_experts, num_ranks);
  std::vector<std::vector<at::Tensor>> by_rank(static_cast<size_t>(num_ranks));
  comm::run_local(num_ranks, [&](const comm::Group& world) {
    ModuleExperts experts(ModuleExpertsOptions(kIn, kOut).seed(3).layer_id(2), two_layers,
                          placement, world.rank());
    by_rank[static_cast<size_t>(world.rank())] = experts.parameters();
  });
  std::vector<at::Tensor> all;
  for (const auto& part : by_rank) all.insert(all.end(), part.begin(), part.end());
  return all;
}

TEST(ModuleExperts, InitialWeightsDoNotDependOnRanks) {
  const std::vector<at::Tensor> expected = initial_weights(1, 5);
  ASSERT_EQ(expected.size(), 20u);
  EXPECT_FALSE(at::equal(expected[0], expected[4]));  // experts differ
  for (const int num_ranks : {2, 3, 4, 6}) {
    const std::vector<at::Tensor> weights = initial_weights(num_ranks, 5);
    ASSERT_EQ(weights.size(), expected.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      EXPECT_TRUE(same_bits(weights[i], expected[i])) << num_ranks << " ranks, parameter " << i;
    }
  }
  const auto other = [&](uint64_t seed, int64_t layer) {
    return ModuleExperts(ModuleExpertsOptions(kIn, kOut).seed(seed).layer_id(layer), two_layers,
                         ExpertPlacement::contiguous(1, 1), 0)
        .parameters()[0];
  };
  EXPECT_TRUE(same_bits(other(3, 2), expected[0]));
  EXPECT_FALSE(at::equal(other(4, 2), expected[0]));
  EXPECT_FALSE(at::equal(other(3, 1), expected[0]));
}

TEST(ModuleExperts, FactoriesOfThreadsTakeTurns) {
  std::atomic<int> inside = 0;
  comm::run_local(4, [&](const comm::Group& world) {
    const ExpertFactory factory = [&](int64_t expert) {
      EXPECT_EQ(++inside, 1);
      for (int i = 0; i < 1000; ++i) std::this_thread::yield();
      torch::nn::AnyModule module = two_layers(expert);
      --inside;
      return module;
    };
    ModuleExperts(ModuleExpertsOptions(kIn, kOut), factory, ExpertPlacement::contiguous(8, 4),
                  world.rank());
  });
}

TEST(ModuleExperts, GeneratorIsLeftAsItWas) {
  at::manual_seed(11);
  at::randn({3});  // an odd count: the generator holds the second half of a pair
  at::rand({1});
  const at::Tensor expected = at::randn({5});
  at::manual_seed(11);
  at::randn({3});
  at::rand({1});
  make_experts(3, two_layers);
  EXPECT_THROW(make_experts(3,
                            [](int64_t) -> torch::nn::AnyModule {
                              at::rand({3});
                              throw std::runtime_error("factory");
                            }),
               std::runtime_error);
  EXPECT_TRUE(same_bits(at::randn({5}), expected));
}

TEST(ModuleExperts, RegisteredByGlobalId) {
  ModuleExperts experts(ModuleExpertsOptions(kIn, kOut), two_layers,
                        ExpertPlacement({1, 0, 1, 1}, 2), 1);
  std::vector<std::string> names;
  for (const auto& child : experts.named_children()) names.push_back(child.key());
  EXPECT_EQ(names, (std::vector<std::string>{"expert_0", "expert_2", "expert_3"}));
  EXPECT_EQ(experts.expert_ids(), (std::vector<int64_t>{0, 2, 3}));
  EXPECT_FALSE(experts.replicated());
}

TEST(ModuleExperts, KernelsUseTheThreadsOfLibTorch) {
  make_experts(1, two_layers);
  EXPECT_EQ(kernels::num_threads(), at::get_num_threads());
}

TEST(ModuleExperts, ConstructionErrors) {
  const auto made = [](int64_t d_in, int64_t d_out, const ExpertFactory& factory, int rank) {
    return config_error([&] {
      ModuleExperts(ModuleExpertsOptions(d_in, d_out), factory, ExpertPlacement::contiguous(4, 2),
                    rank);
    });
  };
  EXPECT_EQ(made(0, 4, two_layers, 0), "[module_experts] d_in=0 must be at least 1");
  EXPECT_EQ(made(3, -1, two_layers, 0), "[module_experts] d_out=-1 must be at least 1");
  EXPECT_EQ(made(3, 4, two_layers, 2), "[expert_placement] rank=2 must lie in [0, 2)");
  EXPECT_EQ(made(3, 4, nullptr, 0),
            "[module_experts] factory=empty must make the module of an expert");
  EXPECT_EQ(made(
                3, 4, [](int64_t) { return torch::nn::AnyModule(); }, 1),
            "[module_experts] factory=an empty module for expert 2; return a module with "
            "forward(rows)");
}

TEST(ModuleExperts, ForwardErrors) {
  const auto experts = make_experts(5, two_layers);
  const auto plan = plan_of(kFixed, 5, 2);
  const at::Tensor rows = at::zeros({5, kIn}, at::kDouble);
  const at::Tensor weights = at::zeros({10, 1}, at::kDouble);
  const auto error = [&](const at::Tensor& x, const at::Tensor& w, const auto& p) {
    return config_error([&] { experts->forward(x, w, p); });
  };
  EXPECT_EQ(error(at::zeros({5, 7}, at::kDouble), weights, plan),
            "[module_experts] rows=[5, 7] must be [N, d_in] with d_in=3");
  EXPECT_EQ(error(at::zeros({4, kIn}, at::kDouble), weights, plan),
            "[module_experts] rows=[4, 3] differs from num_rows=5 of the plan");
  EXPECT_EQ(error(rows, at::zeros({9, 1}, at::kDouble), plan),
            "[module_experts] weights=[9, 1] must be [R, G] with R=10 assignments of the plan and "
            "G >= 1 gates");
  EXPECT_EQ(error(rows, weights.to(at::kFloat), plan),
            "[module_experts] weights.dtype=Float must be Double for rows of Double");
  EXPECT_EQ(error(rows.to(at::kByte), weights, plan),
            "[module_experts] dtype=Byte is not supported; choose bf16, fp16, fp32 or fp64");
  EXPECT_EQ(error(rows, weights, plan_of(kFixed, 6, 2)),
            "[module_experts] plan experts=6 differs from the 5 experts of this rank");
}

TEST(ModuleExperts, OutputErrorsNameTheExpert) {
  const auto plan = plan_of({{0}, {1}, {1}}, 2);
  const at::Tensor rows = at::zeros({3, kIn});
  const at::Tensor weights = at::zeros({3, 1});
  const auto narrow = make_experts(2, [](int64_t expert) {
    return torch::nn::AnyModule(torch::nn::Linear(kIn, expert == 1 ? kOut + 1 : kOut));
  });
  EXPECT_EQ(config_error([&] { narrow->forward(rows, weights, plan); }),
            "[module_experts] output=[2, 5] must be [2, 4], [rows, d_out], for expert 1");
  struct Wide : torch::nn::Module {
    at::Tensor forward(const at::Tensor& x) { return at::zeros({x.size(0), kOut}, at::kDouble); }
  };
  const auto wide = make_experts(2, [](int64_t) { return torch::nn::AnyModule(Wide()); });
  EXPECT_EQ(config_error([&] { wide->forward(rows, weights, plan); }),
            "[module_experts] output.dtype=Double must be Float as that of its rows, for expert 0");
}

}  // namespace
}  // namespace perseid
