// Soft methods, float64.
//   LargestOfGroups  exactly N of each aligned group along `in`, brute force with many ties (to the
//                    smaller index), for contiguous and transposed storage and three types
//   EffectiveWeight  forward and gradient against their formulas: straight through, scaled (finite
//                    differences), Top-KAST; a factor of 1 is the weight itself
//   Decay            linear 0 at ceil(1 / rate) and above 0 one step before, exponential, fine_tune
//   Frames           the published lists; equal lengths after dense_steps
//   SrSte            gradient = g + lambda (1 - Pi) W, the term once for two passes; decoupled: the
//                    same step of SGD, and of Adam a shrinkage outside of it
//   IsDense, IsHard  MdGf with decay 1 trains as a plain layer and with decay 0 as straight
//                    through, bit for bit
//   FollowsFrames    SdGf: N:M of each step, dense before
//   KeepsItsChoice   between two choices, but not into a new frame; scaled gradients; new weights
//   TopKast          sizes and nesting of both sets, gradient on the larger one, loss term, every
//   Resume           inside a frame and between two choices: the uninterrupted run, bit for bit
//   Groups           nm_dst: the mask changes and every group keeps N
//   Presets          all N:M presets and Top-KAST run on two experts and keep their budget
//   GroupedExperts   equal, bit for bit, to experts whose other weights are 0
//   ExpertTensor     units without a link: effective() of one expert, gradient to it alone
//   Refused, Diverged  texts
#include "moe/soft_mask.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/optim/adam.h>
#include <torch/optim/sgd.h>

#include <cmath>
#include <limits>

#include "moe/grouped_mlp.h"
#include "moe/routing_plan.h"
#include "moe/sparse_linear.h"
#include "moe/sparse_presets.h"
#include "tests/config_error.h"
#include "tests/gradcheck.h"
#include "tests/moe/sparse_fixture.h"

