#include "moe/effective_parts.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <utility>

#include "kernels/error.h"

namespace perseid {

void EffectiveParts::set(int64_t slot, int64_t first_out, int64_t num_out, Effective effective) {
  require(!contains(slot, first_out), "effective_parts", "first_out", first_out,
          "is a part already, of slot " + to_text(slot));
  parts_.push_back({slot, first_out, num_out, std::move(effective)});
  std::sort(parts_.begin(), parts_.end(), [](const Part& a, const Part& b) {
    return a.slot != b.slot ? a.slot < b.slot : a.first_out < b.first_out;
  });
}

void EffectiveParts::erase(int64_t slot, int64_t first_out) {
  std::erase_if(parts_,
                [&](const Part& part) { return part.slot == slot && part.first_out == first_out; });
}

bool EffectiveParts::contains(int64_t slot, int64_t first_out) const {
  return std::any_of(parts_.begin(), parts_.end(), [&](const Part& part) {
    return part.slot == slot && part.first_out == first_out;
  });
}

at::Tensor EffectiveParts::replaced(const at::Tensor& weight, std::vector<const Part*> parts) {
  std::vector<at::Tensor> pieces;
  int64_t done = 0;
  for (const Part* part : parts) {
    const int64_t count = part->num_out < 0 ? weight.size(0) - part->first_out : part->num_out;
    if (part->first_out > done) pieces.push_back(weight.slice(0, done, part->first_out));
    pieces.push_back(part->effective(weight.narrow(0, part->first_out, count)));
    done = part->first_out + count;
  }
  if (done < weight.size(0)) pieces.push_back(weight.slice(0, done));
  return pieces.size() == 1 ? pieces.front() : at::cat(pieces);
}

at::Tensor EffectiveParts::of(const at::Tensor& parameter) const {
  if (parts_.empty()) return parameter;
  std::vector<const Part*> mine;
  if (parts_.front().slot < 0) {
    for (const Part& part : parts_) mine.push_back(&part);
    return replaced(parameter, std::move(mine));
  }
  std::vector<at::Tensor> slots;
  for (int64_t slot = 0; slot < parameter.size(0); ++slot) {
    mine.clear();
    for (const Part& part : parts_) {
      if (part.slot == slot) mine.push_back(&part);
    }
    slots.push_back(replaced(parameter.select(0, slot), mine));
  }
  return at::stack(slots);
}

}  // namespace perseid
