#pragma once
#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "moe/moe_layer.h"

namespace perseid {

/// Which experts run on held tokens so that exchanges can be scored.
enum class Probe : uint8_t {
  /// All, on max_probe_tokens of each held batch; from then on those that an order selects, each
  /// once for a token: its outputs are kept.
  kAll,
  /// Those that gates select: no dense pass, but exchanges stay unscored where a token would meet
  /// an expert that has not seen it, and each evaluation runs experts.
  kSelected,
};

struct PermutationSearchOptions {
  int64_t max_evaluations = 64;      ///< of the held loss, that of the order at the start included
  int64_t candidates_per_round = 8;  ///< evaluated in a round, the best ones by score
  /// An order is taken if its loss is lower by more than this share of the present one.
  double min_relative_gain = 1e-6;
  /// With one unit of at most so many experts, and max_evaluations of at least their factorial, all
  /// orders are tried.
  int64_t exhaustive_up_to = 6;
  Probe probe = Probe::kAll;
  /// kAll: scores are estimated from so many tokens of a held batch, evenly spread over all ranks,
  /// or from all if there are fewer. Evaluations are exact all the same.
  int64_t max_probe_tokens = 1024;
  /// Of kept outputs of experts on one rank, for each layer and held batch: T E d_out elements.
  int64_t max_bytes = int64_t{1} << 30;
};

/// An order that was taken: expert_map[unit] of a permutation changed, by an exchange of the
/// experts of outputs a and b, or as a whole (a = b = -1); or those of several units at once (unit
/// = -1; layer and permutation are those of the first).
struct PermutationMove {
  size_t layer = 0;        ///< place in PermutationSearch::layers()
  size_t permutation = 0;  ///< place in MoELayer::permutations()
  int64_t unit = 0;
  int64_t a = -1;
  int64_t b = -1;
  double predicted = 0;  ///< change of the held loss to first order; NaN: not scored
  double actual = 0;     ///< change of the held loss
};

struct PermutationReport {
  int64_t evaluations = 0;
  int64_t rounds = 0;
  double loss_before = 0;  ///< mean over held batches of the sum over ranks
  double loss_after = 0;
  std::vector<PermutationMove> moves;  ///< in the order in which they were made
};

/// Discrete local search over the order in which outputs of gates meet experts, for every layer of
/// a model whose options have a permutation. An exchange of two experts changes numbers in a table
/// alone. Useful after experts or gates were loaded, copied from a dense model, merged or
/// re-ordered; from an order that the experts have trained with there is little to gain.
///
/// A round scores all exchanges from one backward. With w[t, l] the weight of output l before it
/// meets an expert and r[t, m] = <dL/dy_t, f_m(x_t)>,
///   M[l, m] = sum over tokens of w[t, l] r[t, m]        in double, one product for each unit
///   score of (a, b) = M[a, map b] + M[b, map a] - M[a, map a] - M[b, map b]
/// ranks the exchanges and the order of least sum M[l, map l], a linear assignment, of each unit
/// and of all at once. The score is the change to first order, so it never decides: the best
/// candidates are evaluated on the held batches, and the lowest loss is taken if it is lower than
/// the present one. Deterministic; all ranks decide alike, from sums in rank order.
class PermutationSearch {
 public:
  /// Local loss of one held batch: its sum over ranks is the loss, see moe/gradients.h. It runs the
  /// model once, in evaluation mode, with the same tokens at each call, and leaves out the losses
  /// of gates; every rank calls it, those without tokens as well.
  using HeldLoss = std::function<at::Tensor(size_t batch)>;

  /// @param model  its layers with a permutation are searched; must outlive the search
  /// Throws ConfigError if there is none, and for options out of range.
  explicit PermutationSearch(torch::nn::Module& model, PermutationSearchOptions options = {});

  /// Collective over the world of the layers. Parameters, gradients, optimiser states, other
  /// buffers and the random streams of LibTorch stay as they are. If it throws, the order is the
  /// best one found until then. Throws ConfigError without held batches or if a batch does not run
  /// each layer exactly once, Diverged on every rank if the loss of the present order is not
  /// finite.
  PermutationReport search_now(size_t num_batches, const HeldLoss& held_loss);

  /// M / num_batches of every unit, by layer, permutation and unit: [E, E] float64 by output and
  /// expert, NaN where it is not known. What a search would do first; collective as search_now.
  std::vector<at::Tensor> scores(size_t num_batches, const HeldLoss& held_loss);

  const std::vector<std::shared_ptr<MoELayer>>& layers() const { return layers_; }

 private:
  void require_batches(size_t num_batches, const HeldLoss& held_loss) const;

  torch::nn::Module& model_;
  PermutationSearchOptions options_;
  std::vector<std::shared_ptr<MoELayer>> layers_;
};

}  // namespace perseid
