// Sums and norms of gradients over ranks. Gradients are written by hand: rank r adds
//   dense(r, i) = (r + 1) * (i + 1)    expert(r, e, i) = (r + 1) * (e + 3) + i
// small integers, so sums are exact in every type and at any order.
//   Split            expert parameters are those below Experts that are not replicated; tied ones
//   once SumGradients     P x ep_size: dense over all ranks, experts over the ranks with the same
//   experts NoGradient       a parameter without gradient counts as zero and gets a defined one
//   Types            float64 in double; bfloat16 in float32, rounded once
//   ClipGradNorm     each parameter once: the norm of one process with all experts
//   Diverged         one NaN on one rank: every rank throws, gradients are as before
#include "moe/gradients.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/error.h"
#include "moe/experts.h"
#include "moe/placement.h"
#include "tests/closed_form.h"

namespace perseid {
namespace {
using testing::same_bits;

constexpr int64_t kExperts = 5;

/// One parameter [2, 3] for each expert; never run.
class FakeExperts : public Experts {
 public:
  explicit FakeExperts(const std::vector<int64_t>& ids, at::ScalarType type = at::kFloat)
      : Experts("fake_experts", ids, 1, 1) {
    for (const int64_t id : ids) {
      register_parameter("expert_" + std::to_string(id), at::zeros({2, 3}, type));
    }
  }
  at::Tensor forward(const at::Tensor&, const at::Tensor&,
                     const std::shared_ptr<const RoutingPlan>&) override {
    return {};
  }
};

/// Dense parameters around the experts of one rank, and shared experts.
struct Model : torch::nn::Module {
  explicit Model(const std::vector<int64_t>& ids) {
    first = register_parameter("first", at::zeros({4}));
    experts = register_module("experts", std::make_shared<FakeExperts>(ids));
    shared = register_module("shared", std::make_shared<FakeExperts>(std::vector<int64_t>{0}));
    shared->set_replicated(true);
    last = register_module("last", std::make_shared<torch::nn::Module>());
    last->register_parameter("weight", at::zeros({3, 2}));
  }
  at::Tensor first;
  std::shared_ptr<FakeExperts> experts, shared;
  std::shared_ptr<torch::nn::Module> last;
};

at::Tensor filled(const at::Tensor& like, const std::function<double(int64_t)>& value) {
  at::Tensor values = at::empty({like.numel()}, at::kDouble);
  for (int64_t i = 0; i < like.numel(); ++i) values.data_ptr<double>()[i] = value(i);
  return values.view(like.sizes()).to(like.scalar_type());
}

double dense_value(int64_t rank, int64_t i) { return static_cast<double>((rank + 1) * (i + 1)); }
double expert_value(int64_t rank, int64_t expert, int64_t i) {
  return static_cast<double>((rank + 1) * (expert + 3) + i);
}

void set_gradients(Model& model, int64_t rank) {
  const SplitParameters split = split_parameters(model);
  for (const at::Tensor& parameter : split.dense) {
    parameter.mutable_grad() = filled(parameter, [&](int64_t i) { return dense_value(rank, i); });
  }
  for (size_t slot = 0; slot < split.expert.size(); ++slot) {
    const int64_t expert = model.experts->expert_ids()[slot];
    split.expert[slot].mutable_grad() =
        filled(split.expert[slot], [&](int64_t i) { return expert_value(rank, expert, i); });
  }
}

/// Runs body(world, groups, placement) at P = 1, 2, 4 and each ep_size.
void for_each_grouping(const std::function<void(const ParallelGroups&)>& body) {
  for (const int num_ranks : {1, 2, 4}) {
    for (int64_t ep_size = 1; ep_size <= num_ranks; ep_size *= 2) {
      comm::run_local(
          num_ranks, [&](const comm::Group& world) { body(make_parallel_groups(world, ep_size)); });
    }
  }
}

std::vector<int64_t> local_experts(const ParallelGroups& groups) {
  const ExpertPlacement placement =
      ExpertPlacement::contiguous(kExperts, groups.expert_parallel.size());
  return placement.experts_of(groups.expert_parallel.rank());
}

/// The sum over the ranks of `groups` that hold `expert`.
double expert_sum(const ParallelGroups& groups, int64_t expert, int64_t i) {
  const int ep_size = groups.expert_parallel.size();
  const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, ep_size);
  double sum = 0;
  for (int rank = placement.rank_of(expert); rank < groups.world.size(); rank += ep_size) {
    sum += expert_value(rank, expert, i);
  }
  return sum;
}
double dense_sum(const ParallelGroups& groups, int64_t i) {
  double sum = 0;
  for (int rank = 0; rank < groups.world.size(); ++rank) sum += dense_value(rank, i);
  return sum;
}

TEST(Gradients, SplitByExperts) {
  Model model({1, 3});
  SplitParameters split = split_parameters(model);
  ASSERT_EQ(split.dense.size(), 3u);
  ASSERT_EQ(split.expert.size(), 2u);
  EXPECT_TRUE(split.dense[0].is_same(model.first));
  EXPECT_TRUE(split.dense[1].is_same(model.shared->parameters()[0]));
  EXPECT_TRUE(split.dense[2].is_same(model.last->parameters()[0]));
  EXPECT_TRUE(split.expert[0].is_same(model.experts->parameters()[0]));

  // Modules inside an expert belong to it; frozen parameters do not appear, tied ones once.
  auto inner = std::make_shared<torch::nn::Module>();
  inner->register_parameter("inner", at::zeros({2}));
  inner->register_parameter("frozen", at::zeros({2}), /*requires_grad=*/false);
  model.experts->register_module("inner", inner);
  auto tied = std::make_shared<torch::nn::Module>();
  tied->register_parameter("tied", model.first);
  model.register_module("tied", tied);
  model.register_module("tied_module", model.last);
  split = split_parameters(model);
  EXPECT_EQ(split.dense.size(), 3u);
  EXPECT_EQ(split.expert.size(), 3u);

  // The root itself may be Experts.
  EXPECT_EQ(split_parameters(*model.experts).expert.size(), 3u);
  EXPECT_EQ(split_parameters(*model.shared).dense.size(), 1u);
}

TEST(Gradients, SumsOverTheRightRanks) {
  for_each_grouping([](const ParallelGroups& groups) {
    Model model(local_experts(groups));
    set_gradients(model, groups.world.rank());
    sum_gradients(model, groups);
    const SplitParameters split = split_parameters(model);
    for (const at::Tensor& parameter : split.dense) {
      EXPECT_TRUE(same_bits(parameter.grad(),
                            filled(parameter, [&](int64_t i) { return dense_sum(groups, i); })));
    }
    for (size_t slot = 0; slot < split.expert.size(); ++slot) {
      const int64_t expert = model.experts->expert_ids()[slot];
      EXPECT_TRUE(same_bits(split.expert[slot].grad(), filled(split.expert[slot], [&](int64_t i) {
                              return expert_sum(groups, expert, i);
                            })));
    }
  });
}

TEST(Gradients, SumIsInPlace) {
  Model model({0, 1});
  set_gradients(model, 0);
  const at::Tensor gradient = model.first.grad();
  const void* const data = gradient.data_ptr();
  comm::run_local(2, [&](const comm::Group& world) {
    Model other({0, 1});
    set_gradients(other, world.rank());
    const at::Tensor before = other.first.grad();
    sum_gradients(other, make_parallel_groups(world, 1));
    EXPECT_TRUE(other.first.grad().is_same(before));
  });
  sum_gradients(model, ParallelGroups());  // groups of one
  EXPECT_EQ(model.first.grad().data_ptr(), data);
  EXPECT_TRUE(model.first.grad().is_same(gradient));
}

TEST(Gradients, NoGradientCountsAsZero) {
  for_each_grouping([](const ParallelGroups& groups) {
    Model model(local_experts(groups));
    // Only the last rank has gradients, and none for `first`.
    const int last = groups.world.size() - 1;
    if (groups.world.rank() == last) {
      set_gradients(model, last);
      model.first.mutable_grad() = at::Tensor();
    }
    sum_gradients(model, groups);
    EXPECT_TRUE(same_bits(model.first.grad(), at::zeros({4})));
    const at::Tensor weight = model.last->parameters()[0];
    EXPECT_TRUE(
        same_bits(weight.grad(), filled(weight, [&](int64_t i) { return dense_value(last, i); })));
    for (const at::Tensor& parameter : model.experts->parameters()) {
      EXPECT_TRUE(parameter.grad().defined());
    }
    EXPECT_TRUE(std::isfinite(clip_grad_norm(model, groups, 1.0)));
  });
}

TEST(Gradients, TypesAndLayouts) {
  comm::run_local(4, [](const comm::Group& world) {
    torch::nn::Module model;
    const at::Tensor wide = model.register_parameter("wide", at::zeros({2}, at::kDouble));
    const at::Tensor brief = model.register_parameter("brief", at::zeros({2}, at::kBFloat16));
    const at::Tensor half = model.register_parameter("half", at::zeros({2}, at::kHalf));
    const at::Tensor single = model.register_parameter("single", at::zeros({2, 3}));
    const at::Tensor empty = model.register_parameter("empty", at::zeros({0}));
    const double tiny = std::ldexp(1.0, -40);
    wide.mutable_grad() = at::full({2}, world.rank() == 0 ? 1.0 : tiny, at::kDouble);
    // Three times 2^-9 reaches the next bfloat16 after 1, and 2^-12 the next float16; each alone is
    // lost.
    brief.mutable_grad() =
        at::full({2}, world.rank() == 0 ? 1.0 : std::ldexp(1.0, -9), at::kBFloat16);
    half.mutable_grad() = at::full({2}, world.rank() == 0 ? 1.0 : std::ldexp(1.0, -12), at::kHalf);
    single.mutable_grad() = at::arange(6, at::kFloat).view({3, 2}).t().mul(world.rank() + 1);
    EXPECT_FALSE(single.grad().is_contiguous());
    sum_gradients(model, make_parallel_groups(world));
    EXPECT_TRUE(same_bits(wide.grad(), at::full({2}, 1 + 3 * tiny, at::kDouble)));
    EXPECT_TRUE(same_bits(brief.grad(), at::full({2}, 1 + std::ldexp(1.0, -7), at::kBFloat16)));
    EXPECT_TRUE(same_bits(half.grad(), at::full({2}, 1 + std::ldexp(1.0, -10), at::kHalf)));
    EXPECT_TRUE(same_bits(single.grad(), at::arange(6, at::kFloat).view({3, 2}).t().mul(10)));
  });
}

TEST(Gradients, UnsupportedTypeIsNamed) {
  torch::nn::Module model;
  const at::Tensor odd = model.register_parameter("odd", at::zeros({2}, at::kComplexFloat));
  odd.mutable_grad() = at::zeros({2}, at::kComplexFloat);
  for (const char* operation : {"sum_gradients", "clip_grad_norm"}) {
    try {
      if (operation[0] == 's') {
        sum_gradients(model, ParallelGroups());
      } else {
        clip_grad_norm(model, ParallelGroups(), 1.0);
      }
      ADD_FAILURE() << "no exception from " << operation;
    } catch (const ConfigError& error) {
      EXPECT_EQ(error.detail().operation, operation);
      EXPECT_EQ(error.detail().value, "ComplexFloat");
    }
  }
}

TEST(Gradients, ClipIsThatOfOneProcess) {
  for_each_grouping([](const ParallelGroups& groups) {
    Model model(local_experts(groups));
    set_gradients(model, groups.world.rank());
    sum_gradients(model, groups);

    double squares = 0;
    for (int64_t i = 0; i < 4; ++i) squares += std::pow(dense_sum(groups, i), 2);  // first
    for (int64_t i = 0; i < 6; ++i) squares += 2 * std::pow(dense_sum(groups, i), 2);
    for (int64_t expert = 0; expert < kExperts; ++expert) {
      for (int64_t i = 0; i < 6; ++i) squares += std::pow(expert_sum(groups, expert, i), 2);
    }
    const double norm = std::sqrt(squares);
    const std::vector<at::Tensor> parameters = model.parameters();
    std::vector<at::Tensor> before;
    for (const at::Tensor& parameter : parameters) before.push_back(parameter.grad().clone());

    // Below the limit nothing changes, bit for bit.
    EXPECT_DOUBLE_EQ(clip_grad_norm(model, groups, 2 * norm), norm);
    for (size_t p = 0; p < parameters.size(); ++p) {
      EXPECT_TRUE(same_bits(parameters[p].grad(), before[p]));
    }
    EXPECT_DOUBLE_EQ(clip_grad_norm(model, groups, 0.5), norm);
    for (size_t p = 0; p < parameters.size(); ++p) {
      EXPECT_TRUE(
          testing::close_to(parameters[p].grad(), before[p].mul(0.5 / (norm + 1e-6)), 1e-6));
    }
    EXPECT_NEAR(clip_grad_norm(model, groups, INFINITY), 0.5, 1e-6);
  });
}

TEST(Gradients, NormOfLargeTensors) {
  // More than one block, with a rest; a known sum of squares: n values of 1/4.
  for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    torch::nn::Module model;
    const int64_t count = (1 << 16) + 13;
    const at::Tensor parameter = model.register_parameter("p", at::zeros({count}, type));
    parameter.mutable_grad() = at::full({count}, 0.25, type);
    EXPECT_DOUBLE_EQ(clip_grad_norm(model, ParallelGroups(), INFINITY),
                     0.25 * std::sqrt(static_cast<double>(count)));
  }
}

