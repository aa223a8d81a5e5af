// Coupled neurons of a network of SparseLinear under a Sparsifier, float64: maps with two coupled
// sides.
//   Training   active units, masks and links after each update; candidates and growth leave outputs
//   as
//              they are, bit for bit
//   Gradients  what links hand over for candidates is autograd's gradient of dense maps
//   Refused    updates in turns
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <set>

#include "moe/sparse_linear.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_fixture.h"
#include "tests/moe/sparse_neuron_fixture.h"

namespace perseid::testing {
namespace {

/// 30-60-50-10 with biases; hidden unit j is row j of one map and column j of the next.
struct Network {
  explicit Network(double density) {
    const Places widths = {30, 60, 50, 10};
    for (size_t i = 0; i < 3; ++i) {
      maps.emplace_back(SparseLinearOptions(widths[i], widths[i + 1])
                            .key({static_cast<int64_t>(i)})
                            .dtype(at::kDouble)
                            .seed(5));
    }
    config = coupled();
    config.budget.density = density;
    config.neurons.links = {{{0}, {1}}, {{1}, {2}}};
  }
  at::Tensor forward(int64_t step) {
    at::Tensor a = normal({16, 30}, 70 + static_cast<uint64_t>(step));
    for (size_t i = 0; i < 3; ++i) a = i < 2 ? maps[i]->forward(a).relu() : maps[i]->forward(a);
    return a;
  }
  void backward(int64_t step) { (forward(step) - normal({16, 10}, 5)).square().sum().backward(); }
  std::vector<SparseUnit> units() const {
    std::vector<SparseUnit> all;
    for (const SparseLinear& map : maps) all.push_back(map->unit());
    return all;
  }
  std::vector<at::Tensor> parameters() const {
    std::vector<at::Tensor> all;
    for (const SparseLinear& map : maps) {
      all.push_back(map->weight);
      all.push_back(map->bias);
    }
    return all;
  }
  std::vector<SparseLinear> maps;
  SparsifierConfig config;
};

TEST(SparseNeuronNetwork, Training) {
  at::set_num_threads(1);
  for (const double density : {0.5, 0.2}) {  // 0.2: the middle has 4 %, sparse products
    Network network(density);
    network.config.grad_accum = 2;
    Sparsifier sparsifier(network.units(), network.config);
    torch::optim::SGD optimizer(network.parameters(),
                                torch::optim::SGDOptions(0.003).momentum(0.9));
    sparsifier.attach(optimizer);
    const auto a = static_cast<int64_t>(60 * density), b = static_cast<int64_t>(50 * density);
    std::set<uint64_t> seen;
    for (int64_t step = 0; step < 40; ++step) {
      const at::Tensor before = network.forward(step);
      sparsifier.begin_step(step);
      const PackedMask old_a = sparsifier.neurons({1}), old_b = sparsifier.neurons({2});
      // Each link says what the layer computes with.
      for (const SparseUnit& unit : sparsifier.units()) {
        const at::Tensor others =
            position_mask(sparsifier.layout(unit.key), unit.link->active).logical_not();
        EXPECT_FALSE(unit.weight().masked_select(others).ne(0).any().item<bool>());
        EXPECT_NEAR(unit.link->density,
                    static_cast<double>(sparsifier.stats(unit.key).nnz) /
                        static_cast<double>(unit.parameter.numel()),
                    1e-12);
      }
      EXPECT_TRUE(same_bits(network.forward(step), before)) << step;
      optimizer.zero_grad();
      network.backward(step);
      const UpdateReport report = sparsifier.end_backward(step);
      EXPECT_EQ(report.units.size(), step % 3 == 1 ? 3u : 0u);
      const PackedMask now_a = sparsifier.neurons({1}), now_b = sparsifier.neurons({2});
      EXPECT_EQ(now_a.count(), a);
      EXPECT_EQ(now_b.count(), b);
      EXPECT_EQ(sparsifier.mask({0}), crossings(60, 30, &now_a, nullptr));
      EXPECT_EQ(sparsifier.mask({1}), crossings(50, 60, &now_b, &now_a));
      EXPECT_EQ(sparsifier.mask({2}), crossings(10, 50, nullptr, &now_b));
      for (const SparseUnit& unit : sparsifier.units()) {
        const at::Tensor inactive =
            position_mask(sparsifier.layout(unit.key), sparsifier.mask(unit.key)).logical_not();
        EXPECT_FALSE(unit.weight().masked_select(inactive).ne(0).any().item<bool>());
        EXPECT_EQ(unit.link->active, sparsifier.mask(unit.key));
      }
      if (step % 3 == 1) {
        const at::Tensor after = network.forward(step);
        const at::NoGradGuard no_grad;
        // Growth alone leaves outputs: taking its rows away changes nothing.
        std::vector<at::Tensor> kept;
        for (SparseLinear& map : network.maps) kept.push_back(map->weight.clone());
        const Places grown_a = listed(without(now_a, old_a)),
                     grown_b = listed(without(now_b, old_b));
        EXPECT_EQ(grown_a.size(), static_cast<size_t>(a / 2));
        for (const int64_t j : grown_a) {
          EXPECT_FALSE(network.maps[1]->weight.select(1, j).ne(0).any().item<bool>());
          EXPECT_TRUE(network.maps[0]->weight[j].ne(0).all().item<bool>());
          network.maps[0]->weight[j].zero_();
        }
        for (const int64_t j : grown_b) {
          EXPECT_FALSE(network.maps[2]->weight.select(1, j).ne(0).any().item<bool>());
          const at::Tensor row = network.maps[1]->weight[j];
          for (const int64_t i : listed(now_a)) {
            EXPECT_EQ(row[i].item<double>() != 0, old_a.test(i)) << step;
          }
          network.maps[1]->weight[j].zero_();
        }
        EXPECT_TRUE(same_bits(network.forward(step), after)) << step;
        for (size_t i = 0; i < 3; ++i) network.maps[i]->weight.copy_(kept[i]);
      }
      optimizer.step();
      sparsifier.end_step(step);
      seen.insert(now_a.fingerprint());
    }
    EXPECT_GT(seen.size(), 10u);
    EXPECT_LT((network.forward(3) - normal({16, 10}, 5)).square().sum().item<double>(), 1e4);
  }
}

TEST(SparseNeuronNetwork, Gradients) {
  at::set_num_threads(1);
  // What links hand over for candidates is autograd's gradient of dense maps.
  Network network(0.2), dense(0.2);
  Sparsifier sparsifier(network.units(), network.config);
  sparsifier.begin_step(1);
  for (size_t i = 0; i < 3; ++i) {
    dense.maps[i]->weight.detach().copy_(network.maps[i]->weight.detach());
    dense.maps[i]->bias.detach().copy_(network.maps[i]->bias.detach());
  }
  dense.backward(1);
  network.backward(1);
  const PackedMask old = sparsifier.neurons({1});
  Places candidates = listed(active_rows(network.maps[0]->unit().link->active));
  std::erase_if(candidates, [&](int64_t j) { return old.test(j); });
  EXPECT_EQ(candidates.size(), 12u);  // 2 for each of 6
  std::vector<std::pair<double, int64_t>> scores;
  for (const int64_t j : candidates) {
    scores.emplace_back(-dense.maps[1]->weight.grad().select(1, j).square().sum().item<double>(),
                        j);
  }
  std::sort(scores.begin(), scores.end());
  sparsifier.end_backward(1);
  Places best;
  for (size_t i = 0; i < 6; ++i) best.push_back(scores[i].second);
  std::sort(best.begin(), best.end());
  EXPECT_EQ(listed(without(sparsifier.neurons({1}), old)), best);
}

TEST(SparseNeuronNetwork, Refused) {
  Network network(0.5);
  network.config.schedule.stagger = true;
  EXPECT_EQ(config_error([&] { Sparsifier(network.units(), network.config); }),
            "[sparsifier] stagger=true parts weights that links couple; set it to false");
}

}  // namespace
}  // namespace perseid::testing
