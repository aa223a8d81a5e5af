// select_atoms against a sort.
//   EqualsReference  random, tied, bfloat16, odd and constant scores; one cell and many, all
//                    orders, 0 <= k <= more than there are, candidates missing; scores of all atoms
//                    and of the candidates alone; the same on 1, 2, 3, 7 threads
//   NanLast          NaN is taken when nothing else is left, and counted; so are infinities
//   SpreadOverAtoms  equal scores: exactly k, and the share of each 16th is that of chance
//   TieBits          no collisions; another key gives another order
//   LargeUnit        2^24 + 7 atoms: exactly k, none left out above one that is in
#include "kernels/select_atoms.h"

#include <bit>
#include <functional>

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

using Bits = std::vector<uint64_t>;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Bits bits_where(int64_t num_atoms, const std::function<bool(int64_t)>& is_set) {
  Bits bits(static_cast<size_t>(num_mask_words(num_atoms)), 0);
  for (int64_t a = 0; a < num_atoms; ++a) {
    if (is_set(a)) bits[static_cast<size_t>(a / 64)] |= uint64_t{1} << (a % 64);
  }
  return bits;
}
Bits all_bits(int64_t num_atoms) {
  return bits_where(num_atoms, [](int64_t) { return true; });
}
int64_t num_set(const Bits& bits) {
  int64_t count = 0;
  for (const uint64_t word : bits) count += std::popcount(word);
  return count;
}

struct Selection {
  Bits bits;
  AtomCounts counts;
};

Selection selected(const AtomCells& cells, AtomOrder order, const std::vector<float>& scores,
                   const Bits& candidates, const std::vector<int64_t>& k, RandomKey key,
                   bool is_reference = false) {
  Selection result{Bits(candidates.size(), ~uint64_t{0}), {}};
  const float* const values = scores.empty() ? nullptr : scores.data();
  if (is_reference) {
    result.counts = select_atoms_reference(cells, order, values, candidates.data(), k.data(), key,
                                           result.bits.data());
  } else {
    result.counts =
        select_atoms(cells, order, values, candidates.data(), k.data(), key, result.bits.data());
  }
  return result;
}

/// Which of a few scores are selected, as 0 and 1.
std::vector<int> chosen(const std::vector<float>& scores, int64_t k, AtomOrder order) {
  const auto count = static_cast<int64_t>(scores.size());
  const Selection result = selected({1, count}, order, scores, all_bits(count), {k}, random_key(1));
  std::vector<int> in;
  for (int64_t a = 0; a < count; ++a) in.push_back(static_cast<int>(result.bits[0] >> a & 1));
  return in;
}

TEST(SelectAtoms, Examples) {
  using Row = std::vector<int>;
  constexpr AtomOrder kLargest = AtomOrder::kLargest, kSmallest = AtomOrder::kSmallest;
  EXPECT_EQ(chosen({1, 3, 2, 4}, 2, kLargest), (Row{0, 1, 0, 1}));
  EXPECT_EQ(chosen({1, 3, 2, 4}, 2, kSmallest), (Row{1, 0, 1, 0}));
  EXPECT_EQ(chosen({-1, 3, -2, 0}, 1, kSmallest), (Row{0, 0, 1, 0}));
  EXPECT_EQ(chosen({-kInf, kInf, 5}, 1, kLargest), (Row{0, 1, 0}));
  EXPECT_EQ(chosen({-kInf, kInf, 5}, 1, kSmallest), (Row{1, 0, 0}));
  EXPECT_EQ(chosen({1, -3, 2, 0}, 2, AtomOrder::kLargestMagnitude), (Row{0, 1, 1, 0}));
  EXPECT_EQ(chosen({1, -3, 2, -0.0f}, 2, AtomOrder::kSmallestMagnitude), (Row{1, 0, 0, 1}));
  EXPECT_EQ(chosen({-kInf, 7, kNan}, 2, AtomOrder::kLargestMagnitude), (Row{1, 1, 0}));
  EXPECT_EQ(chosen({1, 2}, 0, kLargest), (Row{0, 0}));
  EXPECT_EQ(chosen({1, kNan}, 5, kLargest), (Row{1, 1}));
  EXPECT_EQ(chosen({}, 5, kLargest), Row{});
}

TEST(SelectAtoms, NanLast) {
  for (const AtomOrder order : {AtomOrder::kLargest, AtomOrder::kSmallest}) {
    const std::vector<float> scores = {kNan, -kInf, 7, -kNan, kInf, kNan};
    const Bits candidates = bits_where(6, [](int64_t a) { return a != 5; });
    const Selection three = selected({1, 6}, order, scores, candidates, {3}, random_key(2));
    EXPECT_EQ(three.bits[0], uint64_t{0b010110});
    EXPECT_EQ(three.counts.num_selected, 3);
    EXPECT_EQ(three.counts.num_candidates, 5);
    EXPECT_EQ(three.counts.num_nan, 2);
    EXPECT_EQ(three.counts.num_infinite, 2);
    EXPECT_EQ(selected({1, 6}, order, scores, candidates, {4}, random_key(2)).counts.num_selected,
              4);
  }
}

