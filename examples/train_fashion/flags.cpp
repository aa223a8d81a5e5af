#include "examples/train_fashion/flags.h"

#include <algorithm>
#include <cstdint>
#include <map>

#include "examples/common/validators.h"

namespace perseid::examples {
namespace {

constexpr int64_t kMany = 1'000'000'000;

const std::map<std::string, kernels::DType> kDTypes = {{"float32", kernels::DType::kFloat32},
                                                       {"float64", kernels::DType::kFloat64},
                                                       {"bfloat16", kernels::DType::kBFloat16}};
const std::map<std::string, std::vector<GateKind>> kGates = {
    {"single", {GateKind::kSingle}},
    {"hash", {GateKind::kHash}},
    {"oracle", {GateKind::kOracle}},
    {"topk", {GateKind::kTopK}},
    {"dselectk", {GateKind::kDSelectK}},
    {"comet", {GateKind::kComet}},
    {"dense", {GateKind::kDense}},
    {"all",
     {GateKind::kSingle, GateKind::kHash, GateKind::kOracle, GateKind::kTopK, GateKind::kDSelectK,
      GateKind::kComet, GateKind::kDense}}};
/// Those of task multi: its images have no domain, and a key has no meaning.
const std::map<std::string, std::vector<GateKind>> kMultiGates = {
    {"single", {GateKind::kSingle}},
    {"topk", {GateKind::kTopK}},
    {"dselectk", {GateKind::kDSelectK}},
    {"comet", {GateKind::kComet}},
    {"dense", {GateKind::kDense}},
    {"all",
     {GateKind::kSingle, GateKind::kTopK, GateKind::kDSelectK, GateKind::kComet,
      GateKind::kDense}}};
const std::map<std::string, Task> kTasks = {{"domains", Task::kDomains}, {"multi", Task::kMulti}};
const std::map<std::string, Protocol> kProtocols = {{"small", Protocol::kSmall},
                                                    {"published", Protocol::kPublished}};
const std::map<std::string, ExpertKind> kExperts = {{"mlp", ExpertKind::kMlp},
                                                    {"conv", ExpertKind::kConv}};

const std::map<std::string, gates::PermSearch> kSearches = {
    {"none", gates::PermSearch::kNone},
    {"sinkhorn", gates::PermSearch::kSinkhorn},
    {"swap", gates::PermSearch::kSwap}};
const std::map<std::string, gates::PermScope> kScopes = {{"shared", gates::PermScope::kShared},
                                                         {"per_gate", gates::PermScope::kPerGate},
                                                         {"per_tree", gates::PermScope::kPerTree}};

const std::map<std::string, SparseMethod> kSparseMethods = {{"none", SparseMethod::kNone},
                                                            {"static", SparseMethod::kStatic},
                                                            {"set", SparseMethod::kSet},
                                                            {"rigl", SparseMethod::kRigl},
                                                            {"nm_dst", SparseMethod::kNmDst},
                                                            {"srste", SparseMethod::kSrSte},
                                                            {"mdgf_lin", SparseMethod::kMdGfLin},
                                                            {"mdgf_exp", SparseMethod::kMdGfExp},
                                                            {"sdgf_step", SparseMethod::kSdGfStep},
                                                            {"sdgf_geo", SparseMethod::kSdGfGeo}};

template <typename T>
std::vector<std::string> keys_of(const std::map<std::string, T>& table) {
  std::vector<std::string> keys;
  for (const auto& entry : table) keys.push_back(entry.first);
  return keys;
}

template <typename T>
std::string key_of(const std::map<std::string, T>& table, T value) {
  return std::find_if(table.begin(), table.end(),
                      [value](const auto& entry) { return entry.second == value; })
      ->first;
}

std::vector<std::string> gate_words(Task task) {
  if (task == Task::kMulti) return {"single", "topk", "dselectk", "comet", "dense", "all"};
  return {"single", "hash", "oracle", "topk", "dselectk", "comet", "dense", "all"};
}

void look_up_search(const Words& words, const CLI::App& app, ProgramOptions& options) {
  SearchOptions& search = options.train.search;
  search.permutation.search(kSearches.at(words.perm_search)).scope(kScopes.at(words.perm_scope));
  const auto refuse = [&app](bool holds, const char* flag, const char* needs) {
    if (!holds && app.count(flag) > 0) {
      throw CLI::ValidationError(flag, std::string("needs --perm-search ") + needs);
    }
  };
  const bool any = words.perm_search != "none";
  const bool swaps = words.perm_search == "swap";
  for (const char* flag : {"--perm-scope", "--perm-until", "--perm-scramble"}) {
    refuse(any, flag, "sinkhorn or swap");
  }
  refuse(swaps, "--perm-interval", "swap");
  for (const char* flag : {"--perm-held-batches", "--perm-max-evaluations"}) {
    refuse(swaps || search.scramble > 0, flag, "swap, or --perm-scramble");
  }
  if (!any || search.permutation.scope() != gates::PermScope::kPerTree) return;
  // The layer says so as well, but of --gate all the first gates would have been trained by then.
  for (const GateKind gate : options.gates) {
    if (gate == GateKind::kComet || gate == GateKind::kDSelectK || gate == GateKind::kSingle) {
      continue;
    }
    throw CLI::ValidationError("--perm-scope",
                               std::string("per_tree needs gates with trees or selectors, dselectk "
                                           "or comet, but ") +
                                   gate_name(gate) + " has none; choose shared or per_gate");
  }
}

/// "1:8"
NmFrame parse_n_of_m(const std::string& text) {
  NmFrame frame;
  const size_t colon = text.find(':');
  const bool is_read = colon != std::string::npos &&
                       CLI::detail::lexical_cast(text.substr(0, colon), frame.n) &&
                       CLI::detail::lexical_cast(text.substr(colon + 1), frame.m);
  if (!is_read || frame.n < 1 || frame.n > frame.m || frame.m > kMany) {
    throw CLI::ValidationError("--dst-nm",
                               "value " + text + " is not N:M with 1 <= N <= M, such as 1:8");
  }
  return frame;
}

void look_up_sparsity(const Words& words, const CLI::App& app, ProgramOptions& options) {
  SparsityOptions& sparsity = options.train.sparsity;
  sparsity.method = kSparseMethods.at(words.dst);
  const bool any = sparsity.method != SparseMethod::kNone;
  if (any && options.task == Task::kMulti && options.experts == ExpertKind::kConv) {
    throw CLI::ValidationError("--dst",
                               words.dst + " needs --experts mlp: convolutions cannot be sparse");
  }
  const bool has_groups = keeps_n_of_m(sparsity.method);
  if (any && options.task == Task::kMulti && sparsity.method > SparseMethod::kNmDst) {
    throw CLI::ValidationError("--dst", words.dst + " needs --task domains");
  }
  if (sparsity.sparsity > 0 && (!any || has_groups)) {
    throw CLI::ValidationError("--sparsity", "needs --dst static, set or rigl");
  }
  if (sparsity.sparsity == 0 && any && !has_groups) {
    throw CLI::ValidationError("--dst", words.dst + " needs --sparsity above 0");
  }
  if (!has_groups && app.count("--dst-nm") > 0) {
    throw CLI::ValidationError("--dst-nm", "needs --dst nm_dst, srste, mdgf_* or sdgf_*");
  }
  sparsity.n_of_m = parse_n_of_m(words.dst_nm);
  for (const char* flag : {"--dst-every", "--dst-alpha"}) {
    if (!moves_masks(sparsity.method) && app.count(flag) > 0) {
      throw CLI::ValidationError(flag, "needs --dst set, rigl or nm_dst");
    }
  }
}

}  // namespace

void add_task_flags(CLI::App& app, Words& words) {
  app.add_option("--task", words.task,
                 "domains: the class of an image shown through one of 4 transforms; multi: the "
                 "classes of two images on one canvas, a gate for each; defaults of other flags "
                 "depend on it")
      ->check(one_of(keys_of(kTasks)))
      ->capture_default_str()
      ->group("Model");
  app.add_option("--protocol", words.protocol,
                 "of task multi: 30,000 samples and 8 epochs, or 100,000 and 200; defaults of "
                 "other flags depend on it")
      ->check(one_of(keys_of(kProtocols)))
      ->capture_default_str()
      ->group("Model");
}

void add_model_flags(CLI::App& app, ProgramOptions& options, Words& words) {
  TrainOptions& train = options.train;
  add_task_flags(app, words);
  words.experts = key_of(kExperts, options.experts);
  app.add_option("--experts", words.experts, "experts of task multi")
      ->check(one_of(keys_of(kExperts)))
      ->capture_default_str()
      ->group("Model");
  app.add_option("--gate", words.gate, "the gate; all runs each in turn and compares them")
      ->check(one_of(gate_words(options.task)))
      ->capture_default_str()
      ->group("Model");
  app.add_option("--num-experts", train.num_experts, "experts, over all ranks")
      ->check(in_range<int64_t>(1, 4096))
      ->capture_default_str()
      ->group("Model");
  app.add_option("--d-ff", train.d_ff,
                 "hidden units of an expert of task domains, with ReLU; 0: linear experts")
      ->check(in_range<int64_t>(0, 65536))
      ->capture_default_str()
      ->group("Model");
  app.add_flag("--pad-images", train.pad_images,
               "a frame of 2 black pixels, of task domains: 32 x 32, which groups of 32 need")
      ->group("Model");
  app.add_option("--moe-router-topk,--top-k", train.top_k,
                 "experts per image of the topk gate, selectors of dselectk, trees of comet")
      ->check(in_range<int64_t>(1, 4096))
      ->capture_default_str()
      ->group("Model");
  app.add_option("--moe-aux-loss-coeff,--aux-loss-coeff", train.aux_loss_coeff,
                 "coefficient of the load-balance loss; the protocol of this task has 0, and "
                 "others commonly use 0.01")
      ->check(in_range<double>(0, 1e6))
      ->capture_default_str()
      ->group("Model");
  app.add_option("--moe-z-loss-coeff,--z-loss-coeff", train.z_loss_coeff,
                 "coefficient of the z-loss of the router")
      ->check(in_range<double>(0, 1e6))
      ->capture_default_str()
      ->group("Model");
  app.add_option("--balance-coeff", train.balance_coeff,
                 "coefficient of the negative entropy of the mean weights, which keeps experts "
                 "from dying out")
      ->check(in_range<double>(0, 1e6))
      ->capture_default_str()
      ->group("Model");
  app.add_option("--gamma", train.gamma, "width of the switches of dselectk and comet")
      ->check(in_range<double>(1e-6, 1e6))
      ->capture_default_str()
      ->group("Model");
  app.add_option(
         "--entropy-coeff", train.entropy_coeff,
         "coefficient of the entropy of selectors and trees, which makes them choose one expert")
      ->check(in_range<double>(0, 1e6))
      ->capture_default_str()
      ->group("Model");
  app.add_option("--entropy-ramp", train.entropy_ramp,
                 "share of the run over which --entropy-coeff grows linearly from 0")
      ->check(in_range<double>(0, 1))
      ->capture_default_str()
      ->group("Model");
  app.add_flag("--hard-eval", train.hard_eval,
               "in the test each selector or tree takes its largest expert alone")
      ->group("Model");
  app.add_option("--moe-expert-capacity-factor,--capacity-factor", train.capacity_factor,
                 "room of an expert as a multiple of its fair share of the images of a rank; 0 "
                 "drops nothing")
      ->check(in_range<double>(0, 1e6))
      ->capture_default_str()
      ->group("Model");
  words.input_norm = train.input_norm ? "layer_norm" : "none";
  app.add_option("--input-norm", words.input_norm,
                 "what the gate reads: the pixels, or their layer norm / sqrt(pixels)")
      ->check(one_of({"none", "layer_norm"}))
      ->capture_default_str()
      ->group("Model");
  app.add_option("--dtype", words.dtype,
                 "type of experts and images; gates use float32 for bfloat16")
      ->check(one_of(keys_of(kDTypes)))
      ->capture_default_str()
      ->group("Model");
}

void add_search_flags(CLI::App& app, ProgramOptions& options, Words& words) {
  SearchOptions& search = options.train.search;
  app.add_option(
         "--perm-search", words.perm_search,
         "search over the order in which outputs of gates meet experts. sinkhorn: a relaxed "
         "order is trained with the model, then rounded; swap: exchanges are tried on held "
         "batches. The gate single has no order and ignores it")
      ->check(one_of({"none", "sinkhorn", "swap"}))
      ->capture_default_str()
      ->group("Search");
  app.add_option("--perm-scope", words.perm_scope,
                 "what has an order of its own: nothing, each gate, each tree or selector")
      ->check(one_of({"shared", "per_gate", "per_tree"}))
      ->capture_default_str()
      ->group("Search");
  app.add_option(
         "--perm-until", search.permutation.until(),
         "share of the run, at its start, in which the order is searched; it stays as it is "
         "from then on")
      ->check(in_range<double>(0, 1))
      ->capture_default_str()
      ->group("Search");
  app.add_option("--perm-held-batches", search.held_batches,
                 "batches of training images that swap compares orders on")
      ->check(in_range<int64_t>(1, kMany))
      ->capture_default_str()
      ->group("Search");
  app.add_option("--perm-max-evaluations", search.max_evaluations,
                 "of the loss on these batches in one search of swap")
      ->check(in_range<int64_t>(1, kMany))
      ->capture_default_str()
      ->group("Search");
  app.add_option("--perm-interval", search.interval,
                 "steps between two searches of swap; 0: once an epoch")
      ->check(in_range<int64_t>(0, kMany))
      ->capture_default_str()
      ->group("Search");
  app.add_option("--perm-scramble", search.scramble,
                 "after the training: times that the order is scrambled and searched again, to see "
                 "whether the search repairs it; results are those of the trained order")
      ->check(in_range<int64_t>(0, 1'000'000))
      ->capture_default_str()
      ->group("Search");
}

void add_sparsity_flags(CLI::App& app, ProgramOptions& options, Words& words) {
  SparsityOptions& sparsity = options.train.sparsity;
  app.add_option("--sparsity", sparsity.sparsity,
                 "share of the weights of experts that are kept at 0; biases and gates are dense")
      ->check(in_range<double>(0, 0.9999))
      ->capture_default_str()
      ->group("Sparsity");
  app.add_option(
         "--dst", words.dst,
         "which weights are 0. static: a random choice that stays; set: the smallest of both signs "
         "make room for random ones; rigl: for those with the largest gradients. Grown weights "
         "start with 0. The others keep N of M neighbours: nm_dst as rigl does; srste, mdgf_* and "
         "sdgf_* train all weights and compute with the largest")
      ->check(one_of({"none", "static", "set", "rigl", "nm_dst", "srste", "mdgf_lin", "mdgf_exp",
                      "sdgf_step", "sdgf_geo"}))
      ->capture_default_str()
      ->group("Sparsity");
  app.add_option("--dst-nm", words.dst_nm,
                 "N:M of nm_dst, srste, mdgf_* and sdgf_*; M divides the inputs of a weight")
      ->capture_default_str()
      ->group("Sparsity");
  app.add_option(
         "--dst-every", sparsity.every,
         "steps between two updates of set, rigl and nm_dst, up to three quarters of the run")
      ->check(in_range<int64_t>(1, kMany))
      ->capture_default_str()
      ->group("Sparsity");
  app.add_option(
         "--dst-alpha", sparsity.alpha,
         "share of the active weights that an update moves; of rigl and nm_dst at the start, "
         "it falls as a cosine")
      ->check(in_range<double>(0, 1))
      ->capture_default_str()
      ->group("Sparsity");
}

void add_training_flags(CLI::App& app, ProgramOptions& options) {
  TrainOptions& train = options.train;
  app.add_option("--lr", train.lr, "learning rate of Adam")
      ->check(in_range<double>(1e-12, 1e3))
      ->capture_default_str()
      ->group("Training");
  app.add_option("--adam-eps", train.adam_eps, "epsilon of Adam")
      ->check(in_range<double>(1e-30, 1))
      ->capture_default_str()
      ->group("Training");
  app.add_option("--gate-lr-factor", train.gate_lr_factor,
                 "learning rate of the gate as a multiple of --lr")
      ->check(in_range<double>(1e-6, 1e6))
      ->capture_default_str()
      ->group("Training");
  app.add_option("--lr-decay", train.lr_decay,
                 "share of the run, at its end, over which learning rates fall linearly to 0")
      ->check(in_range<double>(0, 1))
      ->capture_default_str()
      ->group("Training");
  app.add_option("--global-batch-size", train.global_batch_size, "images of a step, over all ranks")
      ->check(in_range<int64_t>(1, kMany))
      ->capture_default_str()
      ->group("Training");
  app.add_option("--epochs", train.epochs, "passes over the training images")
      ->check(in_range<int64_t>(1, kMany))
      ->capture_default_str()
      ->group("Training");
  app.add_option("--train-iters", train.train_iters, "steps, instead of --epochs; 0: use --epochs")
      ->check(in_range<int64_t>(0, kMany))
      ->capture_default_str()
      ->group("Training");
  app.add_option("--seed,--seeds", options.seeds,
                 "seeds of initial weights and order, one run for each")
      ->check(in_range<int64_t>(0, INT64_MAX))
      ->capture_default_str()
      ->group("Training");
  app.add_option("--data-seed", options.data_seed,
                 "seed of domains and pixel permutation, of splits and pairs")
      ->check(in_range<int64_t>(0, INT64_MAX))
      ->capture_default_str()
      ->group("Training");
  app.add_option(
         "--validation-images", options.validation_images,
         "of task domains, for choosing settings: test on the last N training images, train on "
         "the others")
      ->check(in_range<int64_t>(0, kMany))
      ->capture_default_str()
      ->group("Training");
  app.add_option("--data", options.data,
                 "folder with the four .gz files; default: $PERSEID_DATA_DIR/fashion-mnist, "
                 "/usr/share/datasets/fashion-mnist, ./data/fashion-mnist")
      ->group("Training");
}

void add_parallel_flags(CLI::App& app, ProgramOptions& options) {
  app.add_option("--comm", options.session.comm, "how ranks communicate; local: threads as ranks")
      ->check(one_of({"auto", "self", "local", "mpi", "tcp", "nccl"}))
      ->capture_default_str()
      ->group("Ranks");
  app.add_option("--local-ranks", options.session.local_ranks, "ranks of --comm local")
      ->check(in_range<int>(1, 256))
      ->capture_default_str()
      ->group("Ranks");
  app.add_option("--launcher", options.session.launcher, "what started this process")
      ->check(one_of({"auto", "mpi", "slurm", "torchrun", "single"}))
      ->capture_default_str()
      ->group("Ranks");
  app.add_option("--device", options.device,
                 "where tokens, model and optimizer are; auto: a GPU if there is one")
      ->check(one_of({"auto", "cpu", "cuda"}))
      ->capture_default_str()
      ->group("Ranks");
  app.add_option("--expert-model-parallel-size,--ep-size", options.train.ep_size,
                 "ranks that share the experts, a divisor of their number; 0: all ranks")
      ->check(in_range<int64_t>(0, 1 << 20))
      ->capture_default_str()
      ->group("Ranks");
  app.add_option("--idle-ranks", options.train.idle_ranks,
                 "the last ranks get no images, but hold experts")
      ->check(in_range<int64_t>(0, 1 << 20))
      ->capture_default_str()
      ->group("Ranks");
  app.add_option("--threads", options.threads,
                 "threads of a rank; the steps are so small that more hardly help; 0: cores / "
                 "ranks of the host")
      ->check(in_range<int64_t>(0, 1024))
      ->capture_default_str()
      ->group("Ranks");
}

void add_output_flags(CLI::App& app, ProgramOptions& options) {
  app.add_option("--log-interval", options.train.log_interval, "steps between two progress lines")
      ->check(in_range<int64_t>(1, kMany))
      ->capture_default_str()
      ->group("Output");
  app.add_option("--json", options.json, "file for the results, one JSON object a line and run")
      ->group("Output");
  app.add_option("--dump", options.dump,
                 "file for the losses of all steps and all weights of one run, as JSON")
      ->group("Output");
  app.add_flag("--plain", options.plain, "no line that is written over on a terminal")
      ->group("Output");
}

void look_up_task(const Words& words, ProgramOptions& options) {
  options.task = kTasks.at(words.task);
  options.protocol = kProtocols.at(words.protocol);
}

void look_up(const Words& words, const CLI::App& app, ProgramOptions& options) {
  const bool multi = options.task == Task::kMulti;
  const auto refuse = [&app](const char* flag, const char* task) {
    if (app.count(flag) > 0) throw CLI::ValidationError(flag, std::string("needs --task ") + task);
  };
  if (multi) {
    for (const char* flag : {"--validation-images", "--d-ff", "--pad-images"}) {
      refuse(flag, "domains");
    }
  } else {
    refuse("--protocol", "multi");
    refuse("--experts", "multi");
  }
  options.gates = (multi ? kMultiGates : kGates).at(words.gate);
  options.experts = kExperts.at(words.experts);
  options.train.input_norm = words.input_norm == "layer_norm";
  options.train.dtype = kDTypes.at(words.dtype);
  look_up_search(words, app, options);
  look_up_sparsity(words, app, options);
}

}  // namespace perseid::examples
