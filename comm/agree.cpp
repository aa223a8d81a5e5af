#include "comm/agree.h"

#include <algorithm>
#include <array>
#include <exception>
#include <string>
#include <vector>

#include "comm/collectives.h"
#include "kernels/error.h"

namespace perseid::comm {
namespace {

constexpr int32_t kGo = 0;
using Text = std::array<char, 256>;

template <typename... Types>
[[noreturn]] void throw_by_code(int32_t code, ErrorDetail detail) {
  // The same type as on the rank that refused.
  ((code == Types(ErrorDetail{}).exit_code() ? throw Types(detail) : void()), ...);
  throw InternalError(std::move(detail));
}

}  // namespace

void agree(const Group& group, CallSite site, const std::function<void()>& check) {
  int32_t code = kGo;
  Text text{};
  std::exception_ptr mine;
  try {
    check();
  } catch (const std::exception& error) {
    const auto* ours = dynamic_cast<const Error*>(&error);
    code = ours ? ours->exit_code() : InternalError(ErrorDetail{}).exit_code();
    const std::string what = error.what();
    std::copy_n(what.begin(), std::min(what.size(), text.size() - 1), text.begin());
    mine = std::current_exception();
  }
  const auto num_ranks = static_cast<size_t>(group.size());
  std::vector<int32_t> codes(num_ranks);
  all_gather(&code, sizeof(code), codes.data(), group, site);
  const auto refusing =
      std::find_if(codes.begin(), codes.end(), [](int32_t c) { return c != kGo; });
  if (refusing == codes.end()) return;

  // Only now, off the usual path: what the first refusing rank says.
  std::vector<Text> texts(num_ranks);
  all_gather(text.data(), sizeof(text), texts.data(), group, site);
  if (mine) std::rethrow_exception(mine);
  const auto culprit = static_cast<size_t>(refusing - codes.begin());
  ErrorDetail detail;
  detail.operation = site.operation ? site.operation : "agree";
  detail.value = "refused";
  detail.limit = "by rank " + std::to_string(culprit) + ": " + texts[culprit].data();
  detail.rank = group.rank();
  detail.culprit = static_cast<int>(culprit);
  detail.layer = site.layer;
  detail.step = site.step;
  throw_by_code<ConfigError, DataError, OutOfMemory, IoError, PeerLost, RanksDisagree, Diverged>(
      codes[culprit], std::move(detail));
}

}  // namespace perseid::comm
