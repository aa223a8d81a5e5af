#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "comm/group.h"
#include "examples/train_fashion/domains.h"
#include "gates/expert_permutation.h"
#include "kernels/dtype.h"
#include "kernels/stream.h"
#include "moe/soft_mask.h"

namespace perseid::examples {

enum class GateKind : uint8_t { kSingle, kHash, kOracle, kTopK, kDSelectK, kComet, kDense };
const char* gate_name(GateKind gate);

/// Search over the order in which outputs of gates meet experts.
struct SearchOptions {
  gates::PermutationOptions permutation;  ///< its seed is that of the run
  int64_t held_batches = 4;      ///< that orders are compared on, each of global_batch_size images
  int64_t max_evaluations = 64;  ///< of the held loss in one search
  int64_t interval = 0;          ///< steps between two searches of kSwap; 0: an epoch
  int64_t scramble = 0;          ///< trials of a repair after the training
};

/// Presets of moe/sparse_presets.h; those from kNmDst on keep N of M neighbours.
enum class SparseMethod : uint8_t {
  kNone,
  kStatic,
  kSet,
  kRigl,
  kNmDst,
  kSrSte,
  kMdGfLin,
  kMdGfExp,
  kSdGfStep,
  kSdGfGeo,
};
bool keeps_n_of_m(SparseMethod method);
bool moves_masks(SparseMethod method);  ///< by updates

/// Weights of experts that are kept at 0, and which.
struct SparsityOptions {
  double sparsity = 0;  ///< share of 0, in [0, 1); not of methods that keep N of M
  SparseMethod method = SparseMethod::kNone;
  int64_t every = 100;  ///< steps between two updates of the masks
  double alpha = 0.3;   ///< share of the other weights that an update moves
  NmFrame n_of_m = {1, 8};
};

inline constexpr int64_t kImageFrame = 2;  ///< pixels on each side, of pad_images

/// Settings of one run; defaults are the recipe of README.md.
struct TrainOptions {
  GateKind gate = GateKind::kTopK;
  int64_t num_experts = 8;
  int64_t d_ff = 0;         ///< hidden units of an expert; 0: linear experts
  bool pad_images = false;  ///< a frame of 2 black pixels: 1024 of them, which groups of 32 need
  int64_t top_k = 2;
  double aux_loss_coeff = 0;
  double z_loss_coeff = 0;
  double balance_coeff = 0.25;  ///< of gates::balance_entropy_loss, for gates with weights to train
  double gamma = 1;             ///< width of the switches of DSelect-k and COMET
  double entropy_coeff = 1;     ///< pulls their selectors and trees to one expert
  double entropy_ramp = 0.5;    ///< share of the run over which entropy_coeff grows from 0
  bool input_norm = true;       ///< the gate reads LayerNorm(x) / sqrt(D); false: the pixels x
  bool hard_eval = false;       ///< in the test each selector and tree takes one expert
  double capacity_factor = 0;   ///< 0: dropless
  kernels::DType dtype = kernels::DType::kFloat32;
  kernels::Device device = kernels::Device::kCpu;  ///< cuda: the current one of the calling thread
  double lr = 8e-3;
  double adam_eps = 1e-8;
  double gate_lr_factor = 2;        ///< the gate's learning rate is this times lr
  double lr_decay = 0.5;            ///< share of the run, at its end, over which both fall to 0
  int64_t global_batch_size = 256;  ///< images of a step, over all ranks
  int64_t epochs = 6;
  int64_t train_iters = 0;     ///< 0: as many steps as `epochs` take
  uint64_t seed = 0;           ///< initial weights and order of the images
  int64_t ep_size = 0;         ///< ranks that share the experts; 0: all
  int64_t idle_ranks = 0;      ///< the last ranks that get no images
  int64_t log_interval = 100;  ///< steps between two reports
  SearchOptions search;
  SparsityOptions sparsity;