TEST(Gradients, NonFiniteIsDivergedOnEveryRank) {
  for (const double bad : {std::nan(""), static_cast<double>(INFINITY)}) {
    comm::run_local(4, [&](const comm::Group& world) {
      const ParallelGroups groups = make_parallel_groups(world, 4);
      Model model(local_experts(groups));
      set_gradients(model, world.rank());
      sum_gradients(model, groups);
      if (world.rank() == 2) {
        for (const at::Tensor& parameter : model.experts->parameters()) {
          parameter.mutable_grad().view(-1)[1] = bad;
        }
      }
      const at::Tensor before = model.first.grad().clone();
      try {
        clip_grad_norm(model, groups, 1.0);
        ADD_FAILURE() << "no exception on rank " << world.rank();
      } catch (const Diverged& error) {
        EXPECT_EQ(error.detail().operation, "clip_grad_norm");
        EXPECT_EQ(error.detail().argument, "norm");
        EXPECT_EQ(error.detail().rank, world.rank());
        EXPECT_NE(std::string(error.what()).find("is not finite"), std::string::npos);
      }
      EXPECT_TRUE(same_bits(model.first.grad(), before));
    });
  }
}

TEST(Gradients, MaxNormMustBePositiveAndEqual) {
  Model model({0});
  for (const double max_norm : {0.0, -1.0, std::nan("")}) {
    EXPECT_THROW(clip_grad_norm(model, ParallelGroups(), max_norm), ConfigError);
  }
  try {
    clip_grad_norm(model, ParallelGroups(), -1.5);
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(), "[clip_grad_norm] max_norm=-1.5 must be above 0");
  }
  comm::run_local(2, [](const comm::Group& world) {
    Model mine({0});
    const ParallelGroups groups = make_parallel_groups(world, 1);
    try {
      clip_grad_norm(mine, groups, world.rank() == 0 ? 1.0 : 2.0);
      ADD_FAILURE() << "no exception on rank " << world.rank();
    } catch (const RanksDisagree& error) {
      EXPECT_EQ(error.detail().culprit, 1);
      EXPECT_EQ(error.detail().rank, world.rank());
      const std::string text = error.what();
      EXPECT_NE(text.find("max_norm=1 from rank 0 differs from max_norm=2 from rank 1"),
                std::string::npos)
          << text;
    }
  });
}

}  // namespace
}  // namespace perseid
