#include "moe/permutation_search.h"

#include <ATen/Context.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <utility>

#include "comm/agree.h"
#include "comm/collectives.h"
#include "gates/describe.h"
#include "kernels/error.h"
#include "moe/layer_permutations.h"
#include "moe/permutation_score.h"
#include "moe/ranks_agree.h"

namespace perseid {
namespace {

using at::Tensor;
using Rows = std::vector<std::vector<int32_t>>;
using Layers = std::vector<std::shared_ptr<MoELayer>>;

constexpr const char* kPermutationSearch = "permutation_search";

/// n!, or the largest number where it does not fit.
int64_t factorial(int64_t n) {
  int64_t product = 1;
  for (int64_t i = 2; i <= n; ++i) {
    if (product > std::numeric_limits<int64_t>::max() / i)
      return std::numeric_limits<int64_t>::max();
    product *= i;
  }
  return product;
}

/// The state of LibTorch's default generators, put back at the end.
class KeptGenerators {
 public:
  explicit KeptGenerators(at::Device device) {
    keep(at::globalContext().defaultGenerator(at::kCPU));
    if (device.is_cuda()) keep(at::globalContext().defaultGenerator(device));
  }
  ~KeptGenerators() {
    for (auto& [generator, state] : states_) {
      const std::lock_guard lock(generator.mutex());
      generator.set_state(state);
    }
  }
  KeptGenerators(const KeptGenerators&) = delete;
  KeptGenerators& operator=(const KeptGenerators&) = delete;

 private:
  void keep(at::Generator generator) {
    const std::lock_guard lock(generator.mutex());
    states_.emplace_back(generator, generator.get_state());
  }
  std::vector<std::pair<at::Generator, Tensor>> states_;
};

/// A model in evaluation mode, its layers with probes; put back at the end.
class ProbedModel {
 public:
  ProbedModel(torch::nn::Module& model, const Layers& layers,
              const PermutationSearchOptions& options)
      : layers_(layers), probes(layers.size()) {
    modes_.emplace_back(&model, model.is_training());
    for (const auto& module : model.modules(/*include_self=*/false)) {
      modes_.emplace_back(module.get(), module->is_training());
    }
    model.eval();
    const auto clock = std::make_shared<int64_t>(0);
    for (size_t i = 0; i < layers.size(); ++i) {
      probes[i].max_bytes = options.max_bytes;
      probes[i].max_tokens = options.max_probe_tokens;
      probes[i].clock = clock;
      layers[i]->set_probe(&probes[i]);
    }
  }
  ~ProbedModel() {
    for (const auto& layer : layers_) layer->set_probe(nullptr);
    // Parents first: a module's mode reaches its children, which then get their own.
    for (const auto& [module, is_training] : modes_) module->train(is_training);
  }
  ProbedModel(const ProbedModel&) = delete;
  ProbedModel& operator=(const ProbedModel&) = delete;

 private:
  const Layers& layers_;
  std::vector<std::pair<torch::nn::Module*, bool>> modes_;

 public:
  std::vector<LayerProbe> probes;
};

/// The rows of tokens that every expert ran for.
Tensor of_probed(const Tensor& rows, const KeptOutputs& kept) {
  return kept.share < 1 ? rows.index_select(0, kept.probed) : rows;
}

/// One search over the held batches.
class Search {
 public:
  Search(torch::nn::Module& model, const PermutationSearchOptions& options, const Layers& layers,
         size_t num_batches, const PermutationSearch::HeldLoss& held_loss)
      : options_(options),
        layers_(layers),
        num_batches_(num_batches),
        held_loss_(held_loss),
        world_(layers.front()->groups().world),
        generators_(layers.front()->permutations().front()->expert_map.device()),
        model_(model, layers, options) {
    for (size_t i = 0; i < layers.size(); ++i) {
      const Permutations& permutations = layers[i]->permutations();
      for (size_t p = 0; p < permutations.size(); ++p) {
        const Tensor map = permutations[p]->host_map();
        for (int64_t u = 0; u < map.size(0); ++u) {
          units_.push_back({i, p, u});
          const int32_t* row = map.const_data_ptr<int32_t>() + u * map.size(1);
          best_rows_.emplace_back(row, row + map.size(1));
        }
      }
    }
  }

