#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/random.h"
#include "moe/sparse_mask.h"

// Neuron ablation (SRigL, Lasby et al. 2024) of weights with constant fan-in: a row in which hardly
// any important weight lies loses all of its weights to the others. Pure functions.

namespace perseid {

/// When weights go that read a hidden unit which is always 0, because its row is ablated.
enum class FreeColumns : uint8_t {
  kAtEnd,  ///< in the schedule's end step, when masks freeze; until then the row may come back
  kNow,    ///< by the next update of their matrix, that of the same step included
};

struct Ablation {
  /// Salient weights that a row needs to stay: below 1 this share of the fan-in, rounded down and
  /// at least 1; else the number itself. 0: no ablation.
  double gamma = 0;
  FreeColumns free_columns = FreeColumns::kAtEnd;
  /// What the rows left cannot share equally: false, the first of them have one weight more each;
  /// true, it is lost for good, as in SRigL's code, and saved masks may have any smaller number.
  bool loses_rest = false;
  /// Patterns of names (* stands for any text) of weights whose rows all stay, as a network's last
  /// layer; each fits one. An expert's w2 always does: its rows are no hidden units.
  std::vector<std::string> kept;

  bool is_on() const { return gamma > 0; }
};

/// Throws ConfigError that names the field.
void validate(const Ablation& ablation);

/// [out] active entries of each row when rows_left share `count`, in [rows left, rows left * in].
std::vector<int64_t> share_among_rows(const std::vector<bool>& is_left, int64_t count,
                                      bool loses_rest);
/// Whether these could come from share_among_rows.
bool are_shared(const std::vector<int64_t>& counts, bool loses_rest);

struct AblationInput {
  const PackedMask* active = nullptr;  ///< [out, in], at least one entry
  const float* drop_scores = nullptr;  ///< [out, in] read at active entries: |w|
  const float* grow_scores = nullptr;  ///< [out, in] read everywhere: magnitudes of the gradient
  double fraction = 0;                 ///< of the update that follows
  kernels::RandomKey drop_key, grow_key;
};
struct RowsLeft {
  std::vector<int64_t> counts;   ///< [out] active entries of each row afterwards; 0: ablated
  std::vector<int64_t> salient;  ///< [out] salient ones now
  int64_t threshold = 0;         ///< that a row's salient ones had to reach
  int64_t num_non_finite = 0;    ///< NaN and infinite scores; then nothing else is to be used
};

/// Of n active entries d = floor(fraction n) will be dropped. Salient is an active entry that is
/// not among the d smallest, or any entry among the d largest gradients, of which none is 0. Rows
/// below the threshold are ablated, those above it stay or come back; it is lowered where fewer
/// rows than can hold n entries would reach it. 0 after that: all rows stay, at most n.
RowsLeft ablate_rows(const Ablation& ablation, const AblationInput& input);

}  // namespace perseid
