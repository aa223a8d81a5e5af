#include "comm/group.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "comm/collective.h"
#include "comm/collectives.h"

namespace perseid::comm {

Backend::Backend(int rank, int size) : rank_(rank), size_(size) {
  state_.sent.resize(static_cast<size_t>(size));
  state_.received.resize(static_cast<size_t>(size));
  state_.blocks.resize(static_cast<size_t>(size));
}

Group::Group() : Group(self_group()) {}

Group::Group(std::shared_ptr<Backend> backend) : backend_(std::move(backend)) {
  PERSEID_INVARIANT(backend_ != nullptr);
}

int Group::rank() const { return backend_->rank(); }
int Group::size() const { return backend_->size(); }
const char* Group::backend_name() const { return backend_->name(); }

void Group::set_timeout_ms(int64_t timeout_ms) const {
  require(timeout_ms > 0, "set_timeout_ms", "timeout_ms", timeout_ms,
          "is not above 0; choose 60000");
  backend_->state().timeout_ms = timeout_ms;
}

void Group::set_config_hash(uint32_t hash) const {
  Collective collective(*this, OpCode::kSetConfigHash, CallSite{});
  collective.set_config_hash(hash);
  collective.agree();
  backend_->state().config_hash = hash;
}

Group Group::split(int color, int key) const {
  struct Wish {
    int64_t color, key, context;
  };
  Collective collective(*this, OpCode::kSplit, CallSite{});
  collective.refuse_unless(color >= 0, Code::kColor, color);
  const Wish mine{color, key, backend_->proposed_context()};
  std::vector<Wish> wishes;
  const auto num_ranks = static_cast<size_t>(size());
  collective.allocate(static_cast<int64_t>(num_ranks * sizeof(Wish)),
                      [&] { wishes.resize(num_ranks); });
  collective.agree();
  std::vector<PeerBlock>& blocks = collective.clear_blocks();
  for (size_t p = 0; p < blocks.size(); ++p) blocks[p] = PeerBlock{&mine, 1, &wishes[p], 1};
  collective.move(sizeof(Wish));

  Subgroup subgroup;
  subgroup.color = color;
  subgroup.sequence = collective.sequence();
  for (int p = 0; p < size(); ++p) {
    const Wish& wish = wishes[static_cast<size_t>(p)];
    subgroup.context = std::max(subgroup.context, wish.context);
    if (wish.color == color) subgroup.members.push_back(p);
  }
  std::stable_sort(subgroup.members.begin(), subgroup.members.end(), [&](int x, int y) {
    return wishes[static_cast<size_t>(x)].key < wishes[static_cast<size_t>(y)].key;
  });
  Group group(backend_->split(subgroup));
  group.backend().state().timeout_ms = backend_->state().timeout_ms;
  group.backend().state().config_hash = backend_->state().config_hash;
  return group;
}

}  // namespace perseid::comm
