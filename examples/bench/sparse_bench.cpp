#include "examples/bench/sparse_bench.h"

#include <ATen/ATen.h>
#include <torch/optim/adamw.h>

#include <functional>
#include <memory>
#include <ostream>
#include <vector>

#include "examples/bench/kernel_bench.h"
#include "examples/bench/place.h"
#include "examples/bench/timing.h"
#include "examples/common/json_lines.h"
#include "examples/common/text.h"
#include "kernels/block_product.h"
#include "kernels/csr_product.h"
#include "moe/sparse_export.h"
#include "moe/sparse_linear.h"
#include "moe/sparse_optimizer.h"
#include "moe/sparse_presets.h"

namespace perseid::bench {
namespace {

using examples::format_text;

constexpr int64_t kWarmupRounds = 2;
constexpr double kTolerance = 1e-4;
constexpr const char* kSparseBench = "sparse_bench";

struct Contender {
  std::string name;
  double density = 1;
  double flops = 0;
  double bytes = 0;  ///< held: weights, gradients, states; of products: weights and indices
  std::function<void()> run;
  std::vector<double> ms = {};
};

/// Times all in turns; the first is what the others are compared with.
void time_all(std::vector<Contender>& contenders, int64_t repeats) {
  std::vector<std::function<void()>> runs;
  for (const Contender& contender : contenders) runs.push_back(contender.run);
  const std::vector<std::vector<double>> ms = time_in_turns(runs, kWarmupRounds, repeats);
  for (size_t i = 0; i < contenders.size(); ++i) contenders[i].ms = ms[i];
}

void print(const std::string& title, const std::vector<Contender>& contenders, double positions,
           const SparseBenchOptions& options, examples::JsonLines& json, std::ostream& out) {
  out << "\n"
      << title << "\n"
      << format_text("%-26s %8s %10s %10s %8s %9s %9s %9s\n", "", "density", "ms median", "ms min",
                     "ratio", "MFLOP", "GFLOP/s", "bytes/pos");
  for (const Contender& contender : contenders) {
    const double ms = median(contender.ms);
    const double ratio = median_ratio(contender.ms, contenders.front().ms);
    out << format_text("%-26s %8.2f %10.3f %10.3f %8.3f %9.1f %9.1f %9.3f\n",
                       contender.name.c_str(), contender.density, ms, minimum(contender.ms), ratio,
                       contender.flops / 1e6, contender.flops / ms / 1e6,
                       contender.bytes / positions)
        << std::flush;
    json.write({{"bench", std::string("sparse")},
                {"case", title},
                {"name", contender.name},
                {"density", contender.density},
                {"threads", int64_t{options.threads}},
                {"repeats", options.repeats},
                {"ms_median", ms},
                {"ms_min", minimum(contender.ms)},
                {"ratio_to_dense", ratio},
                {"flops", contender.flops},
                {"gflops", contender.flops / ms / 1e6},
                {"bytes_per_position", contender.bytes / positions}});
  }
}

// ---- training step ------------------------------------------------------------------------------
/// A layer, its optimizer and for sparse ones its Sparsifier, on fixed rows.
struct Trainer {
  SparseLinear layer{nullptr};
  std::unique_ptr<Sparsifier> sparsifier;
  std::unique_ptr<torch::optim::Optimizer> optimizer;
  CompressedStates* compressed = nullptr;
  at::Tensor x, target;
  int64_t step = 0;