  int64_t image_pixels() const;  ///< that gate and experts read
};

/// Parameters of the whole model and those that one image meets; of
/// DSelect-k and COMET, once their switches have become hard.
struct ParameterCount {
  int64_t total = 0;
  int64_t active = 0;
};
ParameterCount count_parameters(const TrainOptions& options);

/// Learning rate of the experts after the share `progress` of the run: lr, then a straight line to
/// 0 over the last lr_decay of it.
double learning_rate(const TrainOptions& options, double progress);

/// Steps of a run: train_iters, or epochs without their last incomplete batch.
int64_t num_steps(const TrainOptions& options, int64_t num_images);

/// A scrambled order and what the search made of it.
struct RepairTrial {
  double scrambled_loss = 0;  ///< held loss
  double loss = 0;            ///< held loss after the search
  int64_t evaluations = 0;
  bool is_recovered = false;  ///< at most 1e-6 above the held loss of the trained order
};

/// What a search over orders did; the same on every rank.
struct SearchResult {
  int64_t searches = 0;                    ///< of kSwap
  int64_t evaluations = 0;                 ///< of the held loss, in all of them
  int64_t moves = 0;                       ///< accepted in all of them
  double loss_before = 0;                  ///< held loss before the last search
  double loss_after = 0;                   ///< and after it
  double seconds = 0;                      ///< of all searches
  std::vector<std::vector<int64_t>> maps;  ///< of each permutation [units * E], at the end
  std::vector<int64_t> changed;  ///< of each permutation, places that differ from 0 .. E-1 there
  double trained_loss = 0;       ///< held loss of the trained order, where there are repairs
  std::vector<RepairTrial> repairs;

  bool is_used() const { return !maps.empty(); }
};

/// Masks at the end of a run; the same on every rank.
struct SparsityResult {
  int64_t nnz = 0;  ///< active weights of all experts
  int64_t size = 0;
  int64_t num_updates = 0;  ///< of matrices
  int64_t num_skipped = 0;
  double churn = 0;      ///< mean share of the active weights that an update moved
  double itop_rate = 0;  ///< share of the weights that were active at any time

  bool is_used() const { return size > 0; }
  double density() const {
    return size > 0 ? static_cast<double>(nnz) / static_cast<double>(size) : 0;
  }
};

struct NamedValue {
  std::string name;
  double value = 0;
};

/// Means since the last report; the same on every rank.
struct StepReport {
  int64_t step = 0;  ///< steps done
  int64_t num_steps = 0;
  double cross_entropy = 0;
  std::vector<NamedValue> gate_losses;     ///< without their coefficients
  std::vector<int64_t> tokens_per_expert;  ///< [E]
  double experts_per_token = 0;            ///< experts with a weight
  double max_vio = 0;                      ///< largest load / mean load - 1
  int64_t num_dropped = 0;                 ///< assignments lost to capacity
  double step_ms = 0;
  double tokens_per_second = 0;
  SearchResult search;  ///< so far
};
/// Called on every rank, after step 1, every log_interval steps and after the last one.
using OnReport = std::function<void(const StepReport&)>;

/// A parameter in global expert order, whatever the number of ranks.
struct WeightDump {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<double> values;
};

/// Which ways images take through the trees of a COMET gate; nodes in its heap order, leaves among
/// them (nodes E-1 and following). A tree reaches a node if its weight there is above 0.
struct TreeCounts {
  int64_t num_trees = 0;         ///< K; 0: the gate has no trees
  std::vector<int64_t> reached;  ///< [K, 2E-1, domains] images that reach the node
  std::vector<int64_t> left;     ///< [K, E-1] of these, those that go left with all their weight
  std::vector<int64_t> right;    ///< [K, E-1] the same to the right; the others take both ways
};

/// What a run gives; the same on every rank.
struct RunResult {
  int64_t num_steps = 0;
  double accuracy = 0;  ///< on the test images, after the last step
  double cross_entropy = 0;
  double experts_per_token = 0;            ///< mean count of gate weights > 1e-5
  std::vector<double> domain_expert;       ///< [domains, E] mean weight of the gate
  double domain_nmi = 0;                   ///< I(domain; expert) / ln 4 of the summed gate weights
  double max_vio = 0;                      ///< largest load / mean load - 1 over the test images
  std::vector<int64_t> tokens_per_expert;  ///< [E] of the test images
  TreeCounts trees;                        ///< of COMET, over the test images
  std::vector<StepReport> curve;  ///< means over at most 50 pieces of the training, in order
  double rows_per_token = 0;      ///< rows that experts processed for an image, all training
  SearchResult search;
  SparsityResult sparsity;
  double seconds = 0;  ///< of training, searches included: without loading and testing
  double seconds_per_epoch = 0;
  std::vector<double> losses;  ///< of every step: cross-entropy + losses of the gate
  std::vector<WeightDump> weights;
};

/// Trains and tests one model. Collective over `world`: every rank calls it with equal arguments.
/// The batch of a step is cut into contiguous shards, one per rank, so the images of a step and
/// every result are those of one process.
/// Throws ConfigError for settings out of range, and what MoELayer::forward throws.
RunResult train_domains(const comm::Group& world, const DomainData& data,
                        const TrainOptions& options, const OnReport& on_report = {});

}  // namespace perseid::examples
