#pragma once
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace perseid::bench {

inline double now_ms() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(since).count();
}

/// Mean of the two middle values if their number is even.
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

inline double minimum(const std::vector<double>& values) {
  return *std::min_element(values.begin(), values.end());
}

/// Median of a[i] / b[i]. The two were measured in the same round, so a load on the machine that
/// lasts longer than a round cancels.
inline double median_ratio(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> ratios(a.size());
  for (size_t i = 0; i < a.size(); ++i) ratios[i] = a[i] / b[i];
  return median(ratios);
}

/// Who runs as number `place` of a round. None follows itself, as its data would still lie in the
/// caches, and with an even count of contenders each follows each other one (Williams 1949).
inline size_t turn_of(size_t count, int64_t round, size_t place) {
  if (count <= 2) return place;
  const size_t first = place % 2 == 1 ? (place + 1) / 2 : (count - place / 2) % count;
  const auto shift = static_cast<size_t>(round) % count;
  return (first + shift) % count;
}

/// Milliseconds of each contender in each of `rounds` rounds, after `warmup_rounds`. All run once
/// per round, in the order of turn_of.
inline std::vector<std::vector<double>> time_in_turns(
    const std::vector<std::function<void()>>& contenders, int64_t warmup_rounds, int64_t rounds) {
  std::vector<std::vector<double>> ms(contenders.size());
  for (int64_t round = 0; round < warmup_rounds + rounds; ++round) {
    for (size_t i = 0; i < contenders.size(); ++i) {
      const size_t turn = turn_of(contenders.size(), round, i);
      const double start = now_ms();
      contenders[turn]();
      if (round >= warmup_rounds) ms[turn].push_back(now_ms() - start);
    }
  }
  return ms;
}

}  // namespace perseid::bench
