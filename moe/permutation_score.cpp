#include "moe/permutation_score.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "kernels/assignment.h"

namespace perseid {
namespace {

void add(const at::Tensor& product, std::vector<double>& sum) {
  const at::Tensor values = product.to(at::kCPU).contiguous();
  const double* const value = values.const_data_ptr<double>();
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += value[i];
}

/// Score of a place, NaN if it is not known.
double at(const ScoreMatrix& matrix, int64_t output, int64_t expert, int64_t num_experts) {
  const auto i = static_cast<size_t>(output * num_experts + expert);
  return matrix.unseen[i] > 0 ? std::numeric_limits<double>::quiet_NaN() : matrix.score[i];
}

auto order_of(const PermutationCandidate& c) {
  const bool unscored = std::isnan(c.predicted);
  // Several units come before one.
  return std::make_tuple(unscored, unscored ? 0.0 : c.predicted, c.rows.size() == 1,
                         c.rows.front().first, c.a, c.b);
}
bool comes_first(const PermutationCandidate& x, const PermutationCandidate& y) {
  return order_of(x) < order_of(y);
}

/// Appends the assignment of least sum of the unit, if it is another order.
void add_assignment(const ScoreMatrix& matrix, size_t unit, const std::vector<int32_t>& row,
                    std::vector<PermutationCandidate>& candidates) {
  const auto E = static_cast<int64_t>(row.size());
  const auto is_known = [](double unseen) { return unseen == 0; };
  const auto is_finite = [](double score) { return std::isfinite(score); };
  if (!std::all_of(matrix.unseen.begin(), matrix.unseen.end(), is_known)) return;
  if (!std::all_of(matrix.score.begin(), matrix.score.end(), is_finite)) return;
  std::vector<int32_t> best(row.size());
  kernels::assign({E, E}, matrix.score.data(), nullptr, best.data());
  if (best == row) return;
  PermutationCandidate candidate;
  for (int64_t l = 0; l < E; ++l) {
    candidate.predicted += at(matrix, l, best[static_cast<size_t>(l)], E) -
                           at(matrix, l, row[static_cast<size_t>(l)], E);
  }
  candidate.rows.emplace_back(unit, std::move(best));
  candidates.push_back(std::move(candidate));
}

/// All assignments at once, if there are several.
void add_joint(std::vector<PermutationCandidate>& assignments) {
  if (assignments.size() < 2) return;
  PermutationCandidate joint;
  for (const PermutationCandidate& one : assignments) {
    joint.predicted += one.predicted;
    joint.rows.push_back(one.rows.front());
  }
  assignments.push_back(std::move(joint));
}

}  // namespace

void add_scores(const at::Tensor& weights, const at::Tensor& grads, const at::Tensor& is_seen,
                ScoreMatrix& matrix) {
  const at::Tensor by_output = weights.to(at::kDouble).t();
  add(by_output.mm(grads.to(at::kDouble)), matrix.score);
  if (!is_seen.defined()) return;
  add(by_output.ne(0).to(at::kDouble).mm(is_seen.logical_not().to(at::kDouble)), matrix.unseen);
}

std::vector<PermutationCandidate> best_candidates(const std::vector<ScoreMatrix>& matrices,
                                                  const std::vector<std::vector<int32_t>>& rows,
                                                  int64_t count) {
  std::vector<PermutationCandidate> candidates;
  for (size_t u = 0; u < rows.size(); ++u) add_assignment(matrices[u], u, rows[u], candidates);
  add_joint(candidates);
  for (size_t u = 0; u < rows.size(); ++u) {
    const std::vector<int32_t>& row = rows[u];
    const auto E = static_cast<int64_t>(row.size());
    for (int64_t a = 0; a < E; ++a) {
      for (int64_t b = a + 1; b < E; ++b) {
        const int32_t m = row[static_cast<size_t>(a)], n = row[static_cast<size_t>(b)];
        PermutationCandidate candidate;
        candidate.rows.emplace_back(u, std::vector<int32_t>());
        candidate.a = a;
        candidate.b = b;
        candidate.predicted = at(matrices[u], a, n, E) + at(matrices[u], b, m, E) -
                              at(matrices[u], a, m, E) - at(matrices[u], b, n, E);
        candidates.push_back(std::move(candidate));
      }
    }
  }
  const auto kept = std::min(candidates.size(), static_cast<size_t>(std::max<int64_t>(count, 0)));
  std::partial_sort(candidates.begin(), candidates.begin() + static_cast<ptrdiff_t>(kept),
                    candidates.end(), comes_first);
  candidates.resize(kept);
  for (PermutationCandidate& candidate : candidates) {
    auto& [unit, row] = candidate.rows.front();
    if (!row.empty()) continue;
    row = rows[unit];
    std::swap(row[static_cast<size_t>(candidate.a)], row[static_cast<size_t>(candidate.b)]);
  }
  return candidates;
}

}  // namespace perseid
