#include "moe/sparse_budget.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/error.h"

namespace perseid {
namespace {

constexpr const char* kSparseBudget = "sparse_budget";
__extension__ using Wide = __int128;

/// Granules of one unit.
struct Share {
  double weight = 0;  ///< its share of the global number is in proportion to it
  int64_t lowest = 0;
  int64_t highest = 0;
  double target = 0;
  bool is_fixed = false;
};

bool matches(const char* pattern, const char* text) {
  if (*pattern == '\0') return *text == '\0';
  if (*pattern == '*')
    return matches(pattern + 1, text) || (*text != '\0' && matches(pattern, text + 1));
  return *pattern == *text && matches(pattern + 1, text + 1);
}

double size_of(const BudgetUnit& unit) {
  return static_cast<double>(unit.out) * static_cast<double>(unit.in);
}
double edges_of(const BudgetUnit& unit) { return static_cast<double>(unit.out + unit.in); }

double weight_of(const Budget& budget, const BudgetUnit& unit) {
  const double size = size_of(unit);
  switch (budget.distribution) {
    case Distribution::kEr:
      return edges_of(unit);
    case Distribution::kErk:
      return size * std::pow(edges_of(unit) / size, budget.power);
    case Distribution::kLoad:
      // Not 0: if all others are full, those without rows share the rest by size.
      return size * std::max(1e-12, std::pow(unit.load, budget.load_power));
    default:
      return size;
  }
}

void check(const Budget& budget, const std::vector<BudgetUnit>& units) {
  require(std::isfinite(budget.power) && budget.power >= 0, kSparseBudget, "power", budget.power,
          "is not a finite number of 0 or more");
  if (budget.distribution == Distribution::kEpsilon) {
    require(std::isfinite(budget.epsilon) && budget.epsilon > 0, kSparseBudget, "epsilon",
            budget.epsilon, "is not a finite number above 0");
  }
  require(budget.load_power >= 0 && budget.load_power <= 1, kSparseBudget, "load_power",
          budget.load_power, "is outside [0, 1]");
  require(budget.realloc_every >= 1, kSparseBudget, "realloc_every", budget.realloc_every,
          "is below 1");
  for (const BudgetUnit& unit : units) {
    const auto fail = [&](const char* argument, int64_t value, const std::string& limit) {
      throw ConfigError(ErrorDetail{kSparseBudget, std::string(argument) + " of " + unit.name,
                                    to_text(value), limit});
    };
    if (unit.out < 1) fail("out", unit.out, "is below 1");
    if (unit.in < 1) fail("in", unit.in, "is below 1");
    if (unit.granule < 1) fail("granule", unit.granule, "is below 1");
    const int64_t size = unit.out * unit.in;
    if (unit.granule > size) {
      fail("granule", unit.granule, "exceeds size=" + to_text(size) + "; choose smaller atoms");
    }
    if (unit.ceiling > size) fail("ceiling", unit.ceiling, "exceeds size=" + to_text(size));
    if (!std::isfinite(unit.load) || unit.load < 0) {
      throw ConfigError(ErrorDetail{kSparseBudget, "load of " + unit.name, to_text(unit.load),
                                    "is not a finite number of 0 or more"});
    }
  }
}

Share bounds_of(const BudgetUnit& unit) {
  const int64_t ceiling = unit.ceiling < 0 ? unit.out * unit.in : unit.ceiling;
  Share share;
  share.lowest = (std::max<int64_t>(unit.floor, 0) + unit.granule - 1) / unit.granule;
  share.highest = ceiling / unit.granule;
  if (share.lowest > share.highest) {
    throw ConfigError(ErrorDetail{kSparseBudget, "floor of " + unit.name, to_text(unit.floor),
                                  "leaves no multiple of granule=" + to_text(unit.granule) +
                                      " up to ceiling=" + to_text(ceiling)});
  }
  return share;
}

/// Units that are rounded by themselves.
int64_t own_number(const BudgetUnit& unit, double real) {
  const Share share = bounds_of(unit);
  const auto granules =
      static_cast<int64_t>(std::llround(real / static_cast<double>(unit.granule)));
  return std::clamp(granules, share.lowest, share.highest) * unit.granule;
}

std::vector<int64_t> custom_numbers(const Budget& budget, const std::vector<BudgetUnit>& units) {
  std::vector<bool> is_used(budget.custom.size(), false);
  std::vector<int64_t> nnz;
  for (const BudgetUnit& unit : units) {
    Density density = budget.density;
    bool is_found = false;
    for (size_t i = 0; i < budget.custom.size(); ++i) {
      if (!fits_pattern(budget.custom[i].pattern, unit.name)) continue;
      is_used[i] = true;
      if (!is_found) density = budget.custom[i].density;
      is_found = true;
    }
    nnz.push_back(own_number(unit, static_cast<double>(density.of(unit.out * unit.in))));
  }
  for (size_t i = 0; i < is_used.size(); ++i) {
    require(is_used[i], kSparseBudget, "custom", budget.custom[i].pattern,
            "matches no unit; correct the pattern");
  }
  return nnz;
}

/// Finds targets in proportion to the weights inside all bounds, in positions. Each round fixes the
/// units at the bounds on the side that is violated more, which ends with the one solution.
void fill(std::vector<Share>& shares, const std::vector<BudgetUnit>& units, double total) {
  while (true) {
    double left = total, weights = 0;
    for (size_t u = 0; u < shares.size(); ++u) {
      if (shares[u].is_fixed) {
        left -= shares[u].target;
      } else {
        weights += shares[u].weight;
      }
    }
    if (weights == 0) return;
    double too_much = 0, too_little = 0;
    for (size_t u = 0; u < shares.size(); ++u) {
      Share& share = shares[u];
      if (share.is_fixed) continue;
      const auto granule = static_cast<double>(units[u].granule);
      share.target = left * (share.weight / weights);
      too_much += std::max(0.0, share.target - granule * static_cast<double>(share.highest));
      too_little += std::max(0.0, granule * static_cast<double>(share.lowest) - share.target);
    }
    if (too_much == 0 && too_little == 0) return;
    for (size_t u = 0; u < shares.size(); ++u) {
      Share& share = shares[u];
      if (share.is_fixed) continue;
      const auto granule = static_cast<double>(units[u].granule);
      const double low = granule * static_cast<double>(share.lowest);
      const double high = granule * static_cast<double>(share.highest);
      const bool is_over = share.target > high, is_under = share.target < low;
      if (too_much >= too_little ? is_over : is_under) {
        share.target = is_over ? high : low;
        share.is_fixed = true;
      }
    }
  }
}

}  // namespace

Density::Density(double density) {
  require(density > 0 && density <= 1, kSparseBudget, "density", density,
          "is outside (0, 1]; it is the share of active weights, not of zeros");
  // Continued fraction, until the ratio rounds to the same double.
  int64_t p0 = 0, q0 = 1, p1 = 1, q1 = 0;
  double x = density;
  for (int i = 0; i < 64; ++i) {
    const double whole = std::floor(x);
    if (whole > 1e15) break;
    const auto a = static_cast<int64_t>(whole);
    if (q1 > (int64_t{1} << 58) / std::max<int64_t>(a, 1)) break;
    const int64_t p = a * p1 + p0, q = a * q1 + q0;
    p0 = p1, q0 = q1, p1 = p, q1 = q;
    if (static_cast<double>(p) / static_cast<double>(q) == density) break;
    x = 1 / (x - whole);
  }
  require(p1 > 0, kSparseBudget, "density", density, "is too small to be a ratio of integers");
  numerator_ = p1;
  denominator_ = q1;
}

Density Density::ratio(int64_t numerator, int64_t denominator) {
  require(denominator >= 1, kSparseBudget, "denominator", denominator, "is below 1");
  require(numerator >= 1 && numerator <= denominator, kSparseBudget, "numerator", numerator,
          "is outside [1, denominator=" + to_text(denominator) + "]");
  const int64_t common = std::gcd(numerator, denominator);
  Density density;
  density.numerator_ = numerator / common;
  density.denominator_ = denominator / common;
  return density;
}

int64_t Density::of(int64_t count) const {
  return static_cast<int64_t>((Wide{2} * numerator_ * count + denominator_) /
                              (Wide{2} * denominator_));
}

bool fits_pattern(const std::string& pattern, const std::string& text) {
  return matches(pattern.c_str(), text.c_str());
}

int64_t number_of_weights(const Density& density, const std::vector<BudgetUnit>& units) {
  if (units.empty()) return 0;
  int64_t sum_sizes = 0;
  bool are_equal = true;
  for (const BudgetUnit& unit : units) {
    sum_sizes += unit.out * unit.in;
    are_equal = are_equal && unit.granule == units.front().granule;
  }
  const int64_t granule = are_equal ? units.front().granule : 1;
  return static_cast<int64_t>((Wide{2} * density.numerator() * sum_sizes +
                               Wide{1} * density.denominator() * granule) /
                              (Wide{2} * density.denominator() * granule)) *
         granule;
}

Allocation allocate(const Budget& budget, const std::vector<BudgetUnit>& units) {
  check(budget, units);
  Allocation result;
  if (budget.distribution == Distribution::kCustom) {
    result.nnz = custom_numbers(budget, units);
    return result;
  }
  require(budget.custom.empty(), kSparseBudget, "custom", budget.custom.size(),
          "densities are given, but the distribution is not kCustom");
  if (budget.distribution == Distribution::kEpsilon) {
    for (const BudgetUnit& unit : units) {
      const double share = -std::expm1(-budget.epsilon * edges_of(unit) / size_of(unit));
      result.nnz.push_back(own_number(unit, size_of(unit) * share));
    }
    return result;
  }

  int64_t sum_sizes = 0, lowest = 0, highest = 0;
  std::vector<Share> shares;
  for (const BudgetUnit& unit : units) {
    Share share = bounds_of(unit);
    share.weight = weight_of(budget, unit);
    sum_sizes += unit.out * unit.in;
    lowest += share.lowest * unit.granule;
    highest += share.highest * unit.granule;
    shares.push_back(share);
  }
  if (units.empty()) return result;
  const int64_t wanted = budget.density.of(sum_sizes);
  const int64_t total = number_of_weights(budget.density, units);
  require(total >= lowest, kSparseBudget, "density", budget.density.value(),
          "allows " + to_text(wanted) + " of " + to_text(sum_sizes) +
              " weights, but the floors need " + to_text(lowest) +
              "; choose a higher density or lower floors");
  require(total <= highest, kSparseBudget, "density", budget.density.value(),
          "asks for " + to_text(wanted) + " of " + to_text(sum_sizes) +
              " weights, but the ceilings allow " + to_text(highest) +
              "; choose a lower density or higher ceilings");
  fill(shares, units, static_cast<double>(total));

  std::vector<int64_t> remainder(units.size());  // in 1e-9 granules: rounding errors are ties
  int64_t left = total;
  for (size_t u = 0; u < units.size(); ++u) {
    const double granules = shares[u].target / static_cast<double>(units[u].granule);
    // A target may end a rounding error outside its bounds or below the integer that it is.
    const int64_t whole = std::clamp(static_cast<int64_t>(std::floor(granules + 1e-9)),
                                     shares[u].lowest, shares[u].highest);
    remainder[u] = std::llround((granules - static_cast<double>(whole)) * 1e9);
    result.nnz.push_back(whole * units[u].granule);
    left -= result.nnz.back();
  }
  std::vector<size_t> by_remainder(units.size());
  std::iota(by_remainder.begin(), by_remainder.end(), size_t{0});
  std::stable_sort(by_remainder.begin(), by_remainder.end(),
                   [&](size_t a, size_t b) { return remainder[a] > remainder[b]; });
  for (bool is_moving = true; is_moving && left > 0;) {
    is_moving = false;
    for (const size_t u : by_remainder) {
      if (left < units[u].granule) continue;
      if (result.nnz[u] >= shares[u].highest * units[u].granule) continue;
      result.nnz[u] += units[u].granule;
      left -= units[u].granule;
      is_moving = true;
    }
  }
  PERSEID_INVARIANT(left >= 0);
  result.rest = wanted - (total - left);
  return result;
}

}  // namespace perseid