  /// Also leaves the best order behind where a held loss throws.
  ~Search() {
    for (size_t u = 0; u < units_.size(); ++u) set_row(u, best_rows_[u]);
  }
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;

  /// M of every unit of the present order.
  std::vector<Tensor> scores() {
    measure_present();
    std::vector<Tensor> tables;
    for (const ScoreMatrix& matrix : score()) {
      const auto E = static_cast<int64_t>(best_rows_[tables.size()].size());
      Tensor table = at::empty({E, E}, at::kDouble);
      auto* const value = table.mutable_data_ptr<double>();
      for (size_t i = 0; i < matrix.score.size(); ++i) {
        value[i] = matrix.unseen[i] > 0 ? std::numeric_limits<double>::quiet_NaN()
                                        : matrix.score[i] / static_cast<double>(num_batches_);
      }
      tables.push_back(table);
    }
    return tables;
  }

  PermutationReport run() {
    const int64_t E = static_cast<int64_t>(best_rows_.front().size());
    measure_present();
    const bool is_small = units_.size() == 1 && E <= options_.exhaustive_up_to;
    if (is_small && options_.max_evaluations >= factorial(E)) {
      try_all();
    } else {
      while (report_.evaluations < options_.max_evaluations && improve()) continue;
    }
    report_.loss_after = best_loss_;
    return report_;
  }

 private:
  void measure_present() {
    best_loss_ = evaluate(layers_.size() - 1);
    if (!std::isfinite(best_loss_)) {
      throw Diverged({kPermutationSearch, "held_loss", to_text(best_loss_),
                      "of the present order is not finite; search before training diverges",
                      world_.rank()});
    }
    report_.loss_before = best_loss_;
    require_one_forward();
  }

  bool probes_all() const { return options_.probe == Probe::kAll; }

  void set_row(size_t u, const std::vector<int32_t>& row) {
    const PermutationUnit& unit = units_[u];
    gates::ExpertPermutation& permutation = *layers_[unit.layer]->permutations()[unit.permutation];
    Tensor map = permutation.host_map();
    std::copy(row.begin(), row.end(),
              map.mutable_data_ptr<int32_t>() + unit.unit * permutation.num_experts());
    permutation.set_map(map);
  }

  /// The loss of a held batch, checked on all ranks.
  Tensor loss_of(size_t batch) {
    for (LayerProbe& probe : model_.probes) probe.batch = batch;
    const Tensor loss = held_loss_(batch);
    comm::agree(world_, {kPermutationSearch}, [&] {
      require(loss.defined() && loss.numel() == 1 && loss.is_floating_point(), kPermutationSearch,
              "held_loss", gates::describe(loss), "is not a floating scalar");
    });
    return loss;
  }

  /// Sum over ranks of one number of each, divided by the number of batches.
  double over_ranks(double local) const {
    std::vector<double> all(static_cast<size_t>(world_.size()));
    comm::all_gather(&local, sizeof(local), all.data(), world_, {kPermutationSearch});
    return std::accumulate(all.begin(), all.end(), 0.0) / static_cast<double>(num_batches_);
  }

  /// Does layer i read the same tokens as before when only this layer and those after it change?
  bool runs_until(size_t i, size_t changed) const {
    if (layers_.size() == 1) return true;
    // Before the first evaluation nothing is known about the order of layers.
    const int64_t last = model_.probes[changed].last_forward, mine = model_.probes[i].last_forward;
    return last > 0 && (mine - 1) % num_layers() <= (last - 1) % num_layers();
  }
  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }

