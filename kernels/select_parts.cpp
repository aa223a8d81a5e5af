// Passes of a radix select over keys of 64 bits, 8 bits each, as select_atoms makes them: 4 settle
// scores that differ, 4 more equal ones. Each pass reads the scores and the candidates' bits.
#include "kernels/select_parts.h"

#include <algorithm>
#include <functional>
#include <mutex>
#include <vector>

#include "kernels/atom_key.h"
#include "kernels/checks.h"
#include "kernels/mask_bits.h"
#include "kernels/parallel.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kPartBlock = int64_t{1} << 16;  // a multiple of 64: no shared words

void check_part(const char* operation, const AtomPart& part, Stream stream) {
  require_count(operation, "num_atoms", part.num_atoms);
  require(part.num_atoms < (int64_t{1} << 32), operation, "num_atoms", part.num_atoms,
          "is not below 2^32, the number of ties; choose larger atoms");
  require_buffer(operation, "candidates", part.candidates, part.num_atoms);
  require_device(stream, operation, "give it CPU memory");
}

/// body(begin, end) over ranges that start at whole words.
void for_part_blocks(int64_t num_atoms, const std::function<void(int64_t, int64_t)>& body) {
  parallel_for(0, ceil_div(num_atoms, kPartBlock), 1, [&](int64_t first, int64_t last) {
    body(first * kPartBlock, std::min(last * kPartBlock, num_atoms));
  });
}

uint64_t key_of(const AtomPart& part, AtomOrder order, RandomKey key, int64_t atom) {
  const auto index = static_cast<uint32_t>(part.first_atom + static_cast<uint64_t>(atom));
  return atom_key(order, part.scores, key, atom, index);
}

}  // namespace

void count_key_digits(const AtomPart& part, AtomOrder order, RandomKey key, KeyRange range,
                      int64_t* histogram, Stream stream) {
  constexpr const char* kOperation = "count_key_digits";
  check_part(kOperation, part, stream);
  require_buffer(kOperation, "histogram", histogram, kKeyDigits);
  require(range.shift >= kKeyDigitBits && range.shift <= 64, kOperation, "shift", range.shift,
          "is outside [8, 64]");
  std::mutex mutex;
  for_part_blocks(part.num_atoms, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> mine(static_cast<size_t>(kKeyDigits), 0);
    for_each_set(part.candidates, begin, end, [&](int64_t atom) {
      const uint64_t bits = key_of(part, order, key, atom);
      if (range.shift < 64 && bits >> range.shift != range.prefix) return;
      ++mine[static_cast<size_t>((bits >> (range.shift - kKeyDigitBits)) & (kKeyDigits - 1))];
    });
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t digit = 0; digit < mine.size(); ++digit) histogram[digit] += mine[digit];
  });
}

void mark_keys(const AtomPart& part, AtomOrder order, RandomKey key, uint64_t limit,
               bool takes_limit, uint64_t* selected, Stream stream) {
  constexpr const char* kOperation = "mark_keys";
  check_part(kOperation, part, stream);
  require_buffer(kOperation, "selected", selected, part.num_atoms);
  for_part_blocks(part.num_atoms, [&](int64_t begin, int64_t end) {
    std::fill(selected + begin / 64, selected + num_mask_words(end), uint64_t{0});
    for_each_set(part.candidates, begin, end, [&](int64_t atom) {
      const uint64_t bits = key_of(part, order, key, atom);
      const bool is_taken = bits > limit || (takes_limit && bits == limit);
      if (is_taken) selected[atom / 64] |= uint64_t{1} << (atom % 64);
    });
  });
}

}  // namespace perseid::kernels