TEST(SelectAtoms, ZerosAreEqual) {
  // If -0 and +0 differed, all of one sign would be in before any of the other.
  const int64_t count = 1000;
  std::vector<float> scores(count);
  for (int64_t a = 0; a < count; ++a) scores[static_cast<size_t>(a)] = a % 2 == 0 ? -0.0f : 0.0f;
  const Selection half =
      selected({1, count}, AtomOrder::kLargest, scores, all_bits(count), {500}, random_key(3));
  const Bits without_scores =
      selected({1, count}, AtomOrder::kLargest, {}, all_bits(count), {500}, random_key(3)).bits;
  EXPECT_EQ(half.bits, without_scores);
}

void expect_reference(const AtomCells& cells, const std::vector<float>& scores,
                      const std::string& what) {
  const int64_t count = cells.num_atoms();
  const std::vector<Bits> candidate_sets = {
      all_bits(count), bits_where(count, [](int64_t a) { return a % 3 != 1 && a % 64 != 5; })};
  for (const Bits& candidates : candidate_sets) {
    std::vector<float> listed;
    for (int64_t a = 0; a < count && !scores.empty(); ++a) {
      const bool is_in = (candidates[static_cast<size_t>(a / 64)] >> (a % 64) & 1) != 0;
      if (is_in) listed.push_back(scores[static_cast<size_t>(a)]);
    }
    for (const AtomOrder order : {AtomOrder::kLargest, AtomOrder::kSmallest,
                                  AtomOrder::kLargestMagnitude, AtomOrder::kSmallestMagnitude}) {
      for (const int64_t share : {0, 1, 3, 9, 10, 13}) {
        std::vector<int64_t> k(static_cast<size_t>(cells.num_cells));
        for (size_t c = 0; c < k.size(); ++c) {
          k[c] = (cells.atoms_per_cell * share + static_cast<int64_t>(c % 7)) / 10;
        }
        const Selection expected =
            selected(cells, order, scores, candidates, k, random_key(4), true);
        std::vector<int64_t> of_cell(k.size()), available(k.size());
        count_atoms(cells, expected.bits.data(), of_cell.data());
        count_atoms(cells, candidates.data(), available.data());
        for (size_t c = 0; c < k.size(); ++c) ASSERT_EQ(of_cell[c], std::min(k[c], available[c]));
        for (const int threads_used : kThreadCounts) {
          const Threads threads(threads_used);
          const Selection actual = selected(cells, order, scores, candidates, k, random_key(4));
          ASSERT_EQ(actual.bits, expected.bits) << what << " " << count << " share " << share;
          ASSERT_EQ(actual.counts.num_selected, expected.counts.num_selected) << what;
          ASSERT_EQ(actual.counts.num_selected, num_set(actual.bits)) << what;
          ASSERT_EQ(actual.counts.num_candidates, expected.counts.num_candidates) << what;
          ASSERT_EQ(actual.counts.num_nan, expected.counts.num_nan) << what;
          ASSERT_EQ(actual.counts.num_infinite, expected.counts.num_infinite) << what;
          if (scores.empty() || threads_used != 3) continue;
          Bits of_listed(candidates.size(), ~uint64_t{0});
          const AtomCounts counts =
              select_listed_atoms(cells, order, listed.data(), candidates.data(), k.data(),
                                  random_key(4), of_listed.data());
          ASSERT_EQ(of_listed, expected.bits) << what << " listed";
          ASSERT_EQ(counts.num_nan, expected.counts.num_nan) << what << " listed";
          ASSERT_EQ(counts.num_infinite, expected.counts.num_infinite) << what << " listed";
        }
      }
    }
  }
}

TEST(SelectAtoms, EqualsReference) {
  const std::vector<AtomCells> shapes = {{1, 1},    {1, 63},     {1, 64},   {1, 4096},
                                         {1, 4097}, {1, 131079}, {257, 4},  {1000, 16},
                                         {130, 33}, {3, 5003},   {70, 1000}};
  for (const AtomCells& cells : shapes) {
    const int64_t count = cells.num_atoms();
    expect_reference(cells, normal_values<float>(count, 1), "normal");
    auto ties = normal_values<float>(count, 2, 2.0);
    for (float& value : ties) value = std::trunc(value);  // -0 among them
    expect_reference(cells, ties, "ties");
    auto rounded = normal_values<float>(count, 3, 0.02);
    for (float& value : rounded) value = std::abs(to_float(to_bfloat16(value)));
    expect_reference(cells, rounded, "bfloat16");
    auto odd = normal_values<float>(count, 4);
    for (size_t i = 0; i < odd.size(); ++i) {
      if (i % 3 == 0) odd[i] = kNan;
      if (i % 5 == 0) odd[i] = -kInf;
      if (i % 7 == 0) odd[i] = kInf;
      if (i % 11 == 0) odd[i] = std::numeric_limits<float>::denorm_min();
    }
    expect_reference(cells, odd, "odd");
    expect_reference(cells, {}, "none");
    expect_reference(cells, std::vector<float>(static_cast<size_t>(count), -3), "constant");
  }
}

