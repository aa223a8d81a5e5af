#pragma once
#include "moe/sparse_criteria.h"
#include "moe/sparse_linear.h"
#include "tests/moe/sparse_fixture.h"

// What tests of criteria share.

namespace perseid::testing {

inline SparsifierConfig config_of(DropCriterion drop, GrowCriterion grow, int64_t every = 10) {
  SparsifierConfig config;
  config.budget.distribution = Distribution::kUniform;
  config.budget.density = 0.4;
  config.rule.drop = drop;
  config.rule.grow = grow;
  config.schedule.every = every;
  config.schedule.begin = every - 1;
  config.schedule.end = 90;
  config.min_rows = 0;
  return config;
}

inline SparseLinear linear_of(int64_t in, int64_t out, at::ScalarType type = at::kDouble,
                              int64_t expert = 0) {
  return SparseLinear(
      SparseLinearOptions(in, out).bias(false).dtype(type).key({0, expert, Matrix::kWeight}));
}

/// The gradient of the product x (W * mask)^T by W * mask, at all entries.
inline at::Tensor dense_gradient(const at::Tensor& x, const at::Tensor& delta) {
  return delta.t().mm(x);
}

inline at::Tensor at_positions(const PackedMask& positions, const at::Tensor& values) {
  const at::Tensor flags = at::zeros({positions.rows(), positions.cols()}, at::kBool);
  for (int64_t p = 0; p < positions.num_places(); ++p) {
    if (positions.test(p)) flags.view({-1})[p].fill_(true);
  }
  return values.masked_select(flags).unsqueeze(0);
}

/// What the update of `step` will look at.
inline PackedMask candidates_of(const Sparsifier& sparsifier, const UnitKey& key, int64_t step) {
  const SparsifierConfig& config = sparsifier.config();
  return draw_candidates(sparsifier.layout(key), config.rule, sparsifier.mask(key),
                         drop_fraction(config.schedule, static_cast<double>(step)),
                         draw_key(config.seed, step, key, UnitDraw::kCandidates));
}

}  // namespace perseid::testing