namespace perseid {
namespace {

using testing::config_error;
using testing::gradients_match;
using testing::normal;

AtomLayout layout_of(int64_t n, int64_t m, int64_t out, int64_t in) {
  return make_layout(Structure::n_of_m(n, m), out, in, "w");
}
/// N:M by the definition.
at::Tensor groups_by_hand(const at::Tensor& weight, int64_t n, int64_t m) {
  const at::Tensor mask = at::zeros(weight.sizes(), at::kBool);
  const at::Tensor sizes = weight.to(at::kDouble).abs();
  for (int64_t r = 0; r < weight.size(0); ++r) {
    for (int64_t c = 0; c < weight.size(1); ++c) {
      int64_t num_before = 0;
      for (int64_t other = c / m * m; other < c / m * m + m; ++other) {
        const double mine = sizes[r][c].item<double>(), its = sizes[r][other].item<double>();
        num_before += its > mine || (its == mine && other < c) ? 1 : 0;
      }
      mask[r][c] = num_before < n;
    }
  }
  return mask;
}
at::Tensor bits_of(const PackedMask& mask) {
  const at::Tensor bits = at::empty({mask.rows(), mask.cols()}, at::kBool);
  for (int64_t place = 0; place < mask.num_places(); ++place) {
    bits.data_ptr<bool>()[place] = mask.test(place);
  }
  return bits;
}

TEST(SoftMask, LargestOfGroups) {
  struct Case {
    int64_t n, m, out, in;
  };
  for (const auto& [n, m, out, in] : std::vector<Case>{
           {1, 4, 3, 8}, {2, 4, 5, 20}, {3, 3, 2, 9}, {7, 8, 3, 16}, {1, 16, 4, 48}}) {
    for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
      const at::Tensor weight = (normal({out, in}, 5) * 2).trunc().to(type);  // many ties, and -0
      const AtomLayout layout = layout_of(n, m, out, in);
      for (const at::Tensor& stored : {weight, weight.t().contiguous().t()}) {
        const PackedMask mask = largest_weights(stored, layout.cells, n, "w", 0, 0);
        EXPECT_TRUE(at::equal(bits_of(mask), groups_by_hand(weight, n, m))) << n << ":" << m;
        EXPECT_TRUE(bits_of(mask).view({-1, m}).sum(1).eq(n).all().item<bool>());
      }
    }
  }
  // Float32 would see a tie.
  const at::Tensor close = at::tensor({1.0, 1.0 + 1e-12}, at::kDouble).view({1, 2});
  EXPECT_TRUE(largest_weights(close, layout_of(1, 2, 1, 2).cells, 1, "w", 0, 0).test(1));
}

Forward forward_of(ForwardMethod method) {
  Forward forward;
  forward.method = method;
  return forward;
}
SoftMask mask_at(const Forward& forward, const AtomLayout& layout, const at::Tensor& weight,
                 int64_t step, int64_t nnz = 0) {
  return choose_soft_mask(forward, layout, nnz, weight.detach(), step, "w", 0);
}
/// Gradient of the weight for a gradient of the effective one.
at::Tensor passed_back(const at::Tensor& weight, const SoftMask& mask, const at::Tensor& gradient) {
  const at::Tensor leaf = weight.clone().requires_grad_(true);
  effective_weight(leaf, mask).backward(gradient);
  return leaf.grad();
}

TEST(SoftMask, EffectiveWeight) {
  const at::Tensor weight = normal({5, 12}, 1), gradient = normal({5, 12}, 2);
  const AtomLayout layout = layout_of(1, 4, 5, 12);
  const at::Tensor pi = groups_by_hand(weight, 1, 4);
  const at::Tensor others = pi.logical_not().to(at::kDouble);
  for (const ForwardMethod method : {ForwardMethod::kSte, ForwardMethod::kSrSte}) {
    const SoftMask mask = mask_at(forward_of(method), layout, weight, 7, 15);
    EXPECT_TRUE(at::equal(effective_weight(weight, mask), weight * pi));
    EXPECT_TRUE(at::equal(passed_back(weight, mask, gradient), gradient));
  }
  Forward decay = forward_of(ForwardMethod::kMaskDecay);
  decay.decay_rate = 0.1;
  const SoftMask released = mask_at(decay, layout, weight, 7, 15);
  const double factor = std::exp(-0.1 * 7);
  EXPECT_TRUE(at::allclose(effective_weight(weight, released),
                           weight * (pi.to(at::kDouble) + factor * others), 1e-15, 0));
  EXPECT_TRUE(at::equal(passed_back(weight, released, gradient), gradient));
  decay.inactive = InactiveGradient::kScaled;
  const SoftMask scaled = mask_at(decay, layout, weight, 7, 15);
  EXPECT_TRUE(at::allclose(passed_back(weight, scaled, gradient),
                           gradient * (pi.to(at::kDouble) + factor * others), 1e-15, 0));
  at::Tensor leaf = weight.clone();
  EXPECT_TRUE(gradients_match(
      [&] { return std::vector<at::Tensor>{effective_weight(leaf, scaled).square()}; }, {leaf}));

  Forward kast = forward_of(ForwardMethod::kTopKast);
  kast.backward_extra = Density::ratio(1, 4);
  const SoftMask sets = mask_at(kast, layout, weight, 0, 15);
  const at::Tensor reached = groups_by_hand(weight, 2, 4);
  EXPECT_TRUE(at::equal(effective_weight(weight, sets), weight * pi));
  EXPECT_TRUE(at::equal(passed_back(weight, sets, gradient), gradient * reached));
  // An infinity among the inactive ones does not come through.
  at::Tensor huge = weight.clone();
  huge.masked_fill_(pi.logical_not(), std::numeric_limits<double>::infinity());
  EXPECT_TRUE(at::equal(effective_weight(huge, sets), weight * pi));

  decay.dense_steps = 8;
  const SoftMask dense = mask_at(decay, layout, weight, 7, 15);
  EXPECT_TRUE(effective_weight(leaf, dense).is_same(leaf));
  EXPECT_EQ(dense.active.count(), 60);
}

TEST(SoftMask, Decay) {
  Forward forward = forward_of(ForwardMethod::kMaskDecay);
  forward.decay = MaskDecay::kLinear;
  for (const double rate : {0.5, 0.1, 0.07, 1 / 49.0, 1 / 3.0, 1.0, 3.0}) {
    for (const int64_t dense : {0, 5}) {
      forward.decay_rate = rate;
      forward.dense_steps = dense;
      const auto end = static_cast<int64_t>(std::ceil(1 / rate - 1e-9));
      EXPECT_EQ(inactive_factor(forward, dense), 1);
      EXPECT_EQ(inactive_factor(forward, dense + end), 0) << rate;
      EXPECT_EQ(inactive_factor(forward, dense + end + 1000), 0);
      EXPECT_GT(inactive_factor(forward, dense + end - 1), 1e-9) << rate;
      EXPECT_DOUBLE_EQ(inactive_factor(forward, dense + end - 1),
                       1 - rate * static_cast<double>(end - 1));
      if (dense > 0) {
        EXPECT_EQ(inactive_factor(forward, dense - 1), 1);
      }
    }
  }
  forward.decay = MaskDecay::kExponential;
  forward.decay_rate = 1e-4;
  EXPECT_DOUBLE_EQ(inactive_factor(forward, 5), 1);
  EXPECT_NEAR(inactive_factor(forward, 10005), 0.36787944117144233, 1e-15);
  forward.total_steps = 1000;
  forward.fine_tune = 0.1;
  EXPECT_GT(inactive_factor(forward, 899), 0.9);
  EXPECT_EQ(inactive_factor(forward, 900), 0);
  EXPECT_EQ(inactive_factor(forward_of(ForwardMethod::kSrSte), 0), 0);
}

TEST(SoftMask, Frames) {
  using Frames = std::vector<NmFrame>;
  EXPECT_EQ(stepwise_frames(1, 8), (Frames{{7, 8}, {4, 8}, {2, 8}, {1, 8}}));
  EXPECT_EQ(stepwise_frames(1, 16), (Frames{{15, 16}, {8, 16}, {4, 16}, {2, 16}, {1, 16}}));
  EXPECT_EQ(stepwise_frames(2, 8), (Frames{{7, 8}, {4, 8}, {2, 8}}));
  EXPECT_EQ(stepwise_frames(1, 2), (Frames{{1, 2}}));
  EXPECT_EQ(stepwise_frames(3, 3), (Frames{{3, 3}}));
  EXPECT_EQ(geometric_frames(2, 4), (Frames{{16, 32}, {8, 16}, {4, 8}, {2, 4}}));
  EXPECT_EQ(densify_frames(2, 4), (Frames{{2, 32}, {2, 16}, {2, 8}, {2, 4}}));
  EXPECT_EQ(config_error([] { stepwise_frames(2, 6); }),
            "[soft_mask] m/n=6/2 is not a power of 2; list frames of your own");
  const Forward forward = presets::sdgf_step(1, 8, 22, 2).forward;
  for (int64_t step = 0; step < 30; ++step) {
    EXPECT_EQ(is_dense_step(forward, step), step < 2);
    EXPECT_EQ(frame_index(forward, step), step < 7 ? 0 : step < 12 ? 1 : step < 17 ? 2 : 3);
  }
}

UnitKey key_of(int64_t expert) { return {0, expert, Matrix::kWeight}; }
SparseLinear make_linear(int64_t in = 16, int64_t out = 6, int64_t expert = 0) {
  return SparseLinear(SparseLinearOptions(in, out).dtype(at::kDouble).seed(1).key(key_of(expert)));
}
void backward(SparseLinear& linear, int64_t step) {
  const int64_t in = linear->options().in_features(), out = linear->options().out_features();
  const at::Tensor x = normal({6, in}, 100 + static_cast<uint64_t>(step));
  (linear->forward(x) - normal({6, out}, 7)).square().sum().backward();
}
void train(SparseLinear& linear, Sparsifier* sparsifier, torch::optim::Optimizer& optimizer,
           int64_t begin, int64_t end) {
  for (int64_t step = begin; step < end; ++step) {
    if (sparsifier != nullptr) sparsifier->begin_step(step);
    optimizer.zero_grad();
    backward(linear, step);
    if (sparsifier != nullptr) sparsifier->end_backward(step);
    optimizer.step();
    if (sparsifier != nullptr) sparsifier->end_step(step);
  }
}
torch::optim::SGD make_sgd(SparseLinear& linear) {
  return torch::optim::SGD(linear->parameters(), torch::optim::SGDOptions(0.01).momentum(0.9));
}

TEST(SoftMask, SrSte) {
  SparseLinear linear = make_linear();
  const at::Tensor start = linear->weight.detach().clone();
  const at::Tensor pi = groups_by_hand(start, 2, 4);
  const double lambda = 0.03;
  SparsifierConfig config = presets::srste(2, 4, lambda);
  {
    Sparsifier sparsifier({linear->unit()}, config);
    EXPECT_TRUE(at::equal(linear->weight, start)) << "parameters stay dense";
    EXPECT_TRUE(at::equal(bits_of(sparsifier.mask({})), pi));
    EXPECT_EQ(sparsifier.nnz(), 48);
    sparsifier.begin_step(0);
    backward(linear, 0);
    backward(linear, 1);
    const at::Tensor plain = linear->weight.grad().clone();
    at::Tensor product = (start * pi).requires_grad_(true);
    for (const uint64_t step : {0u, 1u}) {
      (at::linear(normal({6, 16}, 100 + step), product, linear->bias.detach()) - normal({6, 6}, 7))
          .square()
          .sum()
          .backward();
    }
    EXPECT_TRUE(at::allclose(plain, product.grad(), 1e-13, 1e-14));
    sparsifier.end_backward(0);
    EXPECT_TRUE(at::allclose(linear->weight.grad(),
                             product.grad() + lambda * (start * pi.logical_not()), 1e-13, 1e-14));
    EXPECT_TRUE(at::equal(linear->weight, start));
    sparsifier.end_step(0);
    EXPECT_TRUE(at::equal(linear->weight, start)) << "nothing is set to 0";
  }
  // Plain SGD: decoupled is the same step.
  config.forward.decoupled = true;
  std::vector<at::Tensor> ends;
  for (const bool decoupled : {false, true}) {
    SparseLinear own = make_linear();
    config.forward.decoupled = decoupled;
    Sparsifier sparsifier({own->unit()}, config);
    torch::optim::SGD optimizer(own->parameters(), torch::optim::SGDOptions(0.01));
    sparsifier.attach(optimizer);
    train(own, &sparsifier, optimizer, 0, 5);
    ends.push_back(own->weight.detach().clone());
  }
  EXPECT_TRUE(at::allclose(ends[0], ends[1], 1e-12, 1e-14));
  EXPECT_FALSE(at::allclose(ends[0], start, 1e-3, 1e-3));
  // Adam does not rescale it: the weights before the step are the shrunk ones, the gradient plain.
  SparseLinear own = make_linear();
  Sparsifier sparsifier({own->unit()}, config);
  torch::optim::Adam optimizer(own->parameters(), torch::optim::AdamOptions(0.5));
  sparsifier.attach(optimizer);
  sparsifier.begin_step(0);
  backward(own, 0);
  const at::Tensor gradient = own->weight.grad().clone();
  sparsifier.end_backward(0);
  EXPECT_TRUE(at::equal(own->weight.grad(), gradient));
  EXPECT_TRUE(
      at::allclose(own->weight, at::where(pi, start, start * (1 - 0.5 * lambda)), 1e-15, 0));
}

TEST(SoftMask, IsDense) {
  SparseLinear plain = make_linear(), soft = make_linear();
  Sparsifier sparsifier({soft->unit()}, presets::mdgf_lin(1, 4, 0));
  torch::optim::SGD one = make_sgd(plain), two = make_sgd(soft);
  sparsifier.attach(two);
  train(plain, nullptr, one, 0, 12);
  train(soft, &sparsifier, two, 0, 12);
  EXPECT_TRUE(at::equal(plain->weight, soft->weight));
  EXPECT_EQ(sparsifier.nnz(), 24);
}

TEST(SoftMask, IsHard) {
  SparseLinear hard = make_linear(), soft = make_linear();
  SparsifierConfig config = presets::mdgf_lin(1, 4, 0.25);  // 0 from step 4 on
  SparsifierConfig straight = presets::srste(1, 4, 0);
  straight.forward.method = ForwardMethod::kSte;
  Sparsifier first({hard->unit()}, straight), second({soft->unit()}, config);
  torch::optim::SGD one = make_sgd(hard), two = make_sgd(soft);
  train(hard, &first, one, 4, 16);
  train(soft, &second, two, 4, 16);
  EXPECT_TRUE(at::equal(hard->weight, soft->weight));
  // The output is that of the N:M mask.
  const at::Tensor x = normal({3, 16}, 9);
  EXPECT_TRUE(at::allclose(soft->forward(x),
                           at::linear(x, soft->weight * bits_of(second.mask({})), soft->bias),
                           1e-13, 1e-14));
}

TEST(SoftMask, FollowsFrames) {
  for (const bool is_geometric : {false, true}) {
    SparseLinear linear = make_linear(64, 3);
    const SparsifierConfig config =
        is_geometric ? presets::sdgf_geo(1, 8, 22, 2) : presets::sdgf_step(1, 8, 22, 2);
    Sparsifier sparsifier({linear->unit()}, config);
    torch::optim::SGD optimizer = make_sgd(linear);
    for (int64_t step = 0; step < 24; ++step) {
      sparsifier.begin_step(step);
      const NmFrame frame =
          config.forward.frames[static_cast<size_t>(frame_index(config.forward, step))];
      const at::Tensor expected = step < 2 ? at::ones({3, 64}, at::kBool)
                                           : groups_by_hand(linear->weight, frame.n, frame.m);
      ASSERT_TRUE(at::equal(bits_of(sparsifier.mask({})), expected)) << step;
      EXPECT_TRUE(at::equal(sparsifier.effective({}), linear->weight * expected));
      optimizer.zero_grad();
      backward(linear, step);
      sparsifier.end_backward(step);
      EXPECT_FALSE(linear->weight.grad().eq(0).any().item<bool>()) << "straight through";
      optimizer.step();
      sparsifier.end_step(step);
    }
    EXPECT_EQ(sparsifier.nnz(), 24);
  }
}

TEST(SoftMask, KeepsItsChoice) {
  // Chosen at the start of each frame only, also where steps are left out.
  SparseLinear linear = make_linear(64, 3);
  SparsifierConfig config = presets::sdgf_step(1, 8, 22, 2);
  config.forward.every = 100;
  config.forward.inactive = InactiveGradient::kScaled;
  Sparsifier sparsifier({linear->unit()}, config);
  torch::optim::SGD optimizer = make_sgd(linear);
  int64_t num_kept = 0;
  at::Tensor chosen;
  int64_t last_frame = -1;
  for (const int64_t step : {2, 3, 4, 9, 10, 13, 14, 21, 22, 23}) {
    const int64_t index = frame_index(config.forward, step);
    const NmFrame frame = config.forward.frames[static_cast<size_t>(index)];
    const at::Tensor now = groups_by_hand(linear->weight, frame.n, frame.m);
    if (index != last_frame) chosen = now;
    last_frame = index;
    num_kept += at::equal(chosen, now) ? 0 : 1;
    train(linear, &sparsifier, optimizer, step, step + 1);
    ASSERT_TRUE(at::equal(bits_of(sparsifier.mask({})), chosen)) << step;
    EXPECT_TRUE(at::equal(linear->weight.grad().ne(0), chosen)) << "scaled by 0";
  }
  EXPECT_GE(num_kept, 1) << "a new choice would have been another";
  // New weights are dense and chosen among at once.
  sparsifier.reset_weights(1);
  EXPECT_FALSE(linear->weight.eq(0).any().item<bool>());
  EXPECT_TRUE(at::equal(bits_of(sparsifier.mask({})), at::ones({3, 64}, at::kBool)));
  sparsifier.begin_step(30);
  EXPECT_TRUE(at::equal(bits_of(sparsifier.mask({})), groups_by_hand(linear->weight, 1, 8)));
}

TEST(SoftMask, TopKast) {
  SparseLinear linear = make_linear(20, 10);
  SparsifierConfig config = presets::topkast(Density::ratio(1, 10), Density::ratio(1, 5), 3);
  config.forward.lambda = 0.01;
  Sparsifier sparsifier({linear->unit()}, config);
  torch::optim::SGD optimizer = make_sgd(linear);
  sparsifier.attach(optimizer);
  at::Tensor chosen;
  int64_t num_changes = 0;
  for (int64_t step = 0; step < 12; ++step) {
    sparsifier.begin_step(step);
    const at::Tensor mask = bits_of(sparsifier.mask({}));
    const at::Tensor reached = bits_of(sparsifier.state_dict().units[0].backward);
    EXPECT_EQ(mask.sum().item<int64_t>(), 20);
    EXPECT_EQ(reached.sum().item<int64_t>(), 60);
    EXPECT_TRUE(mask.logical_and(reached.logical_not()).any().item<bool>() == false);
    if (step % 3 == 0) {
      const at::Tensor sorted = std::get<0>(linear->weight.detach().abs().flatten().sort());
      const auto smallest_of = [&](const at::Tensor& set) {
        return linear->weight.detach().abs().masked_select(set).min().item<double>();
      };
      EXPECT_EQ(smallest_of(mask), sorted[180].item<double>());
      EXPECT_EQ(smallest_of(reached), sorted[140].item<double>());
    } else {
      EXPECT_TRUE(at::equal(mask, chosen));
    }
    if (chosen.defined() && !at::equal(mask, chosen)) ++num_changes;
    chosen = mask;
    optimizer.zero_grad();
    backward(linear, step);
    const at::Tensor gradient = linear->weight.grad().clone();
    EXPECT_TRUE(at::equal(gradient.ne(0), reached));
    // The term is the gradient of the loss: lambda / 2 (|w|^2 on Pi + |w|^2 / d beyond).
    const at::Tensor leaf = linear->weight.detach().clone().requires_grad_(true);
    SoftMask sets;
    sets.active = sparsifier.mask({});
    sets.is_active = mask;
    sets.is_reached = reached;
    const at::Tensor loss = top_kast_loss(leaf, sets, 0.01);
    const at::Tensor squares = leaf.detach().square();
    EXPECT_NEAR(loss.item<double>(),
                0.01 * ((squares * mask).sum().item<double>() / 2 +
                        (squares * reached.logical_and(mask.logical_not())).sum().item<double>() /
                            (2 * 0.1)),
                1e-14);
    loss.backward();
    sparsifier.end_backward(step);
    EXPECT_TRUE(at::allclose(linear->weight.grad(), gradient + leaf.grad(), 1e-13, 1e-15));
    optimizer.step();
    sparsifier.end_step(step);
  }
  EXPECT_GE(num_changes, 1);
}

struct NamedConfig {
  const char* name;
  SparsifierConfig config;
};
std::vector<NamedConfig> soft_configs() {
  std::vector<NamedConfig> configs = {{"srste", presets::srste(1, 4)},
                                      {"mdgf_lin", presets::mdgf_lin(1, 4, 0.05)},
                                      {"mdgf_exp", presets::mdgf_exp(1, 4, 0.1)},
                                      {"sdgf_step", presets::sdgf_step(1, 4, 20, 1)},
                                      {"sdgf_geo", presets::sdgf_geo(1, 4, 20)},
                                      {"topkast", presets::topkast(0.25, 0.25, 4)}};
  for (NamedConfig& of : configs) of.config.forward.every = 3;
  return configs;
}

TEST(SoftMask, Resume) {
  for (const auto& [name, config] : soft_configs()) {
    for (const int64_t stop : {1, 8, 11}) {  // 11 is inside a turn of 3 and a frame of 5
      SparseLinear whole = make_linear(32), split = make_linear(32), resumed = make_linear(32);
      // Without momentum the weights are all the state there is.
      torch::optim::SGD one(whole->parameters(), torch::optim::SGDOptions(0.02));
      torch::optim::SGD two(split->parameters(), torch::optim::SGDOptions(0.02));
      torch::optim::SGD three(resumed->parameters(), torch::optim::SGDOptions(0.02));
      Sparsifier sparsifier({whole->unit()}, config);
      train(whole, &sparsifier, one, 0, 20);
      Sparsifier before({split->unit()}, config);
      train(split, &before, two, 0, stop);
      {
        const c10::NoGradGuard no_grad;
        resumed->weight.copy_(split->weight);
        resumed->bias.copy_(split->bias);
      }
      Sparsifier after({resumed->unit()}, config);
      after.load(before.state_dict());
      EXPECT_TRUE(
          at::equal(resumed->forward(normal({3, 32}, 3)), split->forward(normal({3, 32}, 3))))
          << name;
      train(resumed, &after, three, stop, 20);
      EXPECT_TRUE(at::equal(whole->weight, resumed->weight)) << name << " " << stop;
      EXPECT_EQ(sparsifier.stats({}).fingerprint, after.stats({}).fingerprint) << name;
      EXPECT_EQ(sparsifier.stats({}).ever_active, after.stats({}).ever_active) << name;
    }
  }
}

TEST(SoftMask, Groups) {
  SparseLinear linear = make_linear(16, 10);
  SparsifierConfig config = presets::nm_dst(1, 4, 100, 2);
  config.min_rows = 0;
  Sparsifier sparsifier({linear->unit()}, config);
  torch::optim::SGD optimizer = make_sgd(linear);
  sparsifier.attach(optimizer);
  const at::Tensor first = bits_of(sparsifier.mask({}));
  for (int64_t step = 0; step < 30; ++step) {
    train(linear, &sparsifier, optimizer, step, step + 1);
    const at::Tensor mask = bits_of(sparsifier.mask({}));
    ASSERT_TRUE(mask.view({-1, 4}).sum(1).eq(1).all().item<bool>());
    ASSERT_TRUE(linear->weight.masked_select(mask.logical_not()).eq(0).all().item<bool>());
  }
  EXPECT_FALSE(at::equal(first, bits_of(sparsifier.mask({}))));
}

TEST(SoftMask, Presets) {
  std::vector<NamedConfig> configs = soft_configs();
  configs.push_back({"nm_dst", presets::nm_dst(1, 4, 1000, 3)});
  configs.back().config.min_rows = 1;
  for (const auto& [name, config] : configs) {
    // Two experts, each with half of the rows.
    SparseLinear experts[2] = {make_linear(32, 6, 0), make_linear(32, 6, 1)};
    Sparsifier sparsifier({experts[1]->unit(), experts[0]->unit()}, config);
    std::vector<at::Tensor> parameters = experts[0]->parameters();
    for (const at::Tensor& parameter : experts[1]->parameters()) parameters.push_back(parameter);
    torch::optim::SGD optimizer(parameters, torch::optim::SGDOptions(0.05).momentum(0.9));
    sparsifier.attach(optimizer);
    std::vector<uint64_t> masks;
    for (int64_t step = 0; step < 24; ++step) {
      sparsifier.begin_step(step);
      optimizer.zero_grad();
      for (SparseLinear& expert : experts) backward(expert, step);
      sparsifier.end_backward(step);
      optimizer.step();
      sparsifier.end_step(step);
      masks.push_back(sparsifier.stats(key_of(1)).fingerprint);
    }
    EXPECT_EQ(sparsifier.nnz(), 96) << name;
    for (int64_t e = 0; e < 2; ++e) EXPECT_EQ(sparsifier.stats(key_of(e)).nnz, 48) << name;
    std::sort(masks.begin(), masks.end());
    EXPECT_GE(std::unique(masks.begin(), masks.end()) - masks.begin(), 3) << name;
  }
}

TEST(SoftMask, ExpertTensor) {
  const at::Tensor stacked = normal({3, 4, 8}, 3).requires_grad_(true);
  std::vector<SparseUnit> units = expert_units("w1", stacked, 2, Matrix::kW1, {5, 1, 9});
  EXPECT_EQ(config_error([&] { Sparsifier(units, presets::srste(2, 4)); }),
            "[sparsifier] forward=soft reaches nothing through w1.1, whose layer computes with the "
            "weight itself; use SparseLinear, or Sparsifier::effective and set uses_effective");
  for (SparseUnit& unit : units) unit.uses_effective = true;
  Sparsifier sparsifier(units, presets::srste(2, 4, 0.5));
  sparsifier.begin_step(0);
  const at::Tensor effective = sparsifier.effective({2, 1, Matrix::kW1});
  const at::Tensor weight = stacked.detach()[1];
  const at::Tensor pi = groups_by_hand(weight, 2, 4);
  EXPECT_TRUE(at::equal(effective, weight * pi));
  const at::Tensor gradient = normal({4, 8}, 8);
  effective.backward(gradient);
  EXPECT_TRUE(at::equal(stacked.grad()[1], gradient));
  EXPECT_EQ(stacked.grad()[0].abs().sum().item<double>(), 0);
  sparsifier.end_backward(0);
  EXPECT_TRUE(at::allclose(stacked.grad()[1], gradient + 0.5 * weight * pi.logical_not(), 1e-14));
  const at::Tensor other = stacked.detach()[2];
  EXPECT_TRUE(at::allclose(stacked.grad()[2],
                           0.5 * other * groups_by_hand(other, 2, 4).logical_not(), 1e-14));
  // Hard masks: the weight itself.
  const at::Tensor plain = normal({4, 8}, 4).requires_grad_(true);
  SparseUnit unit;
  unit.name = "plain";
  unit.parameter = plain;
  const Sparsifier hard({unit}, presets::static_mask(0.5));
  EXPECT_TRUE(hard.effective({}).is_same(plain));
}

std::shared_ptr<GroupedMLP> grouped_experts(bool gated) {
  auto experts = std::make_shared<GroupedMLP>(GroupedMLPOptions(16, 8).gated(gated).bias(true),
                                              ExpertPlacement::contiguous(3, 1), 0);
  experts->to(at::kDouble);
  return experts;
}

// Grouped experts compute with effective weights while the Sparsifier lives, some of their matrices
// or all, as experts whose other weights are 0 do; the gradient is that of those.
TEST(SoftMask, GroupedExperts) {
  gates::Routing routing;
  routing.num_tokens = 4;
  routing.token_offsets = at::tensor({0, 2, 3, 3, 5}, at::kInt);
  routing.expert_idx = at::tensor({0, 2, 2, 0, 2}, at::kInt);  // expert 1 has no rows
  const auto plan = std::make_shared<RoutingPlan>();
  plan->local = make_local_plan(routing, 3);
  const at::Tensor rows = normal({4, 16}, 5), weights = normal({5, 1}, 6),
                   grad = normal({4, 16}, 7);
  for (const bool gated : {false, true}) {
    for (const std::string pattern : {"*", "w1", "w2"}) {
      SCOPED_TRACE(pattern + (gated ? ", gated" : ""));
      const auto experts = grouped_experts(gated), masked = grouped_experts(gated);
      {
        const c10::NoGradGuard no_grad;
        const auto mask = [](at::Tensor part) { part.mul_(groups_by_hand(part, 2, 4)); };
        for (int64_t e = 0; e < 3; ++e) {
          if (pattern != "w2") mask(masked->up_proj[e].narrow(0, 0, 8));
          if (pattern == "*" && gated) mask(masked->up_proj[e].narrow(0, 8, 8));
          if (pattern != "w1") mask(masked->down_proj[e]);
        }
      }
      const at::Tensor plain = experts->forward(rows, weights, plan);
      const at::Tensor expected = masked->forward(rows, weights, plan);
      expected.backward(grad);
      {
        const std::vector<SparseUnit> units = experts->sparse_units(4, pattern);
        Sparsifier sparsifier(units, presets::srste(2, 4, 0));
        EXPECT_NE(config_error([&] {
                    Sparsifier(units, presets::srste(2, 4, 0));
                  }).find("belongs to another Sparsifier"),
                  std::string::npos);
        sparsifier.begin_step(0);
        const at::Tensor effective = experts->forward(rows, weights, plan);
        effective.backward(grad);
        EXPECT_TRUE(at::equal(effective, expected));
        EXPECT_FALSE(at::allclose(effective, plain));
      }
      const std::vector<at::Tensor> mine = experts->parameters(), theirs = masked->parameters();
      for (size_t i = 0; i < mine.size(); ++i) {
        EXPECT_TRUE(at::equal(mine[i].grad(), theirs[i].grad())) << i;
      }
      EXPECT_TRUE(at::equal(experts->forward(rows, weights, plan), plain));
    }
  }
}

std::string refusal(const SparsifierConfig& config, int64_t in = 16) {
  SparseLinear linear = make_linear(in);
  return config_error([&] { Sparsifier({linear->unit()}, config); });
}

TEST(SoftMask, Refused) {
  EXPECT_EQ(refusal(presets::srste(2, 4), 18),
            "[sparse_structure] in of layer 0, expert 0, weight=18 is not a multiple of group=4, "
            "the M of N:M; choose another M");
  EXPECT_EQ(config_error([] { presets::srste(5, 4); }), "[presets] n:m=5:4 is not 1 <= N <= M");
  SparsifierConfig config = presets::srste(1, 4);
  config.structure = Structure::n_of_m(5, 4);
  EXPECT_EQ(refusal(config), "[sparse_structure] group_keep=5 is outside [1, group=4]");
  config = presets::srste(1, 4);
  config.budget.density = 0.5;
  EXPECT_EQ(refusal(config),
            "[sparsifier] density=0.5 differs from 0.25, which N:M fixes; set that");
  EXPECT_EQ(refusal(presets::srste(1, 4, -0.5)),
            "[soft_mask] lambda=-0.5 is not a finite number of 0 or more");
  config = presets::sdgf_step(1, 4, 100);
  config.forward.frames.back() = {2, 4};
  EXPECT_EQ(refusal(config),
            "[soft_mask] frames=2:4 is the last but not 1:4 of the structure; end with that");
  config.forward.frames.clear();
  EXPECT_EQ(refusal(config), "[soft_mask] frames=0 are missing; list one or more");
  EXPECT_EQ(refusal(presets::sdgf_geo(1, 4, 100)),
            "[sparse_structure] in of layer 0, expert 0, weight=16 is not a multiple of group=32, "
            "the M of N:M; choose another M");
  EXPECT_EQ(refusal(presets::sdgf_step(1, 4, 5, 5)),
            "[soft_mask] total_steps=5 is not above dense_steps=5; frames and fine_tune are shares "
            "of it");
  EXPECT_EQ(refusal(presets::mdgf_exp(1, 4, -1)),
            "[soft_mask] decay_rate=-1 is not a finite number of 0 or more");
  config = presets::srste(1, 4);
  config.schedule.end = 10;
  EXPECT_EQ(refusal(config),
            "[sparsifier] end=10 is above begin=0, but a soft forward has no updates of masks; set "
            "end to begin");
  config = presets::topkast(0.1, 0.1, 1);
  config.structure = Structure::blocks(2, 2);
  EXPECT_EQ(refusal(config), "[soft_mask] atom=2x2 is not 1x1, which forward=top_kast needs");
  config = presets::srste(1, 4);
  config.forward.inactive = InactiveGradient::kScaled;
  EXPECT_EQ(refusal(config),
            "[soft_mask] inactive=scaled is of mask_decay and structure_decay only, not of sr_ste");
  // Decoupled needs a learning rate.
  config = presets::srste(1, 4);
  config.forward.decoupled = true;
  SparseLinear linear = make_linear();
  Sparsifier sparsifier({linear->unit()}, config);
  sparsifier.begin_step(0);
  backward(linear, 0);
  EXPECT_EQ(
      config_error([&] { sparsifier.end_backward(0); }),
      "[sparsifier] decoupled=true needs the learning rate of layer 0, expert 0, weight; call "
      "attach");
  // A mask that is not of its frame.
  SparsifierState state = sparsifier.state_dict();
  state.units[0].mask = PackedMask::full(6, 16);
  EXPECT_EQ(config_error([&] { sparsifier.load(state); }),
            "[soft_mask] mask of layer 0, expert 0, weight=4 active weights in a cell differ from "
            "1, the number of the step it was chosen in");
}

TEST(SoftMask, Diverged) {
  SparseLinear one = make_linear(16, 6, 0), two = make_linear(16, 6, 1);
  Sparsifier sparsifier({one->unit(), two->unit()}, presets::srste(1, 4));
  sparsifier.begin_step(0);
  const PackedMask before = sparsifier.mask(key_of(0));
  {
    const c10::NoGradGuard no_grad;
    one->weight.neg_().add_(1);
    two->weight[2][3] = std::numeric_limits<double>::quiet_NaN();
  }
  try {
    sparsifier.begin_step(3);
    FAIL() << "no error";
  } catch (const Diverged& error) {
    EXPECT_STREQ(error.what(),
                 "[soft_mask] weights of layer 0, expert 1, weight=1 are NaN or infinite; the "
                 "training has diverged (layer 0, step 3)");
  }
  EXPECT_EQ(sparsifier.mask(key_of(0)), before);
}

TEST(SoftMask, LogLine) {
  std::ostringstream text;
  text << presets::sdgf_step(1, 4, 100, 10);
  EXPECT_NE(text.str().find(" forward=structure_decay dense_steps=10 choose_every=1 "
                            "total_steps=100 frames=3:4,2:4,1:4 inactive=ste"),
            std::string::npos)
      << text.str();
  std::ostringstream hard;
  hard << presets::static_mask(0.5);
  EXPECT_EQ(hard.str().find("forward"), std::string::npos);
}

}  // namespace
}  // namespace perseid