  void train() {
    if (sparsifier) sparsifier->begin_step(step);
    optimizer->zero_grad();
    layer->forward(x).backward(target);
    if (sparsifier) sparsifier->end_backward(step);
    optimizer->step();
    if (sparsifier) sparsifier->end_step(step);
    ++step;
  }
  double bytes() const {
    double sum = static_cast<double>(layer->weight.storage().nbytes() +
                                     layer->weight.grad().storage().nbytes());
    if (compressed != nullptr) return sum + static_cast<double>(compressed->state_bytes());
    const auto& state = static_cast<const torch::optim::AdamWParamState&>(
        *optimizer->state().at(layer->weight.unsafeGetTensorImpl()));
    return sum + static_cast<double>(state.exp_avg().storage().nbytes() +
                                     state.exp_avg_sq().storage().nbytes());
  }
};

/// @param density  0: dense, without a Sparsifier
std::shared_ptr<Trainer> make_trainer(const SparseBenchOptions& options, double density,
                                      bool is_compressed, SparsifierConfig config) {
  auto trainer = std::make_shared<Trainer>();
  trainer->layer = SparseLinear(
      SparseLinearOptions(options.width, options.width).bias(false).seed(options.seed));
  trainer->x = at::randn({options.num_rows, options.width});
  trainer->target = at::randn({options.num_rows, options.width});
  const torch::optim::AdamWOptions adamw(1e-4);
  if (is_compressed) {
    auto optimizer = std::make_unique<SparseAdamW>(trainer->layer->parameters(), adamw);
    trainer->compressed = optimizer.get();
    trainer->optimizer = std::move(optimizer);
  } else {
    trainer->optimizer = std::make_unique<torch::optim::AdamW>(trainer->layer->parameters(), adamw);
  }
  if (density > 0) {
    config.budget.distribution = perseid::Distribution::kUniform;
    config.min_rows = 0;
    trainer->sparsifier =
        std::make_unique<Sparsifier>(std::vector<SparseUnit>{trainer->layer->unit()}, config);
    trainer->sparsifier->attach(*trainer->optimizer);
  }
  return trainer;
}

void bench_steps(const SparseBenchOptions& options, examples::JsonLines& json, std::ostream& out) {
  const double positions = static_cast<double>(options.width * options.width);
  const double flops = 6 * static_cast<double>(options.num_rows) * positions;
  const auto add = [&](std::vector<Contender>& list, const std::string& name, double density,
                       bool is_compressed, bool is_optimizer_alone) {
    const auto trainer = make_trainer(options, density, is_compressed,
                                      presets::static_mask(density > 0 ? density : 1));
    trainer->train();
    Contender contender;
    contender.name = name;
    contender.density = density > 0 ? density : 1;
    contender.bytes = trainer->bytes();
    contender.flops =
        is_optimizer_alone ? 0 : flops * (density > 0.1 || density == 0 ? 1 : density);
    contender.run = [trainer, is_optimizer_alone] {
      if (is_optimizer_alone) {
        trainer->optimizer->step();
      } else {
        trainer->train();
      }
    };
    list.push_back(contender);
  };
  std::vector<Contender> steps, alone;
  for (const bool is_alone : {false, true}) {
    std::vector<Contender>& list = is_alone ? alone : steps;
    add(list, "dense, AdamW", 0, false, is_alone);
    for (const double density : {0.5, 0.25, 0.1}) {
      add(list, "masked, AdamW", density, false, is_alone);
      add(list, "masked, compressed states", density, true, is_alone);
    }
    time_all(list, options.repeats);
    print(format_text(is_alone ? "optimizer step alone, %lld x %lld"
                               : "training step of a layer, %lld x %lld, %lld rows: forward, "
                                 "backward of input and weight, masks of gradients, optimizer",
                      static_cast<long long>(options.width), static_cast<long long>(options.width),
                      static_cast<long long>(options.num_rows)),
          list, positions, options, json, out);
  }
}

void bench_updates(const SparseBenchOptions& options, examples::JsonLines& json,
                   std::ostream& out) {
  out << "\nmask updates: (step with update - step before it) / 100 steps, in the same rounds\n"
      << format_text("%-26s %8s %10s %13s %13s\n", "", "density", "step ms", "update ms more",
                     "% of 100 steps");
  for (const GrowCriterion grow :
       {GrowCriterion::kRandom, GrowCriterion::kGrad, GrowCriterion::kSampledGrad}) {
    for (const double density : {0.5, 0.25, 0.1}) {
      SparsifierConfig config = presets::static_mask(density);
      config.rule.grow = grow;
      config.schedule.every = 2;
      config.schedule.begin = 1;
      config.schedule.end = 1'000'000'000;
      config.schedule.anneal = Anneal::kConstant;
      const auto trainer = make_trainer(options, density, true, config);
      std::vector<double> plain, more;
      for (int64_t round = -kWarmupRounds; round < options.repeats; ++round) {
        const double start = now_ms();
        trainer->train();
        const double middle = now_ms();
        trainer->train();
        const double end = now_ms();
        if (round < 0) continue;
        plain.push_back(middle - start);
        more.push_back((end - middle) - (middle - start));
      }
      const double share = 100 * median(more) / (100 * median(plain));
      const char* const name = grow == GrowCriterion::kRandom ? "grow at random (SET)"
                               : grow == GrowCriterion::kGrad ? "grow by gradient (RigL)"
                                                              : "grow by sampled gradient";
      out << format_text("%-26s %8.2f %10.3f %13.3f %13.2f\n", name, density, median(plain),
                         median(more), share);
      json.write({{"bench", std::string("sparse")},
                  {"case", std::string("mask updates")},
                  {"name", std::string(name)},
                  {"density", density},
                  {"threads", int64_t{options.threads}},
                  {"repeats", options.repeats},
                  {"step_ms_median", median(plain)},
                  {"update_ms_median", median(more)},
                  {"percent_of_100_steps", share}});
    }
  }
}

// ---- products -----------------------------------------------------------------------------------
/// Three products of LibTorch: y = x W^T, grad_x, grad_W.
std::function<void()> dense_products(const at::Tensor& x, const at::Tensor& weight,
                                     const at::Tensor& delta) {
  const at::Tensor y = at::empty({x.size(0), weight.size(0)}), grad_x = at::empty_like(x);
  const at::Tensor grad_weight = at::empty_like(weight);
  return [=] {
    at::mm_out(const_cast<at::Tensor&>(y), x, weight.t());
    at::mm_out(const_cast<at::Tensor&>(grad_x), delta, weight);
    at::mm_out(const_cast<at::Tensor&>(grad_weight), delta.t(), x);
  };
}

void bench_rows(const SparseBenchOptions& options, examples::JsonLines& json, std::ostream& out) {
  constexpr int64_t kSize = 1000, kBatch = 40;
  constexpr double kDensity = 0.03;
  const AtomLayout layout = make_layout(Structure::constant_fan_in(), kSize, kSize, "weight");
  const auto fan_in = static_cast<int64_t>(kDensity * kSize);
  const PackedMask mask = random_mask(layout, kSize * fan_in, kernels::random_key(options.seed));
  const at::Tensor weight = at::randn({kSize, kSize}) * position_mask(layout, mask);
  const at::Tensor x = at::randn({kBatch, kSize}), delta = at::randn({kBatch, kSize});
  const double positions = kSize * kSize, flops = 6.0 * kBatch * positions;

  std::vector<Contender> contenders;
  contenders.push_back(
      {"dense: three mm", 1, flops, positions * 4, dense_products(x, weight, delta)});
  const auto autograd = [&](const std::string& name, double density, double bytes,
                            const at::Tensor& parameter,
                            const std::function<at::Tensor(const at::Tensor&)>& forward) {
    const at::Tensor leaf = x.clone().requires_grad_(true);
    contenders.push_back({name, density, flops * density, bytes, [=] {
                            const_cast<at::Tensor&>(parameter).mutable_grad() = at::Tensor();
                            const_cast<at::Tensor&>(leaf).mutable_grad() = at::Tensor();
                            forward(leaf).backward(delta);
                          }});
    contenders.back().run();
    require_close(leaf.grad(), delta.mm(weight), kTolerance, kSparseBench, name);
  };
  const at::Tensor dense = weight.clone().requires_grad_(true);
  autograd("dense, autograd", 1, positions * 4, dense,
           [=](const at::Tensor& rows) { return rows.mm(dense.t()); });
  const auto masked = SparseLinear(SparseLinearOptions(kSize, kSize).bias(false));
  SparsifierConfig config = presets::static_mask(kDensity);
  config.structure = Structure::constant_fan_in();
  config.budget.distribution = perseid::Distribution::kUniform;
  const auto sparsifier =
      std::make_shared<Sparsifier>(std::vector<SparseUnit>{masked->unit()}, config);
  SparsifierState state = sparsifier->state_dict();
  state.units[0].mask = mask;
  sparsifier->load(state);
  masked->weight.detach().copy_(weight);
  autograd("masked, autograd", kDensity, positions * 4.125, masked->weight,
           [own = masked.ptr(), sparsifier](const at::Tensor& rows) { return own->forward(rows); });
  for (const SparseFormat format :
       {SparseFormat::kCsr, SparseFormat::kShortCsr, SparseFormat::kCondensed}) {
    SparseExport sparse = export_as(weight, layout, mask, format);
    sparse.values.requires_grad_(true);
    const char* const name = format == SparseFormat::kCsr        ? "csr, autograd"
                             : format == SparseFormat::kShortCsr ? "csr 16 bits, autograd"
                                                                 : "condensed, autograd";
    autograd(name, kDensity, static_cast<double>(sparse.bytes()), sparse.values,
             [sparse](const at::Tensor& rows) { return sparse_matmul(rows, sparse); });
  }
  const SparseExport sparse = export_as(weight, layout, mask, SparseFormat::kCsr);
  const at::Tensor columns = x.t().contiguous(), deltas = delta.t().contiguous();
  const at::Tensor y = at::empty({kSize, kBatch}), grad_x = at::empty({kSize, kBatch});
  const at::Tensor grad_values = at::empty_like(sparse.values);
  contenders.push_back(
      {"csr: three kernels", kDensity, flops * kDensity, static_cast<double>(sparse.bytes()), [=] {
         kernels::CsrWeight csr;
         csr.M = csr.N = kSize;
         csr.row_offsets = sparse.offsets.const_data_ptr<int32_t>();
         csr.columns = sparse.indices.const_data_ptr<int32_t>();
         csr.values = sparse.values.const_data_ptr();
         constexpr kernels::DType kType = kernels::DType::kFloat32;
         kernels::csr_product(csr, columns.const_data_ptr(), kBatch, kType, y.mutable_data_ptr());
         kernels::csr_transposed_product(csr, deltas.const_data_ptr(), kBatch, kType,
                                         grad_x.mutable_data_ptr());
         kernels::csr_outer_product(csr, deltas.const_data_ptr(), columns.const_data_ptr(), kBatch,
                                    kType, grad_values.mutable_data_ptr());
       }});
  contenders.back().run();
  require_close(y.t(), x.mm(weight.t()), kTolerance, kSparseBench, "csr");
  time_all(contenders, options.repeats);
  print("products, 1000 x 1000, batch 40: forward and both gradients", contenders, positions,
        options, json, out);
}

void bench_blocks(const SparseBenchOptions& options, examples::JsonLines& json, std::ostream& out) {
  constexpr int64_t kExperts = 4, kSize = 1024, kBlock = 64, kRowsPerExpert = 256;
  const double positions = static_cast<double>(kExperts * kSize * kSize);
  const double flops = 6.0 * kRowsPerExpert * positions;
  const at::Tensor x = at::randn({kExperts * kRowsPerExpert, kSize}), delta = at::randn_like(x);
  std::vector<Contender> contenders;
  std::vector<std::function<void()>> experts;
  for (int64_t e = 0; e < kExperts; ++e) {
    experts.push_back(dense_products(x.narrow(0, e * kRowsPerExpert, kRowsPerExpert),
                                     at::randn({kSize, kSize}),
                                     delta.narrow(0, e * kRowsPerExpert, kRowsPerExpert)));
  }
  contenders.push_back({"dense: mm of each expert", 1, flops, positions * 4, [experts] {
                          for (const auto& run : experts) run();
                        }});
  const AtomLayout layout = make_layout(Structure::blocks(kBlock, kBlock), kSize, kSize, "weight");
  for (const double density : {0.25, 0.1}) {
    std::vector<int32_t> offsets = {0};
    std::vector<at::Tensor> columns, values, denses;
    for (int64_t e = 0; e < kExperts; ++e) {
      const auto blocks = static_cast<int64_t>(density * static_cast<double>(layout.num_atoms()));
      const PackedMask mask =
          random_mask(layout, blocks * layout.granule(),
                      kernels::random_key(options.seed).with(static_cast<uint64_t>(e)));
      const SparseExport sparse =
          export_as(at::randn({kSize, kSize}), layout, mask, SparseFormat::kBlockCsr);
      const int32_t before = offsets.back();
      for (int64_t row = 1; row < sparse.offsets.numel(); ++row) {
        offsets.push_back(before + sparse.offsets.const_data_ptr<int32_t>()[row]);
      }
      columns.push_back(sparse.indices);
      values.push_back(sparse.values);
      denses.push_back(dense_weight(sparse));
    }
    const at::Tensor all_columns = at::cat(columns), all_values = at::cat(values);
    const at::Tensor grad_values = at::empty_like(all_values);
    const at::Tensor y = at::empty_like(x), grad_x = at::empty_like(x);
    const auto run = [=] {
      const kernels::BlockWeights weights{kExperts,
                                          kSize,
                                          kSize,
                                          kBlock,
                                          kBlock,
                                          offsets.data(),
                                          all_columns.const_data_ptr<int32_t>(),
                                          all_values.const_data_ptr()};
      std::vector<int64_t> rows;
      for (int64_t e = 0; e <= kExperts; ++e) rows.push_back(e * kRowsPerExpert);
      constexpr kernels::DType kType = kernels::DType::kFloat32;
      kernels::block_product(weights, x.const_data_ptr(), rows.data(), kType, y.mutable_data_ptr());
      kernels::block_transposed_product(weights, delta.const_data_ptr(), rows.data(), kType,
                                        grad_x.mutable_data_ptr());
      kernels::block_outer_product(weights, delta.const_data_ptr(), x.const_data_ptr(), rows.data(),
                                   kType, grad_values.mutable_data_ptr());
    };
    run();
    for (int64_t e = 0; e < kExperts; ++e) {
      const at::Tensor& dense = denses[static_cast<size_t>(e)];
      const auto mine = [e](const at::Tensor& rows) {
        return rows.narrow(0, e * kRowsPerExpert, kRowsPerExpert);
      };
      require_close(mine(y), mine(x).mm(dense.t()), kTolerance, kSparseBench, "block product");
      require_close(mine(grad_x), mine(delta).mm(dense), kTolerance, kSparseBench,
                    "transposed block product");
    }
    const double blocks = static_cast<double>(all_values.size(0));
    contenders.push_back({"blocks of 64 x 64", blocks * kBlock * kBlock / positions,
                          6.0 * kRowsPerExpert * blocks * kBlock * kBlock,
                          static_cast<double>(all_values.storage().nbytes()) + blocks * 4 +
                              static_cast<double>(offsets.size()) * 4,
                          run});
  }
  time_all(contenders, options.repeats);
  print("products of 4 experts, 1024 x 1024, 256 rows each: forward and both gradients", contenders,
        positions, options, json, out);
}

}  // namespace

void run_sparse_bench(const SparseBenchOptions& options, std::ostream& out) {
  use_threads(options.threads);
  at::manual_seed(options.seed);
  examples::JsonLines json(options.json);
  out << format_text("float32, %d threads, %lld rounds in which each contender runs once\n",
                     options.threads, static_cast<long long>(options.repeats))
      << "ratio = time / time of the first row in the same round, median of the rounds; FLOPs are "
         "those of the products\nthat are needed, or that are formed where products are dense; "
         "bytes/pos: a step's weights, gradients and states,\nproducts' weights and indices, for "
         "each position of the dense weight\n";
  bench_steps(options, json, out);
  bench_updates(options, json, out);
  bench_rows(options, json, out);
  bench_blocks(options, json, out);
}

}  // namespace perseid::bench