  /// The mean held loss of the order that is set, which differs from the best one in one layer.
  double evaluate(size_t changed) {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < layers_.size(); ++i) {
      model_.probes[i].replay = probes_all() && runs_until(i, changed);
      model_.probes[i].collect = false;
      model_.probes[i].record = false;
    }
    double sum = 0;
    for (size_t b = 0; b < num_batches_; ++b) sum += loss_of(b).item<double>();
    ++report_.evaluations;
    return over_ranks(sum);
  }

  void require_one_forward() const {
    for (const LayerProbe& probe : model_.probes) {
      require(probe.num_forwards == static_cast<int64_t>(num_batches_), kPermutationSearch,
              "num_forwards", probe.num_forwards,
              "of a layer differs from num_batches=" + to_text(num_batches_) +
                  "; the held loss must run the model once, and each layer once in it");
    }
  }

  /// M of every unit, summed over held batches and ranks.
  std::vector<ScoreMatrix> score() {
    const at::AutoGradMode with_grad(true);
    for (size_t i = 0; i < layers_.size(); ++i) {
      LayerProbe& probe = model_.probes[i];
      probe.record = true;
      probe.replay = probes_all() && is_first_layer(i);
      probe.collect = probes_all();
    }
    std::vector<ScoreMatrix> matrices;
    for (const auto& row : best_rows_) matrices.emplace_back(static_cast<int64_t>(row.size()));
    for (size_t b = 0; b < num_batches_; ++b) {
      const Tensor loss = loss_of(b);
      comm::agree(world_, {kPermutationSearch}, [&] {
        require(loss.requires_grad(), kPermutationSearch, "held_loss.requires_grad", false,
                "leaves nothing to differentiate; call the model without NoGradGuard");
      });
      std::vector<Tensor> deltas;
      for (const LayerProbe& probe : model_.probes) deltas.push_back(probe.delta);
      const std::vector<Tensor> grads =
          torch::autograd::grad({loss}, deltas, {}, /*retain_graph=*/false, /*create_graph=*/false,
                                /*allow_unused=*/true);
      for (size_t i = 0; i < layers_.size(); ++i) {
        if (grads[i].defined()) add_layer(i, grads[i], matrices);
        model_.probes[i].output_weights.clear();
        model_.probes[i].delta = Tensor();
      }
    }
    sum_over_ranks(matrices);
    return matrices;
  }

  bool is_first_layer(size_t i) const {
    for (size_t j = 0; j < layers_.size(); ++j) {
      if (j != i && runs_until(j, i)) return false;
    }
    return true;
  }

  /// @param grad  of the probe's delta
  void add_layer(size_t i, const Tensor& grad, std::vector<ScoreMatrix>& matrices) {
    const at::NoGradGuard no_grad;
    const LayerProbe& probe = model_.probes[i];
    const Permutations& permutations = layers_[i]->permutations();
    const int64_t width = layers_[i]->experts()->d_out();
    const int64_t num_gates = static_cast<int64_t>(layers_[i]->gates().size());
    for (int64_t g = 0; g < num_gates; ++g) {
      Tensor by_expert, is_seen;
      if (probes_all()) {
        const KeptOutputs& kept = probe.kept[probe.batch];
        const Tensor dy = of_probed(grad.narrow(1, g * width, width), kept);
        const at::ScalarType type = dy.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        by_expert =
            at::bmm(of_probed(kept.rows, kept).to(type), dy.to(type).unsqueeze(2)).squeeze(2);
        by_expert.div_(kept.share);
      } else {
        gates::Routing pairs = probe.pairs;
        const int64_t E = permutations.front()->num_experts();
        pairs.weights = grad.select(1, g).contiguous();
        by_expert = gates::dense_weights(pairs, E);
        pairs.weights = at::ones_like(pairs.weights);
        is_seen = gates::dense_weights(pairs, E).gt(0);
      }
      const size_t p = permutation_of(permutations, static_cast<size_t>(g));
      Tensor weights = probe.output_weights[static_cast<size_t>(g)];
      if (probes_all()) weights = of_probed(weights, probe.kept[probe.batch]);
      for (size_t u = 0; u < units_.size(); ++u) {
        if (units_[u].layer != i || units_[u].permutation != p) continue;
        add_scores(weights.select(1, units_[u].unit), by_expert, is_seen, matrices[u]);
      }
    }
  }

