#include "examples/train_fashion/options.h"

#include <CLI/CLI.hpp>
#include <bit>

#include "examples/common/text.h"
#include "examples/train_fashion/flags.h"
#include "kernels/random.h"

namespace perseid::examples {
namespace {

constexpr int kUsageError = 64;

/// Sets what task and protocol have as defaults, so that help shows them. What is wrong with the
/// command line is said by the parser that reads all of it.
void set_defaults(int argc, const char* const* argv, ProgramOptions& options, Words& words) {
  CLI::App app;
  app.allow_extras();
  app.set_help_flag();
  add_task_flags(app, words);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError&) {
    return;
  }
  look_up_task(words, options);
  if (options.task == Task::kDomains) return;
  const MultiOptions defaults = multi_defaults(options.protocol);
  options.train = defaults.train;
  options.experts = defaults.experts;
}

}  // namespace

CommandLine parse_command_line(int argc, const char* const* argv) {
  CommandLine result;
  ProgramOptions& options = result.options;
  options.seeds = {0};
  Words words;
  set_defaults(argc, argv, options, words);

  CLI::App app(
      "Trains mixtures of experts on Fashion-MNIST. Task domains: linear experts on images of "
      "four domains (plain, inverted, rotated, permuted pixels); one linear map cannot serve "
      "them all, a gate that tells them apart can. Task multi: two tasks with a gate each on "
      "shared experts.",
      "train_fashion");
  app.get_formatter()->column_width(46);
  add_model_flags(app, options, words);
  add_search_flags(app, options, words);
  add_sparsity_flags(app, options, words);
  add_training_flags(app, options);
  add_parallel_flags(app, options);
  add_output_flags(app, options);

  try {
    app.parse(argc, argv);
    look_up(words, app, options);
    if (options.train.top_k > options.train.num_experts) {
      throw CLI::ValidationError("--moe-router-topk",
                                 format_text("value %lld exceeds --num-experts %lld",
                                             static_cast<long long>(options.train.top_k),
                                             static_cast<long long>(options.train.num_experts)));
    }
    if (!options.dump.empty() && options.gates.size() * options.seeds.size() != 1) {
      throw CLI::ValidationError("--dump", "writes one run; choose one gate and one seed");
    }
    if (options.session.local_ranks > 1 && options.session.comm != "local") {
      throw CLI::ValidationError("--local-ranks", "needs --comm local");
    }
    result.run = true;
  } catch (const CLI::CallForHelp&) {
    result.text = app.help();
  } catch (const CLI::ParseError& error) {
    result.exit_code = kUsageError;
    result.text = std::string("[train_fashion] ") + error.what() +
                  "\nHINT: train_fashion --help lists the flags\n";
  }
  return result;
}

uint32_t config_hash(const ProgramOptions& options) {
  kernels::RandomKey key = kernels::random_key(0);
  const auto add = [&key](uint64_t value) { key = key.with(value); };
  const auto add_real = [&add](double value) { add(std::bit_cast<uint64_t>(value)); };
  const TrainOptions& train = options.train;
  for (const GateKind gate : options.gates) add(static_cast<uint64_t>(gate));
  for (const uint64_t seed : options.seeds) add(seed);
  for (const int64_t value :
       {train.num_experts, train.top_k, train.global_batch_size, train.epochs, train.train_iters,
        train.ep_size, train.idle_ranks, train.log_interval}) {
    add(static_cast<uint64_t>(value));
  }
  for (const double value :
       {train.aux_loss_coeff, train.z_loss_coeff, train.balance_coeff, train.gamma,
        train.entropy_coeff, train.entropy_ramp, train.capacity_factor, train.lr,
        train.gate_lr_factor, train.lr_decay, train.adam_eps}) {
    add_real(value);
  }
  const SearchOptions& search = train.search;
  for (const int64_t value : {static_cast<int64_t>(search.permutation.search()),
                              static_cast<int64_t>(search.permutation.scope()), search.held_batches,
                              search.max_evaluations, search.interval, search.scramble}) {
    add(static_cast<uint64_t>(value));
  }
  add_real(search.permutation.until());
  add_real(train.sparsity.sparsity);
  add(static_cast<uint64_t>(train.sparsity.method));
  add(static_cast<uint64_t>(train.sparsity.every));
  add_real(train.sparsity.alpha);
  add(static_cast<uint64_t>(train.sparsity.n_of_m.n));
  add(static_cast<uint64_t>(train.sparsity.n_of_m.m));
  add(static_cast<uint64_t>(train.d_ff));
  add(train.pad_images ? 1 : 0);
  add(train.hard_eval ? 1 : 0);
  add(train.input_norm ? 1 : 0);
  add(static_cast<uint64_t>(options.task));
  add(static_cast<uint64_t>(options.protocol));
  add(static_cast<uint64_t>(options.experts));
  add(static_cast<uint64_t>(options.validation_images));
  add(static_cast<uint64_t>(train.dtype));
  add(static_cast<uint64_t>(train.device));
  add(options.data_seed);
  return static_cast<uint32_t>(key.value >> 32);
}

}  // namespace perseid::examples
