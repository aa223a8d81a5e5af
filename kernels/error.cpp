#include "kernels/error.h"

#include <string_view>
#include <utility>

namespace perseid {
namespace {

std::string sentence(const ErrorDetail& detail) {
  std::string text = "[" + detail.operation + "]";
  const auto add = [&text](const std::string& word) {
    if (!word.empty()) text += " " + word;
  };
  add(detail.argument.empty() || detail.value.empty() ? detail.argument + detail.value
                                                      : detail.argument + "=" + detail.value);
  add(detail.limit);

  std::string place;
  const auto add_place = [&place](const char* name, int64_t number) {
    if (number < 0) return;
    place += (place.empty() ? "" : ", ") + std::string(name) + " " + std::to_string(number);
  };
  add_place("rank", detail.rank);
  add_place("layer", detail.layer);
  add_place("step", detail.step);
  return place.empty() ? text : text + " (" + place + ")";
}

/// Folder and file only: where the tree was built is nobody's business.
std::string_view short_path(std::string_view path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string_view::npos || slash == 0) return path;
  const size_t folder = path.rfind('/', slash - 1);
  return folder == std::string_view::npos ? path : path.substr(folder + 1);
}

}  // namespace

Error::Error(ErrorDetail detail)
    : std::runtime_error(sentence(detail)), detail_(std::move(detail)) {}

void throw_broken_invariant(const char* condition, const char* file, int line) {
  const std::string where = std::string(short_path(file)) + ":" + std::to_string(line);
  throw InternalError(ErrorDetail{"invariant", "", condition,
                                  "does not hold at " + where + "; this is a bug of Perseid"});
}

}  // namespace perseid
