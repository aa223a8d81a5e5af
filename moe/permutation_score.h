#pragma once
#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

// Internal: which changes of an order of experts promise most, see moe/permutation_search.h.

namespace perseid {

/// One row of an expert map.
struct PermutationUnit {
  size_t layer = 0;
  size_t permutation = 0;
  int64_t unit = 0;
};

/// M of a unit, [E, E] row-major: output, expert.
struct ScoreMatrix {
  explicit ScoreMatrix(int64_t num_experts)
      : score(static_cast<size_t>(num_experts * num_experts)), unseen(score.size()) {}
  std::vector<double> score;
  /// Of tokens with a weight for the output that the expert has not run for; above 0: the score is
  /// not known. In double, so that both are one buffer to sum over ranks.
  std::vector<double> unseen;
};

/// Adds the tokens of a batch.
/// @param weights  [T, E] by output, of one unit
/// @param grads    [T, E] r by expert, 0 where not known
/// @param is_seen  [T, E] bool; undefined: all are known
void add_scores(const at::Tensor& weights, const at::Tensor& grads, const at::Tensor& is_seen,
                ScoreMatrix& matrix);

struct PermutationCandidate {
  /// New rows of the map, [E], by place in the list of units; more than one: the best assignments
  /// of all units at once.
  std::vector<std::pair<size_t, std::vector<int32_t>>> rows;
  int64_t a = -1, b = -1;  ///< outputs whose experts are exchanged; -1: an assignment
  double predicted = 0;    ///< NaN: not scored
};

/// The best `count` of these, by score, then unit, a, b, those without a score last: exchanges in
/// each unit; for each unit whose scores are all known the assignment of least sum, unless it is
/// the present one; and if several units have one, all of these at once.
/// @param rows  present row of each unit, [E]
std::vector<PermutationCandidate> best_candidates(const std::vector<ScoreMatrix>& matrices,
                                                  const std::vector<std::vector<int32_t>>& rows,
                                                  int64_t count);

}  // namespace perseid
