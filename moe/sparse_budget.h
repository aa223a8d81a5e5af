#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace perseid {

/// Share of positions that are active, in (0, 1], as an exact ratio: 0.1 is 1/10. Never 1 minus
/// something, which rounds. Throws ConfigError outside (0, 1].
class Density {
 public:
  Density() = default;  ///< 1
  // NOLINTNEXTLINE(google-explicit-constructor): budget.density = 0.1 is meant to work.
  Density(double density);  ///< the simplest ratio that this double stands for
  static Density ratio(int64_t numerator, int64_t denominator);

  int64_t numerator() const { return numerator_; }
  int64_t denominator() const { return denominator_; }
  double value() const {
    return static_cast<double>(numerator_) / static_cast<double>(denominator_);
  }
  /// round(density * count), halves up, without an intermediate rounding.
  int64_t of(int64_t count) const;
  friend bool operator==(const Density&, const Density&) = default;

 private:
  int64_t numerator_ = 1;
  int64_t denominator_ = 1;
};

/// How a global number of active weights is shared by the units. `size` is out * in.
enum class Distribution : uint8_t {
  kUniform,  ///< in proportion to size
  kEr,       ///< to out + in (Erdos-Renyi)
  kErk,      ///< to size * ((out + in) / size)^power; power 1 is kEr, power 0 is kUniform
  kEpsilon,  ///< size * (1 - exp(-epsilon (out + in) / size)) each: what SET's code draws on
             ///< average
  kCustom,   ///< density by name
  /// As kUniform at first; then updates move weights between units, as their scores say: one
  /// selection over all.
  kGlobal,
  kLoad,  ///< to size * (rows of the unit / mean rows)^load_power; as kUniform at first
};

struct CustomDensity {
  std::string pattern;  ///< of names, * stands for any text
  Density density;
};

/// Whether the whole text fits; * stands for any text.
bool fits_pattern(const std::string& pattern, const std::string& text);

struct Budget {
  Distribution distribution = Distribution::kErk;
  Density density;     ///< of all units together; kCustom: of those that no pattern names
  double power = 1;    ///< kErk
  double epsilon = 0;  ///< kEpsilon, > 0
  std::vector<CustomDensity> custom;  ///< the first pattern that fits a name counts
  double load_power = 0;              ///< kLoad, in [0, 1]
  int64_t realloc_every = 1;          ///< kLoad: updates from one sharing to the next
  /// Least and largest density of each unit. N:M has its own.
  std::optional<Density> floor;  ///< none: one atom for each row of atoms
  Density ceiling;
};

struct BudgetUnit {
  std::string name;
  int64_t out = 0;
  int64_t in = 0;
  int64_t granule = 1;   ///< the number is a multiple of it
  int64_t floor = 0;     ///< least number
  int64_t ceiling = -1;  ///< largest number; -1: out * in
  double load = 1;       ///< kLoad: its rows / mean rows of all
};

struct Allocation {
  std::vector<int64_t> nnz;  ///< of each unit
  /// round(density * sum of sizes) minus the sum of nnz, which is a multiple of the granules: up to
  /// half a granule either way if all are equal, else below the smallest. 0 for kEpsilon and
  /// kCustom, where each unit is rounded by itself.
  int64_t rest = 0;
};

/// Exact integers: floor to granules, then those with the largest remainders get one more, equal
/// ones in the order of the units; what floors and ceilings take from a unit or give it, the others
/// share in proportion. A unit whose share would exceed its size is dense.
/// Throws ConfigError that names unit and numbers if no allocation keeps all floors and ceilings.
/// @param units  in the order of their keys, which then settles ties alike on all ranks
Allocation allocate(const Budget& budget, const std::vector<BudgetUnit>& units);

/// What allocate shares out: density * sum of sizes, rounded to a multiple of the granules if all
/// are equal.
int64_t number_of_weights(const Density& density, const std::vector<BudgetUnit>& units);

}  // namespace perseid
