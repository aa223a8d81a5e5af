#include "examples/common/json_lines.h"

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "examples/common/text.h"
#include "kernels/error.h"

namespace perseid::examples {

std::string to_json(const JsonObject& object) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  for (const JsonField& field : object) {
    std::visit([&](const auto& value) { json[field.name] = value; }, field.value);
  }
  return json.dump();
}

JsonLines::JsonLines(const std::string& path) : path_(path) {
  if (path_.empty()) return;
  errno = 0;
  file_.open(path_, std::ios::trunc);
  if (!file_) {
    throw IoError(ErrorDetail{"json_lines", "file", path_,
                              format_text("cannot be written (%s)", std::strerror(errno))});
  }
}

void JsonLines::write(const JsonObject& object) {
  if (path_.empty()) return;
  errno = 0;
  file_ << to_json(object) << '\n' << std::flush;
  if (!file_) {
    throw IoError(ErrorDetail{"json_lines", "file", path_,
                              format_text("could not be written (%s)", std::strerror(errno))});
  }
}

}  // namespace perseid::examples