  void sum_over_ranks(std::vector<ScoreMatrix>& matrices) const {
    if (world_.size() == 1) return;
    std::vector<double> mine;
    for (const ScoreMatrix& matrix : matrices) {
      mine.insert(mine.end(), matrix.score.begin(), matrix.score.end());
      mine.insert(mine.end(), matrix.unseen.begin(), matrix.unseen.end());
    }
    std::vector<double> all(mine.size() * static_cast<size_t>(world_.size()));
    comm::all_gather(mine.data(), static_cast<int64_t>(mine.size() * sizeof(double)), all.data(),
                     world_, {kPermutationSearch});
    std::fill(mine.begin(), mine.end(), 0.0);
    for (size_t i = 0; i < all.size(); ++i) mine[i % mine.size()] += all[i];
    auto next = mine.begin();
    for (ScoreMatrix& matrix : matrices) {
      for (auto* part : {&matrix.score, &matrix.unseen}) {
        std::copy_n(next, part->size(), part->begin());
        next += static_cast<ptrdiff_t>(part->size());
      }
    }
  }

  double limit() const { return best_loss_ - options_.min_relative_gain * std::abs(best_loss_); }

  /// One round. Was a better order found?
  bool improve() {
    const std::vector<PermutationCandidate> candidates =
        best_candidates(score(), best_rows_, options_.candidates_per_round);
    ++report_.rounds;
    size_t chosen = candidates.size();
    double lowest = std::numeric_limits<double>::infinity();
    for (size_t c = 0; c < candidates.size(); ++c) {
      if (report_.evaluations >= options_.max_evaluations) break;
      const PermutationCandidate& candidate = candidates[c];
      for (const auto& [unit, row] : candidate.rows) set_row(unit, row);
      const double loss = evaluate(first_layer_of(candidate));
      for (const auto& [unit, row] : candidate.rows) set_row(unit, best_rows_[unit]);
      if (loss < lowest) {  // false for a NaN
        lowest = loss;
        chosen = c;
      }
    }
    if (chosen == candidates.size() || !(lowest < limit())) return false;
    accept(candidates[chosen], lowest);
    return true;
  }

  /// The one of its layers that runs first.
  size_t first_layer_of(const PermutationCandidate& candidate) const {
    size_t first = units_[candidate.rows.front().first].layer;
    for (const auto& change : candidate.rows) {
      const size_t layer = units_[change.first].layer;
      if (runs_until(layer, first)) first = layer;
    }
    return first;
  }

  void accept(const PermutationCandidate& candidate, double loss) {
    const size_t first_layer = first_layer_of(candidate);
    for (const auto& [unit, row] : candidate.rows) {
      set_row(unit, row);
      best_rows_[unit] = row;
    }
    const bool is_joint = candidate.rows.size() > 1;
    const PermutationUnit& unit = units_[candidate.rows.front().first];
    report_.moves.push_back({unit.layer, unit.permutation, is_joint ? -1 : unit.unit, candidate.a,
                             candidate.b, candidate.predicted / static_cast<double>(num_batches_),
                             loss - best_loss_});
    best_loss_ = loss;
    // The layers after the first of them now read other tokens.
    for (size_t i = 0; i < layers_.size(); ++i) {
      if (!runs_until(i, first_layer)) model_.probes[i].kept.clear();
    }
    require_same_maps();
  }