TEST(SelectAtoms, SpreadOverAtoms) {
  // 40 selections of 1 in 8; the counts of 16 equal parts are close to a multinomial draw, whose
  // chi-square with 15 degrees of freedom has mean 15 and deviation 5.5. Their sum over 40 keys:
  // mean 600, deviation 35; without replacement it is 1 - 1/8 of that, 525.
  constexpr int64_t kCount = 1 << 14, kParts = 16, kSelected = kCount / 8;
  double sum = 0, halves = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    const Selection result = selected({1, kCount}, AtomOrder::kLargest, {}, all_bits(kCount),
                                      {kSelected}, random_key(seed));
    ASSERT_EQ(num_set(result.bits), kSelected);
    std::vector<int64_t> part(kParts);
    count_atoms({kParts, kCount / kParts}, result.bits.data(), part.data());
    const double expected = double{kSelected} / kParts;
    int64_t first_half = 0;
    for (int64_t p = 0; p < kParts; ++p) {
      const double off = static_cast<double>(part[static_cast<size_t>(p)]) - expected;
      sum += off * off / expected;
      if (p < kParts / 2) first_half += part[static_cast<size_t>(p)];
    }
    const double off = static_cast<double>(first_half) - kSelected / 2.0;
    halves += off * off / (kSelected / 4.0);
  }
  EXPECT_GT(sum, 525 - 5 * 31);  // too even is not random, either
  EXPECT_LT(sum, 525 + 5 * 31);
  EXPECT_LT(halves, 35 + 5 * 7.9);  // 40 * 7/8, deviation sqrt(80) * 7/8
}

TEST(SelectAtoms, TieBits) {
  for (const uint64_t seed : {0, 1, 99}) {
    std::vector<uint32_t> ties(1 << 20);
    for (size_t a = 0; a < ties.size(); ++a) {
      ties[a] = tie_bits(random_key(seed), static_cast<uint32_t>(a * 4093));
    }
    std::sort(ties.begin(), ties.end());
    EXPECT_EQ(std::adjacent_find(ties.begin(), ties.end()), ties.end());
  }
  const Bits candidates = all_bits(4096);
  const auto drawn = [&](uint64_t seed) {
    return selected({1, 4096}, AtomOrder::kLargest, {}, candidates, {2048}, random_key(seed)).bits;
  };
  EXPECT_EQ(drawn(5), drawn(5));
  int64_t both = 0;
  const Bits first = drawn(5), second = drawn(6);
  for (size_t w = 0; w < first.size(); ++w) both += std::popcount(first[w] & second[w]);
  EXPECT_NEAR(static_cast<double>(both), 1024, 5 * 16);  // hypergeometric, deviation 16
}

TEST(SelectAtoms, LargeUnit) {
  constexpr int64_t kCount = (int64_t{1} << 24) + 7, kSelected = 1'677'722;
  std::vector<float> scores(kCount);
  fill_uniform(scores.data(), kCount, DType::kFloat32, 0, 1, random_key(7));
  for (float& score : scores) score = to_float(to_bfloat16(score));
  const Selection result = selected({1, kCount}, AtomOrder::kLargest, scores, all_bits(kCount),
                                    {kSelected}, random_key(8));
  EXPECT_EQ(num_set(result.bits), kSelected);
  float lowest_in = kInf, highest_out = -kInf;
  for (int64_t a = 0; a < kCount; ++a) {
    const float score = scores[static_cast<size_t>(a)];
    const bool is_in = (result.bits[static_cast<size_t>(a / 64)] >> (a % 64) & 1) != 0;
    (is_in ? lowest_in : highest_out) =
        is_in ? std::min(lowest_in, score) : std::max(highest_out, score);
  }
  EXPECT_GE(lowest_in, highest_out);
}

TEST(SelectAtoms, WrongArguments) {
  const std::vector<float> one = {1};
  EXPECT_EQ(config_error([&] {
              selected({1, 1}, AtomOrder::kLargest, one, all_bits(1), {-1}, random_key(1));
            }),
            "[select_atoms] k=-1 is negative; choose 0 or more");
  EXPECT_EQ(config_error([&] {
              selected({-1, 1}, AtomOrder::kLargest, one, all_bits(1), {1}, random_key(1));
            }),
            "[select_atoms] num_cells=-1 is negative; choose 0 or more");
  EXPECT_EQ(config_error([&] {
              selected({2, int64_t{1} << 31}, AtomOrder::kLargest, one, all_bits(1), {1, 1},
                       random_key(1));
            }),
            "[select_atoms] atoms=2*2147483648 are not below 2^32, the number of ties; choose "
            "larger atoms");
  EXPECT_EQ(config_error([&] {
              select_atoms({1, 1}, AtomOrder::kLargest, nullptr, nullptr, nullptr, {}, nullptr);
            }),
            "[select_atoms] candidates=null but 1 elements are needed; pass a buffer");
}

}  // namespace
}  // namespace perseid::kernels::testing