  void require_same_maps() const {
    for (const auto& layer : layers_) {
      const int64_t mine = hash_of(layer->permutations());
      std::vector<int64_t> all(static_cast<size_t>(world_.size()));
      comm::all_gather(&mine, sizeof(mine), all.data(), world_, {kPermutationSearch});
      require_same_on_ranks(all, "expert_map.hash", world_.rank(), {kPermutationSearch});
    }
  }

  /// Every order of the one unit; of equal losses the first in lexicographic order.
  void try_all() {
    const std::vector<int32_t> present = best_rows_.front();
    PermutationCandidate best;
    best.predicted = std::numeric_limits<double>::quiet_NaN();
    double lowest = std::numeric_limits<double>::infinity();
    std::vector<int32_t> row(present.size());
    std::iota(row.begin(), row.end(), 0);
    do {
      double loss = best_loss_;
      if (row != present) {
        set_row(0, row);
        loss = evaluate(units_.front().layer);
      }
      if (loss < lowest) {
        lowest = loss;
        best.rows = {{0, row}};
      }
    } while (std::next_permutation(row.begin(), row.end()));
    set_row(0, present);
    if (lowest < limit()) accept(best, lowest);
  }

  const PermutationSearchOptions& options_;
  const Layers& layers_;
  size_t num_batches_;
  const PermutationSearch::HeldLoss& held_loss_;
  comm::Group world_;
  KeptGenerators generators_;
  ProbedModel model_;
  std::vector<PermutationUnit> units_;
  Rows best_rows_;  ///< of each unit
  double best_loss_ = 0;
  PermutationReport report_;
};

}  // namespace

PermutationSearch::PermutationSearch(torch::nn::Module& model, PermutationSearchOptions options)
    : model_(model), options_(options) {
  require(options.max_evaluations >= 1, kPermutationSearch, "max_evaluations",
          options.max_evaluations, "is below 1; 64 is usual");
  require(options.candidates_per_round >= 1, kPermutationSearch, "candidates_per_round",
          options.candidates_per_round, "is below 1; 8 is usual");
  require(options.min_relative_gain >= 0 && std::isfinite(options.min_relative_gain),
          kPermutationSearch, "min_relative_gain", options.min_relative_gain,
          "is not a finite number from 0 on");
  require(options.max_probe_tokens >= 1, kPermutationSearch, "max_probe_tokens",
          options.max_probe_tokens, "is below 1; 1024 is usual");
  require(options.max_bytes >= 0, kPermutationSearch, "max_bytes", options.max_bytes, "is below 0");
  const auto add = [this](const std::shared_ptr<MoELayer>& layer) {
    if (layer == nullptr || layer->permutations().empty()) return;
    if (std::find(layers_.begin(), layers_.end(), layer) == layers_.end()) layers_.push_back(layer);
  };
  if (dynamic_cast<MoELayer*>(&model) != nullptr) {
    add(std::dynamic_pointer_cast<MoELayer>(model.shared_from_this()));
  }
  for (const auto& module : model.modules(/*include_self=*/false)) {
    add(std::dynamic_pointer_cast<MoELayer>(module));
  }
  require(!layers_.empty(), kPermutationSearch, "model", model.name(),
          "has no MoELayer with MoELayerOptions::permutation; set its search");
}

void PermutationSearch::require_batches(size_t num_batches, const HeldLoss& held_loss) const {
  require(num_batches >= 1, kPermutationSearch, "num_batches", num_batches,
          "is 0: a search compares orders on held batches; give 1 or more");
  require(held_loss != nullptr, kPermutationSearch, "held_loss", "none", "is not a function");
}

std::vector<at::Tensor> PermutationSearch::scores(size_t num_batches, const HeldLoss& held_loss) {
  require_batches(num_batches, held_loss);
  return Search(model_, options_, layers_, num_batches, held_loss).scores();
}

PermutationReport PermutationSearch::search_now(size_t num_batches, const HeldLoss& held_loss) {
  require_batches(num_batches, held_loss);
  return Search(model_, options_, layers_, num_batches, held_loss).run();
}

}  // namespace perseid
